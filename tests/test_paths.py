"""Paths as people give them: with ~, that the system refuses, or on disks that cannot do everything."""

import os
import re
import tempfile
from pathlib import Path

import pytest
import safetensors.torch  # noqa: F401 - before a test becomes another user, who may not be able to read it
from matplotlib.figure import Figure  # noqa: F401
from support import losses, run_warm, write_shards

import fineweb
import train_gpt2
from lib.console import UserError
from tools import plot, sample
from tools.export_hf import export
from train_gpt2 import DataLoaderLite, load_model, main


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home folder, and an empty current folder beside it, where nothing may appear."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def test_a_run_from_python_expands_every_path(tiny, home):
    write_shards(home / "data", [1500, 5000])
    main(tiny(data_dir=Path("~/data"), log_dir=Path("~/log"), max_steps=1))
    main(tiny(data_dir="~/data", log_dir="~/tuned", init_from="~/log/model_00001.pt", max_steps=1))
    assert (home / "tuned" / "model_00001.pt").exists()
    assert losses(home / "tuned", "val")[0] == losses(home / "log", "val")[1]
    assert DataLoaderLite(2, 32, 0, 1, "train", data_root="~/data").next_batch()[0].shape == (2, 32)


def test_tools_expand_every_path(tiny, home, capsys):
    main(tiny(log_dir=str(home / "log"), max_steps=1, vocab_size=50257, n_layer=1))
    export("~/log/model_00001.pt", "~/exported")
    assert load_model("~/exported").config == load_model("~/log/model_00001.pt").config
    plot.main(["~/log", "~/log/log.txt", "--out=~/curve.png"])
    (home / "prompt.txt").write_text("a prompt\n")
    assert sample.read_prompt("FILE:~/prompt.txt") == "a prompt"
    assert {path.name for path in home.iterdir()} == {"log", "exported", "curve.png", "prompt.txt"}


def test_the_home_of_nobody_is_refused(tiny, home):
    with pytest.raises(UserError, match=r"no such user: write \./~no-such-user/log"):
        main(tiny(log_dir="~no-such-user/log"))


def draw_to(path):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "log.txt").write_text("0 val 9.0\n")
        plot.main([folder, "--tokens_per_step=1", "--out", str(path)])


def uses(tiny, checkpoint):
    """What takes a path, by name: functions of one."""
    return {
        "log_dir": lambda path: main(tiny(log_dir=str(path))),
        "init_from": lambda path: main(tiny(log_dir="never", init_from=str(path))),
        "load_model": load_model,
        "sample": lambda path: sample.model_to_sample(str(path), "cpu"),
        "prompt": lambda path: sample.read_prompt(f"FILE:{path}"),
        "plot": lambda path: plot.main([str(path)]),
        "plot --out": draw_to,
        "export_hf from": lambda path: export(path, "never"),
        "export_hf to": lambda path: export(checkpoint, path),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_shards(folder / "data", [1500, 5000])
    config = train_gpt2.TrainConfig(
        n_layer=1, n_head=1, n_embd=8, vocab_size=50257, sequence_length=32, total_batch_size=64, max_steps=1,
        val_every=0, hellaswag_every=0, sample_every=0, plot_every=0, device="cpu", data_dir=str(folder / "data"),
        log_dir=str(folder / "log"),
    )  # fmt: skip
    main(config)
    return folder / "log" / "model_00001.pt"


NAMES = list(uses(None, None))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "path, reason",
    [
        ("n" * 300, "File name too long"),
        ("file/below", "Not a directory|File exists"),
        ("loop/below", "symbolic links"),
    ],
)
def test_a_path_that_cannot_be_is_refused_in_a_line(name, path, reason, tiny, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file where a folder is expected")
    Path("loop").symlink_to("loop")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=reason):
        uses(tiny, checkpoint)[name](path)
    assert set(tmp_path.iterdir()) == before


@pytest.fixture
def forbidden(tmp_path):
    """A folder that this process can neither read nor write; root, whom nothing is forbidden, is another user then."""
    (tmp_path / "forbidden").mkdir(mode=0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield tmp_path / "forbidden"
    if root:
        os.seteuid(0)
    (tmp_path / "forbidden").chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "export_hf to"])
@pytest.mark.parametrize("path", ["", "below"])
def test_a_path_without_permission_is_refused_in_a_line(name, path, tiny, forbidden):
    with pytest.raises(UserError, match="Permission denied"):
        uses(tiny, None)[name](forbidden / path)


def test_a_run_and_its_resume_on_a_disk_that_syncs_no_folders(tiny, tmp_path):
    """They end as on any other disk, with one warning each, and old checkpoints are pruned."""
    config = tiny(max_steps=8, checkpoint_every=2, keep_checkpoints=2)
    flags = [f"--{name}={value}" for name, value in vars(config).items() if not isinstance(value, bool | None)]
    for steps in (8, 10):
        more = ["--init_from=resume", "--max_steps=10"] if steps == 10 else []
        result = run_warm("tests/probes/unsynced_folders.py", "train_gpt2.py", *flags, *more)
        assert result.returncode == 0 and result.stdout.count("cannot be synced (Invalid argument)") == 1, result.stdout
        saved = sorted(path.name for path in (tmp_path / "log").glob("*.pt"))
        assert saved == [f"model_{step:05d}.pt" for step in (steps - 2, steps)]
    assert list(losses(tmp_path / "log", "train")) == list(range(10))


def test_shards_are_built_on_a_disk_that_syncs_no_folders(tmp_path):
    (tmp_path / "text.txt").write_text("Roses are red, violets are blue. " * 100)
    flags = ("--source", tmp_path / "text.txt", "--out", tmp_path / "data", "--workers=1")
    result = run_warm("tests/probes/unsynced_folders.py", "fineweb.py", *flags)
    assert result.returncode == 0 and len(re.findall("cannot be synced", result.stdout)) == 1, result.stdout
    assert '"complete": true' in (tmp_path / "data" / "manifest.json").read_text()


def test_the_sync_of_a_file_stays_strict(tiny, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="could not be saved"):
        main(tiny(max_steps=1))


FOREIGN = {  # a file by name and content, where it is given, what the message says of it
    "train.bin": (bytes(64), "data", "nanoGPT's tokens"),
    "x_text_document.idx": (b"MMIDIDX\0\0", "data", "Megatron's tokens"),
    "data-00000-of-00001.arrow": (b"\xff\xff\xff\xff", "source", "load_from_disk"),
    "x_train_000001.bin": ((20240801).to_bytes(4, "little") + bytes(1020), "data", "Llama 3's tokens"),
    "model.gguf": (b"GGUF\3", "model", "llama.cpp's format"),
    "tf_model.h5": (b"\x89HDF\r\n", "model", "from_tf"),
    "flax_model.msgpack": (b"\x80", "model", "from_flax"),
    "adapter_config.json": (b"{}", "model", "LoRA"),
    "model.safetensors.index.json": (b"{}", "file", "give their folder"),
    "pytorch_model.bin": (b"version https://git-lfs.github.com/spec/v1\n", "model", "git lfs pull"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_recognized(name, tiny, tmp_path):
    content, where, message = FOREIGN[name]
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        if where == "data":
            main(tiny(data_dir=str(folder)))
        elif where == "source":
            fineweb.build(str(folder), tmp_path / "out")
        else:
            load_model(str(folder / name if where == "file" else folder))
