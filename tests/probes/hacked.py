"""In a copy of the scripts with a change of docs/hacking.md: train, stop by a signal, resume, sample, and look at what
the page promises of the change."""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the copy

import numpy as np
import torch

import train_gpt2
from lib.console import Stopped, UserError
from lib.data.folder import ShardFolder, TokenStream
from tools import sample
from train_gpt2 import main, parse_args

title, flags = sys.argv[1], sys.argv[2:]
get_lr = train_gpt2.get_lr


def stop(step, config):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return get_lr(step, config)


def expect_refusal(words, *args):
    try:
        main(parse_args([*flags, *args]))
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {args}")


def activation(model):
    assert model.config.activation == "relu2"
    expect_refusal("activation was relu2", "--log_dir=stopped", "--init_from=resume", "--activation=gelu")
    x, mlp = torch.randn(3, 16), model.transformer.h[0].mlp
    assert torch.equal(mlp(x), mlp.c_proj(mlp.c_fc(x).relu() ** 2))


def rotary(model):
    """Keys and queries that lie as far from each other have the same product wherever they are."""
    q, k = torch.randn(2, 1, 1, 1, 8)
    rotate = model.transformer.h[0].attn.rotate
    products = [(rotate(q, start) * rotate(k, start + 3)).sum() for start in (0, 5, 20)]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert (rotate(q, 0) * rotate(k, 4)).sum() != products[0]
    # the cache of a text that is being written gives what the whole text does
    idx = torch.randint(50257, (1, 20))
    written = train_gpt2.generate(model, idx[:, :4], 12, temperature=0)
    for end in range(4, 16):
        assert model(written[:, :end])[0][0, -1, :50257].argmax() == written[0, end]


def optimizer(model):
    state = torch.load("whole/model_00012.pt", weights_only=True)["optimizer"]["optimizers"]
    assert [sorted(part["state"][0]) for part in state] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]]
    assert len(state[0]["state"]) == 4 * model.config.n_layer


def records(log_dir, kind):
    lines = Path(log_dir, "log.txt").read_text().splitlines()
    return {int(line.split()[0]): float(line.split()[2]) for line in lines if line.split()[1] == kind}


def metric(model):
    kinds = {line.split()[1] for line in Path("whole/log.txt").read_text().splitlines()}
    assert kinds == {"train", "val", "lr", "norm", "weight_norm", "perplexity", "val_of_my_data"}
    assert records("whole", "val") != records("whole", "val_of_my_data")


def loss(model):
    x = torch.randint(50257, (2, 8))
    logits, in_eval = model.eval()(x, x)
    assert torch.allclose(model.train()(x, x)[1] - in_eval, 1e-4 * logits.logsumexp(-1).square().mean(), atol=1e-5)


def ema(model):
    saved = torch.load("whole/model_00012.pt", weights_only=True)
    assert all(saved["ema"][name].shape == p.shape for name, p in model.named_parameters())
    assert not torch.equal(saved["ema"]["transformer.wpe.weight"], saved["model"]["transformer.wpe.weight"])
    of_ema = records("whole", "val_of_ema")
    assert of_ema[0] == records("whole", "val")[0] > of_ema[12] > records("whole", "val")[12]


def lora(model):
    base = torch.load("base/model_00012.pt", weights_only=True)["model"]
    for name, weight in model.state_dict().items():
        assert weight.any() if "lora" in name else torch.equal(weight, base[name]), name
    assert (model.config.lora_rank, model.config.dropout) == (2, 0.1)
    assert len(torch.load("whole/model_00012.pt", weights_only=True)["optimizer"]["state"]) == 4
    assert records("whole", "val")[0] == records("base", "val")[12]


def tokens(model):
    Path("text.txt").write_text("Grüße, world! " * 3000, encoding="utf-8")
    subprocess.run([sys.executable, "fineweb.py", "--source", "text.txt", "--out", "built", "--workers=1"], check=True)
    stream = TokenStream("built", "train", vocab_size=257)
    assert "Grüße, world!".encode() in bytes(stream.read(0, 60).tolist())
    main(parse_args([*flags, "--vocab_size=257", "--data_dir=built", "--log_dir=of_bytes", "--sample_every=12"]))
    assert records("of_bytes", "val")[12] < records("of_bytes", "val")[0] < 6


def setting(model):
    rates = [float(line.split()[2]) for line in Path("whole/log.txt").read_text().splitlines() if " lr " in line]
    assert np.allclose(rates[2:], [1e-2] * 6 + [1e-2, 7.5e-3, 5e-3, 2.5e-3][: len(rates) - 8], rtol=1e-4), rates


def mix(model):
    data, more = (ShardFolder(folder) for folder in ("data", "my_data"))
    loader = train_gpt2.MixedLoader(10, 32, 0, 1, [data, more], [7, 3], 50304, 1337)
    for _ in range(30):
        assert [stream.root for stream, *_ in loader.upcoming] == ["data"] * 7 + ["my_data"] * 3
        loader.next_batch()
    assert any(name.startswith("my_data/") for name in torch.load("whole/model_00012.pt", weights_only=True)["data"])


CHECKS = {
    "Another activation": activation, "Rotary positions": rotary, "Another optimizer": optimizer, "Another loss": loss,
    "An average of the weights (EMA)": ema, "LoRA and dropout, for fine-tuning": lora, "Another tokenizer": tokens,
    "Another metric": metric, "Another setting": setting, "A mix of data": mix,
}  # fmt: skip

if title.startswith("LoRA"):
    base = [flag for flag in flags if not flag.startswith(("--lora_rank", "--dropout", "--init_from"))]
    main(parse_args([*base, "--log_dir=base"]))
main(parse_args([*flags, "--log_dir=whole"]))
train_gpt2.get_lr = stop
try:
    main(parse_args([*flags, "--log_dir=stopped"]))
    raise AssertionError("it was not stopped")
except Stopped:
    train_gpt2.get_lr = get_lr
main(parse_args([*flags, "--log_dir=stopped", "--init_from=resume"]))
whole, stopped = (Path(folder, "log.txt").read_text() for folder in ("whole", "stopped"))
assert whole == stopped, "the losses differ after the resume"
sys.argv = ["sample", "stopped/model_00012.pt", "--prompt=Hello", "--max_new_tokens=5"]
sample.main()
CHECKS[title](train_gpt2.load_model("whole/model_00012.pt"))
