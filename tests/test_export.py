"""The exported folder is the same model and the same tokenizer, for transformers and for ourselves."""

import hashlib
import json
import os
import re
import stat
import sys
from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import PROBES, disk, losses, run_warm, write_shards
from test_hacking import FLAGS, copy_scripts

import train_gpt2
from lib.checkpoint import load_checkpoint, write_checkpoint
from lib.console import UserError
from lib.model.hugging_face import read_folder
from lib.tokenizer import get_tokenizer
from tools import export_hf
from tools.export_hf import export, write_folder
from tools.import_model import import_model
from train_gpt2 import GPT, GPTConfig, TrainConfig, load_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=4, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_shards(folder / "data", [1500, 5000])
    train_config = asdict(TrainConfig(data_dir=str(folder / "data"), total_batch_size=1000))
    contents = {"model": model.state_dict(), "optimizer": {}, "config": asdict(model.config), "step": 12}
    contents |= {"train_config": train_config, "val_loss": 3.25, "commit": "abc1234" + "0" * 33}
    write_checkpoint(folder / "model_00012.pt", contents)
    export(str(folder / "model_00012.pt"), str(folder / "exported"))
    return folder / "model_00012.pt"


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint.parent / "exported"


def test_transformers_loads_the_same_model_offline(folder, model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.vocab_size == 50257 and theirs.config.eos_token_id == 50256 and theirs.dtype == torch.float32
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == theirs.config.attn_pdrop == 0
    idx = torch.randint(50257, (3, 64))
    with torch.no_grad():
        assert (theirs(idx).logits - model(idx)[0][:, :, :50257]).abs().max() < 1e-4
        out = theirs.generate(idx[:, :5], attention_mask=torch.ones(3, 5), max_new_tokens=5, pad_token_id=50256)
    assert out.size(1) <= 10


def test_the_tokenizer_files_are_openais(folder):
    sha256 = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")}
    assert sha256["vocab.json"] == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert sha256["merges.txt"] == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@pytest.fixture(scope="module")
def tokenizers(folder, tmp_path_factory):
    """The tokenizer of the folder, and the one of vocab.json and merges.txt alone."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    other = tmp_path_factory.mktemp("old")
    for name in ("vocab.json", "merges.txt", "config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    return AutoTokenizer.from_pretrained(folder), GPT2Tokenizer.from_pretrained(other)


HARD = st.text(st.sampled_from(list("aA1'stll  \n\t\r\u3000\u00a0.,!-_世界é🙂\u200d\u0301\x00\x1f\u202eａ٣𝕊")))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=["Cs", "Cn"])), HARD))
@example(" can't we'll  I'M\n\n  x \t ")
def test_token_ids_and_texts_equal_tiktokens(tokenizers, text):
    assume("<|endoftext|>" not in text)  # to theirs it is the special token
    ids = get_tokenizer().encode_ordinary(text)
    for tokenizer in tokenizers:
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


def test_the_end_of_a_text_is_one_token(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256 and len(tokenizer) == 50257
    assert tokenizers[0].model_max_length == 64


def test_it_comes_back_bit_for_bit(folder, model):
    back = load_model(str(folder))
    assert back.config == GPTConfig(64, 50257, 2, 4, 32) and back.lm_head.weight is back.transformer.wte.weight
    for name, weight in model.state_dict().items():
        found = back.state_dict()[name]
        assert torch.equal(found, weight[:50257] if weight.size(0) == 50304 else weight), name


def test_a_run_starts_from_the_folder(folder, tmp_path):
    write_shards(tmp_path / "data", [1500, 5000])
    shape = dict(sequence_length=64, total_batch_size=256, micro_batch_size=4, max_steps=1, val_tokens=1000)
    off = dict(hellaswag_every=0, sample_every=0, plot_every=0, checkpoint_every=0, device="cpu")
    for name, start in (("export", folder), ("checkpoint", folder.parent / "model_00012.pt")):
        folders = dict(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path / name))
        train_gpt2.main(TrainConfig(init_from=str(start), **folders, **shape, **off))
    # the 47 rows that pad the vocabulary take part in the loss: 0.1% of it all
    export, checkpoint = (losses(tmp_path / name, "val")[0] for name in ("export", "checkpoint"))
    assert export == pytest.approx(checkpoint, abs=0.01)


def test_a_mount_point_can_be_exported_to(checkpoint, folder, tmp_path):
    with disk(tmp_path / "mount", "64m"):
        export(str(checkpoint), str(tmp_path / "mount"))
        assert sorted(os.listdir(tmp_path / "mount")) == sorted(os.listdir(folder))


def test_the_model_card_says_what_is_known(checkpoint, folder):
    card = (folder / "README.md").read_text()
    for part in ("12 steps, 12,000 tokens, from scratch", "| 3.2500 nats per token |", "2 layers, 4 heads",
                 "| train_gpt2.py at commit abc1234 |",
                 "| export | compared with transformers: the same logits on 64 tokens"):  # fmt: skip
        assert part in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "{" not in card
    facts = export_hf.facts_of(load_checkpoint(checkpoint) | {"tokens": 9000, "commit": "abc1+changes.0a1b"})
    assert facts["training"] == "12 steps, 9,000 tokens, from scratch"
    assert facts["code"] == "train_gpt2.py at commit abc1 with uncommitted changes 0a1b"


def test_llama_cpp_finds_what_its_converter_reads(folder):
    config = json.loads((folder / "config.json").read_text())
    names = ("n_ctx", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
    assert [config[name] for name in names] == [64, 32, 2, 4, 1e-5] and config["architectures"] == ["GPT2LMHeadModel"]


def test_everyone_may_read_what_the_umask_allows(folder):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o666 & ~umask()}


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_in_the_way_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("text")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="name a new folder, or delete it"):
            export(str(checkpoint), str(target))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export(str(checkpoint), str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").exists() and not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path):
    contents = torch.load(checkpoint)
    small = GPT(GPTConfig(8, 512, 1, 1, 8))
    wide, small = {**contents["config"], "n_embd": 64}, {"model": small.state_dict(), "config": asdict(small.config)}
    for change, message in (({"config": wide}, "does not match its config"), (small, "of 512: .* 50257 are needed")):
        write_checkpoint(tmp_path / "other.pt", {**contents, **change})
        with pytest.raises(UserError, match=message):
            export(str(tmp_path / "other.pt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def copy_with(folder, target, **changes):
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    "changes, message",
    [({"activation_function": "relu"}, "activation_function relu, not gelu_new"), ({"n_layer": 3}, "does not match"),
     ({"model_type": "llama"}, "model_type llama, not gpt2"), ({"n_head": 5}, "32 channels for 5 heads"),
     ({"n_head": -4}, "32 channels for -4 heads"), ({"n_embd": "wide"}, "n_embd is 'wide': it must be int"),
     ({"n_embd": 10**9}, "does not match"), ({"n_layer": 10**9}, "29 weights")],
)  # fmt: skip
def test_another_model_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(str(copy_with(folder, tmp_path / "other", **changes)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files_are_named(folder, tmp_path, name):
    path = copy_with(folder, tmp_path / "damaged") / name
    for content in (b"", bytes(100), b"[]", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .*damaged/{name}: "):
            load_model(str(path.parent))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_weights_for_another_tokenizer_are_refused_by_name(folder, tmp_path, name):
    target = copy_with(folder, tmp_path / "german")
    vocab = json.loads((folder / "vocab.json").read_text())
    for change in ({}, {"<pad>": 50257}, {"the": vocab["\u0120the"], "\u0120the": vocab["the"]}):
        found = {**vocab, **change}
        (target / name).write_text(json.dumps({"model": {"vocab": found}} if name == "tokenizer.json" else found))
        if "the" not in change:
            load_model(str(target))
    with pytest.raises(UserError, match=f"{name} is not GPT-2's tokenizer"):
        load_model(str(target))
    with pytest.raises(UserError, match=f"{name} is not GPT-2's tokenizer"):
        import_model(target / "model.safetensors", tmp_path / "out")


def test_weights_in_other_files_load_or_say_what_helps(folder, model, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    wte = weights.pop("transformer.wte.weight")
    target = copy_with(folder, tmp_path / "other")
    save_file({**weights, "lm_head.weight": wte}, target / "model.safetensors")  # as save_model leaves a tied pair
    assert torch.equal(load_model(str(target)).transformer.wte.weight, wte)
    (target / "model.safetensors").unlink()
    save_file(weights, target / "model-00001-of-00002.safetensors")
    save_file({"transformer.wte.weight": wte}, target / "model-00002-of-00002.safetensors")
    assert torch.equal(load_model(str(target)).transformer.wte.weight, wte)
    for path in target.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="it has no weights"):
        load_model(str(target))
    torch.save({**weights, "transformer.wte.weight": wte}, target / "pytorch_model.bin")
    assert torch.equal(load_model(str(target)).lm_head.weight, wte)


def test_openais_own_files_are_read(folder, tmp_path):
    """The repository of GPT-2 on the hub: names without a prefix, the causal masks among the weights."""
    from safetensors.torch import load_file, save_file

    target = copy_with(folder, tmp_path / "downloaded")
    weights = load_file(target / "model.safetensors")
    theirs = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file({**theirs, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, target / "model.safetensors")
    a, b = (read_folder(path)[1] for path in (folder, target))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_with_a_head_of_its_own_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    target = copy_with(folder, tmp_path / "untied")
    weights = load_file(target / "model.safetensors")
    wte = weights["transformer.wte.weight"]
    for head, message in ((wte.clone(), None), (wte + 0.1, "lm_head.weight differs from transformer.wte.weight")):
        save_file({**weights, "lm_head.weight": head}, target / "model.safetensors")
        if message:
            with pytest.raises(UserError, match=message):
                load_model(str(target))
        else:
            assert torch.equal(load_model(str(target)).lm_head.weight, wte)


def test_a_checkpoint_is_of_its_script(tmp_path):
    """train_relu.py, a copy with another activation: tools use it, and no export of it is certified."""
    copy_scripts(tmp_path)
    text = (tmp_path / "train_gpt2.py").read_text()
    relu, count = re.subn(r'F\.gelu\((.*), approximate="tanh"\)', r"F.relu(\1)", text)
    assert count == 1
    (tmp_path / "train_relu.py").write_text(relu)
    write_shards(tmp_path / "data", [1500, 5000])
    result = run_warm(PROBES / "scripts.py", *FLAGS, "--max_steps=2", "--vocab_size=50304", folder=tmp_path)
    assert result.returncode == 0, result.stdout


def test_weights_that_gpt2_does_not_have_are_refused(checkpoint, tmp_path):
    model = GPT(GPTConfig(8, 50304, 1, 1, 8))
    model.transformer["h"][0].ln_3 = torch.nn.LayerNorm(8)
    with pytest.raises(
        UserError, match=r"no longer GPT-2: additional or missing weights, transformer\.h\.0\.ln_3\.bias"
    ):
        write_folder(tmp_path / "out", model, {})
    model = GPT(GPTConfig(8, 50304, 1, 1, 8))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
    with pytest.raises(UserError, match=r"no longer GPT-2: its head, lm_head\.weight, differs from its embedding"):
        write_folder(tmp_path / "out", model, {})
    assert not list(tmp_path.iterdir())


def test_a_model_with_more_settings_is_compared_or_refused(tmp_path, monkeypatch):
    @dataclass
    class Config(GPTConfig):
        activation: str = "gelu"

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="a model with activation is GPT-2, pip install transformers"):
        write_folder(tmp_path / "out", GPT(Config(8, 50304, 1, 1, 8)), {})
    assert not list(tmp_path.iterdir())


def test_it_says_whether_it_was_compared(checkpoint, tmp_path, capsys, monkeypatch):
    export(checkpoint, tmp_path / "a")
    assert re.search(
        r"compared with transformers: the same logits on 64 tokens, within \S+e-\d\d", capsys.readouterr().out
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    export(checkpoint, tmp_path / "b")
    assert "not compared with transformers, which is not installed" in capsys.readouterr().out


def test_a_log_dir_is_its_newest_checkpoint_and_any_other_folder_is_refused(checkpoint, folder, tmp_path):
    with pytest.raises(UserError, match="exported: .*Is a directory"):
        export(folder, tmp_path / "out")
    export(checkpoint.parent, tmp_path / "out")  # a log_dir: its newest checkpoint
    assert (tmp_path / "out" / "config.json").exists()
