import math

import numpy as np
import pytest
import torch
from fake_hub import serving
from support import PROBES, losses, run, run_warm, write_items

from lib.console import UserError
from lib.model.cpu_loss import ChunkedCrossEntropy
from train_gpt2 import GPT, GPTConfig, TrainConfig, generate, get_lr, load_model

SMALL = GPTConfig(block_size=64, vocab_size=1000, n_layer=3, n_head=4, n_embd=64)


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(SMALL)


def randomized(model):
    """Weights away from the initialization's zeros and ones, so that a swapped bias or norm shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def test_logits_loss_and_gradients_equal_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = randomized(small_model())
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1000,
            n_positions=64,
            n_embd=64,
            n_layer=3,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
    )
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {k: v.t() if k.endswith(transposed) else v for k, v in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not [k for k in missing if not k.endswith(("attn.bias", "masked_bias"))]

    idx, targets = torch.randint(1000, (2, 3, 50))
    logits, loss = ours(idx, targets)
    loss.backward()
    their_logits = theirs(idx).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.view(-1, 1000), targets.view(-1))
    their_loss.backward()
    assert (logits - their_logits).abs().max() < 1e-4
    assert abs(loss - their_loss) < 1e-5
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        other = their_grads[name.replace("lm_head.weight", "transformer.wte.weight")]
        assert torch.allclose(p.grad, other.t() if name.endswith(transposed) else other, atol=1e-4), name


def test_state_dict_keys_are_those_of_the_tutorial():
    layer = [f"{m}.{p}" for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for p in ("weight", "bias")]  # fmt: skip
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    expected |= {f"transformer.h.{i}.{key}" for i in range(3) for key in layer}
    expected |= {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    model = small_model()
    assert set(model.state_dict()) == expected
    assert model.lm_head.weight is model.transformer.wte.weight


def test_no_position_sees_the_future():
    model = small_model().eval()
    idx = torch.randint(1000, (1, 40))
    changed = idx.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 1000
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[0, :25], after[0, :25])
    assert not torch.allclose(before[0, 25:], after[0, 25:])


def test_parameter_count_of_gpt2():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808


def test_initial_standard_deviations_and_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=50304, n_layer=4, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            residual = 0.02 * (2 * 4) ** -0.5
            std = residual if name.endswith("c_proj.weight") else 0.01 if "wpe" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.05 * std, name
    idx, targets = torch.randint(50257, (2, 4, 128))
    # logits are sums of 128 unit-variance features times weights of deviation 0.02: their variance adds half of itself
    expected = math.log(50304) + 128 * 0.02**2 / 2
    assert abs(model(idx, targets)[1].item() - expected) < 0.1


def test_every_parameter_is_in_one_optimizer_group():
    model = small_model()
    decay, no_decay = model.configure_optimizers(0.1, 6e-4, "cpu").param_groups
    ids = [id(p) for group in (decay, no_decay) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decay["params"]) and all(p.dim() < 2 for p in no_decay["params"])
    assert decay["betas"] == (0.9, 0.95) and decay["fused"]


@pytest.mark.parametrize("tokens", [1, 511, 512, 1300])
def test_chunked_loss_equals_the_plain_one(tokens):
    x = torch.randn(tokens, 32, requires_grad=True)
    w = torch.randn(1000, 32, requires_grad=True)
    targets = torch.randint(1000, (tokens,))
    targets[tokens // 2 :: 7] = -100 if tokens > 1 else targets[0]
    loss = ChunkedCrossEntropy.apply(x, w, targets)
    (3 * loss).backward()
    plain_x, plain_w = (t.detach().double().requires_grad_() for t in (x, w))
    plain = torch.nn.functional.cross_entropy(plain_x @ plain_w.t(), targets)
    (3 * plain).backward()
    assert abs(loss.item() - plain.item()) < 1e-5
    assert torch.allclose(x.grad.double(), plain_x.grad, atol=1e-6)
    assert torch.allclose(w.grad.double(), plain_w.grad, atol=1e-6)


def test_loss_without_logits_is_the_same():
    model = randomized(small_model())
    idx, targets = torch.randint(1000, (2, 3, 50))
    logits, loss = model(idx, targets)
    none, lean = model(idx, targets, return_logits=False)
    assert logits.shape == (3, 50, 1000) and none is None
    assert abs(loss.item() - lean.item()) < 1e-5
    assert model(idx)[1] is None


def test_eval_logits_are_float32_under_autocast():
    model = small_model()
    idx = torch.randint(1000, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(idx)[0].dtype == torch.bfloat16
        assert model.eval()(idx)[0].dtype == model.hidden_states(idx).dtype == torch.float32
        assert model(idx, idx, return_logits=False)[1].item() == pytest.approx(model(idx, idx)[1].item(), abs=1e-6)


def test_a_sequence_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="65 tokens are more than block_size 64"):
        small_model()(torch.zeros(1, 65, dtype=torch.long))


def test_overfits_one_batch():
    model = small_model()
    optimizer = model.configure_optimizers(0.0, 3e-3, "cpu")
    x, y = torch.randint(1000, (2, 2, 32))
    for _ in range(150):
        _, loss = model(x, y, return_logits=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_generate_never_samples_a_padded_id():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():  # the embedding that the final norm's bias points to wins: make that a padded id's
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50257:] = 5.0
    out = generate(model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=12)  # past block_size as well
    assert out.shape == (2, 14) and out.max() < 50257 and out[:, :2].tolist() == [[1, 2], [3, 4]]
    assert model.training


def test_learning_rate_corners():
    c = TrainConfig(max_lr=1.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=110)
    assert get_lr(0, c) == pytest.approx(0.1)
    assert get_lr(9, c) == get_lr(10, c) == pytest.approx(1.0)
    assert get_lr(60, c) == pytest.approx(0.55)
    assert get_lr(110, c) == get_lr(10_000, c) == pytest.approx(0.1)
    none = TrainConfig(max_lr=1.0, warmup_steps=0, max_steps=10)
    assert get_lr(0, none) == pytest.approx(1.0)


def stand_in_for_gpt2(folder):
    """A small random GPT-2 in the local cache of the hub's client, under OpenAI's name. Returns it and the environment
    in which the client finds it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    cached = folder / "hub" / "models--gpt2"
    theirs.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    return theirs, {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def test_from_pretrained_through_the_hub_cache(tmp_path):
    """Whatever lies in the current folder under the model's name."""
    theirs, env = stand_in_for_gpt2(tmp_path)
    idx = torch.randint(50257, (2, 30))
    torch.save(idx, tmp_path / "idx.pt")
    (tmp_path / "gpt2").mkdir()
    result = run(PROBES / "pretrained_logits.py", tmp_path / "idx.pt", tmp_path / "out.pt", env=env, cwd=tmp_path)
    assert result.returncode == 0 and "for the local file or folder of that name, write ./gpt2" in result.stdout, (
        result.stdout
    )
    assert (torch.load(tmp_path / "out.pt") - theirs(idx).logits).abs().max() < 1e-4


def test_from_pretrained_through_the_hub(tmp_path):
    """Config and weights are fetched with the client that is there anyway, and a broken answer is one line."""
    theirs, _ = stand_in_for_gpt2(tmp_path / "theirs")
    folder = next((tmp_path / "theirs").rglob("config.json")).parent
    idx = torch.randint(50257, (2, 30))
    torch.save(idx, tmp_path / "idx.pt")
    with serving({}) as hub:
        hub.models["gpt2"] = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        result = run_warm(PROBES / "pretrained_logits.py", tmp_path / "idx.pt", tmp_path / "out.pt", env=env)
        assert result.returncode == 0, result.stdout
        assert (torch.load(tmp_path / "out.pt") - theirs(idx).logits).abs().max() < 1e-4
        hub.models["gpt2"].pop("model.safetensors")
        env["HF_HOME"] = str(tmp_path / "other")
        write_items(tmp_path / "items.jsonl", 1)
        result = run_warm(
            "hellaswag.py", "-m", "gpt2", "-d", "cpu", "--limit", 1, "--data", tmp_path / "items.jsonl", env=env
        )
        assert result.returncode == 2 and "cannot fetch gpt2 from the Hugging Face hub" in result.stdout, result.stdout


def test_fine_tuning_openais_weights_on_a_small_corpus(tmp_path):
    """As in the README: own text to shards, a few steps from gpt2, a resume, and text from the result."""
    theirs, env = stand_in_for_gpt2(tmp_path)
    (tmp_path / "poems.txt").write_text("Roses are red, violets are blue. " * 400)
    built = run_warm("fineweb.py", "--source", tmp_path / "poems.txt", "--out", tmp_path / "poems", "--workers=1")
    assert built.returncode == 0, built.stdout
    flags = (
        "--init_from=gpt2", "--sequence_length=64", "--total_batch_size=512", "--micro_batch_size=4", "--max_lr=3e-3",
        "--warmup_steps=2", "--val_every=10", "--hellaswag_every=0", "--sample_every=0", "--plot_every=0",
        "--checkpoint_every=10", "--device=cpu", f"--data_dir={tmp_path / 'poems'}", f"--log_dir={tmp_path / 'tuned'}",
    )  # fmt: skip
    first = run_warm("train_gpt2.py", *flags, "--max_steps=10", env=env)
    assert first.returncode == 0, first.stdout
    with torch.no_grad():
        tokens = np.load(next((tmp_path / "poems").glob("*_val_*.npy")))[:64].astype(np.int64)
        begin = theirs(input_ids=torch.tensor(tokens[None]), labels=torch.tensor(tokens[None])).loss.item()
    val = losses(tmp_path / "tuned", "val")
    assert val[0] == pytest.approx(begin, abs=0.05) and val[10] < val[0] - 1  # from their weights, and better
    resumed = run_warm("train_gpt2.py", *flags, "--init_from=resume", "--max_steps=12", env=env)
    assert resumed.returncode == 0 and "resuming at step 10" in resumed.stdout, resumed.stdout


def test_without_openais_weights_a_folder_of_that_name_is_not_taken_for_them(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run("tools/sample.py", "gpt2", "--prompt=x", env=env, cwd=tmp_path)
    assert result.returncode == 2 and "For a local folder of that name, write ./gpt2" in result.stdout, result.stdout
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot load \./gpt2/ as a GPT-2 of config.json"):
        load_model("./gpt2")


def test_unknown_pretrained_name_is_refused():
    with pytest.raises(UserError, match="gpt2-medium"):
        GPT.from_pretrained("gpt3")
