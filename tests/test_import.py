"""A model from another program computes here what it computed there, or is refused in words; no code of its runs."""

import importlib.util
import json
import os
import shutil
import sys

import pytest
import torch
from support import PROBES, losses, run_warm, write_shards

from lib.checkpoint import load_checkpoint, write_checkpoint
from lib.console import UserError
from tools.import_model import import_model
from train_gpt2 import TrainConfig, load_model, main

spec = importlib.util.spec_from_file_location("foreign_files", PROBES / "foreign_files.py")
foreign_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(foreign_files)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of other programs, by one that has classes of the same names."""
    folder = tmp_path_factory.mktemp("files")
    result = run_warm(PROBES / "foreign_files.py", folder)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    """The comparison with it has its tests among those of the export, and the tokenizer's files have theirs there."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("tools.export_hf.write_tokenizer", lambda folder, context: None)


@torch.no_grad()
def logits_of(model):
    idx = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(1))
    return model(idx)[0][:, :, :50257]


NO_HEADS = ["bare.pt", "legacy.pt", "half.pt", "hugging_face.pt", "hugging_face.safetensors", "headless.safetensors"]
WITH_HEADS = ["tutorial.pt", "nanogpt.pt", "nanogpt_no_bias.pt", "ddp.pt"]


@pytest.mark.parametrize("name", NO_HEADS + WITH_HEADS)
def test_an_imported_model_computes_the_same(name, files, tmp_path):
    import_model(files / name, tmp_path / "out", 4 if name in NO_HEADS else None)
    back = load_model(str(tmp_path / "out"))
    assert (back.config.n_head, back.config.block_size, back.config.vocab_size) == (4, 16, 50257)
    difference = (logits_of(back) - logits_of(foreign_files.model(bias="no_bias" not in name))).abs().max()
    assert difference < (0.02 if name == "half.pt" else 1e-5)


@pytest.mark.parametrize("name", NO_HEADS)
def test_the_number_of_heads_is_never_guessed(name, files, tmp_path):
    with pytest.raises(UserError, match=f"{name} does not say how many heads .* give --n_head"):
        import_model(files / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "whole.pt": "loading it would run code: __main__.GPT. Save plain data in the program that made it",
    "untied.pt": "lm_head.weight differs from transformer.wte.weight, but this code ties them",
    "relu.pt": "fields that this code does not know.* activation='relu'",
    "relu_dict.pt": "fields that this code does not know.* activation='relu'",
    "relu_flag.pt": "fields that this code does not know.* use_relu=True",
    "relu_flag_dict.pt": "fields that this code does not know.* use_relu=True",
    "contradiction.pt": "has n_layer 3, not 2",
    "odd_heads.pt": "16 channels for 3 heads",
    "rotary.pt": "no matrix transformer.wpe.weight",
    "extra.pt": r"transformer.h.0.ln_3.weight",
    "lost_bias.pt": r"transformer.h.1.ln_1.bias",
    "letters.pt": "a vocab_size of 65: .* 50257 are needed",
    "other.pt": "no matrix transformer.wte.weight",
    "list.pt": "cannot read .*: TypeError: 'list' object is not a mapping",
    "mixed.pt": "step is not a tensor but of type int",
    "zip.pt": "cannot read .*: RuntimeError",
    "diverged.pt": "NaN or infinite values in transformer.h.1.mlp.c_fc.bias",
    "cut.pt": "cannot read .*cut.pt: RuntimeError",
    "cut.safetensors": "cannot read .*: SafetensorError",
    "text.pt": "cannot read .*: UnpicklingError: Unsupported operand",
    "empty.pt": "cannot read .*: EOFError",
    "weights.gguf": "cannot read .*: UnpicklingError",
    "model.safetensors.index.json": "give its folder",
    "nowhere.pt": "No such file",
    "": "needs no import",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_be_no_gpt2_is_refused(name, files, tmp_path):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        import_model(files / name, tmp_path / "out")
    assert str(files / name) in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to switch its protection off
    assert not (tmp_path / "out").exists()


def test_every_file_has_a_test(files):
    assert {*NO_HEADS, *WITH_HEADS, *REFUSED} - {"nowhere.pt", ""} == {path.name for path in files.iterdir()}


def test_code_in_a_file_does_not_run(tmp_path):
    class GPTConfig:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": foreign_files.model().state_dict(), "config": GPTConfig()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"would run code: posix\.mkdir"):
        import_model(tmp_path / "bomb.pt", tmp_path / "out", 4)
    assert not (tmp_path / "ran").exists()


def test_the_config_beside_a_download_says_its_heads_or_that_it_is_another_model(files, tmp_path):
    shutil.copy(files / "headless.safetensors", tmp_path / "model.safetensors")
    shutil.copy(files / "hugging_face.pt", tmp_path / "pytorch_model.bin")
    config = {"model_type": "gpt2", "n_head": 4, "n_layer": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 50304}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "pytorch_model.bin"):
        import_model(tmp_path / name, tmp_path / f"from {name}")
        assert load_model(str(tmp_path / f"from {name}")).config.n_head == 4
        with pytest.raises(UserError, match="the config of .* has n_head 4, not 2"):
            import_model(tmp_path / name, tmp_path / "out", 2)
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(UserError, match="activation_function relu, not gelu_new"):
        import_model(tmp_path / "model.safetensors", tmp_path / "out")


def test_the_program_says_what_differs_and_the_folder_goes_where_a_checkpoint_does(files, tmp_path):
    folder = tmp_path / "out"
    result = run_warm("tools/import_model.py", files / "nanogpt_no_bias.pt", folder)
    assert result.returncode == 0, result.stdout
    for part in ("not imported: optimizer, iter_num, best_val_loss, config", "exact GELU", "they are zeros",
                 "47 rows of the embedding", "compared with transformers: the same logits on 16 tokens"):  # fmt: skip
        assert part in result.stdout, result.stdout
    card = (folder / "README.md").read_text()
    assert "| imported from | nanogpt_no_bias.pt |" in card and "| export | compared with transformers" in card
    write_shards(tmp_path / "data", [1500, 5000])
    shape = dict(sequence_length=16, total_batch_size=64, micro_batch_size=4, max_steps=1, val_tokens=500, device="cpu")
    off = dict(hellaswag_every=0, sample_every=0, plot_every=0, checkpoint_every=0, data_dir=str(tmp_path / "data"))
    main(TrainConfig(init_from=str(folder), log_dir=str(tmp_path / "log"), **shape, **off))
    assert losses(tmp_path / "log", "val")[0] > 0


def test_a_run_of_another_program_is_sent_to_the_import(files, tiny, tmp_path, capsys):
    path = tmp_path / "their log" / "model_00250.pt"
    path.parent.mkdir()
    (path.parent / "log.txt").write_text("0 val 10.9\n250 val 3.25\n")
    shutil.copy(files / "tutorial.pt", path)
    resume = tiny(init_from="resume", log_dir=str(path.parent))
    with pytest.raises(UserError, match=f"python -m tools.import_model '{path}' FOLDER"):
        main(tiny(init_from=str(path), log_dir=str(tmp_path / "new")))
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        main(resume)
    assert f"python -m tools.import_model '{path}' FOLDER" in capsys.readouterr().out
    assert sorted(file.name for file in path.parent.iterdir() if file.name != "lock") == ["log.txt", "model_00250.pt"]


def test_only_a_wrong_digest_is_called_damage(files, tmp_path):
    contents = {"model": {}, "optimizer": {}, "config": {}, "train_config": {}, "step": 1}
    write_checkpoint(tmp_path / "ours.pt", contents)
    whole = (tmp_path / "ours.pt").read_bytes()
    foreign = "is truncated, or was not written by this trainer: .* import it with python -m tools.import_model"
    for content, message in (
        ((files / "tutorial.pt").read_bytes(), foreign),
        (whole[:-1], foreign),
        (whole[: len(whole) // 2], foreign),
        (b"", foreign),
        (whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "is damaged: its sha256 does not match"),
        (whole[:-1] + (b"0" if whole[-1:] != b"0" else b"1"), "is damaged: its sha256 does not match"),
    ):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / "other.pt")


def test_the_tutorials_code_can_load_our_weights(tiny, tmp_path):
    """torch.load(path, weights_only=True)["model"] has the names and shapes of its GPT, but for its masks."""
    main(tiny(max_steps=1, checkpoint_every=1))
    weights = torch.load(tmp_path / "log" / "model_00001.pt", weights_only=True)["model"]
    C, V, T = 32, 512, 32
    expected = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "lm_head.weight": (V, C)}
    for i in range(2):
        for name, shape in {
            "ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (4 * C, C),
            "mlp.c_proj": (C, 4 * C),
        }.items():  # fmt: skip
            expected[f"transformer.h.{i}.{name}.weight"] = shape
            expected[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    expected |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected
    assert all(weight.dtype == torch.float32 for weight in weights.values())
