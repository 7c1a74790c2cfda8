"""What a person's own changes meet: other optimizers, other configs, other records, other code, loops around runs."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support import ROOT, assert_same_run, at_step, crash, environment, finish, losses, read_log, run_warm, write_shards
from test_hacking import FLAGS, copy_scripts

import train_gpt2
from lib.checkpoint import load_checkpoint, write_checkpoint
from lib.console import Stopped, UserError
from train_gpt2 import GPT, GPTConfig, TrainConfig, main

# -----------------------------------------------------------------------------
# Optimizers


def sgd_and_adamw(model, weight_decay, learning_rate, device_type):
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return [torch.optim.SGD(matrices, 10 * learning_rate, momentum=0.9), torch.optim.AdamW(others, learning_rate)]


OPTIMIZERS = {
    "SGD with momentum": lambda model, decay, lr, _: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
    "plain SGD": lambda model, decay, lr, _: torch.optim.SGD(model.parameters(), lr),
    "Adagrad": lambda model, decay, lr, _: torch.optim.Adagrad(model.parameters(), lr),
    "amsgrad": lambda model, decay, lr, _: torch.optim.AdamW(model.parameters(), lr, amsgrad=True, fused=True),
    "RMSprop": lambda model, decay, lr, _: torch.optim.RMSprop(model.parameters(), lr, centered=True),
    "Adafactor": lambda model, decay, lr, _: torch.optim.Adafactor(model.parameters(), lr),
    "two of them": sgd_and_adamw,
}


def assert_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, **settings):
    config = dict(max_steps=12, checkpoint_every=4, **settings)
    main(tiny(log_dir=str(tmp_path / "whole"), **config))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_step(patch, {6}, crash)
        main(tiny(**config))
    main(tiny(init_from="resume", **config))
    assert_same_run(tmp_path / "whole", tmp_path / "log", 12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_with_whatever_optimizer_it_has(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "configure_optimizers", OPTIMIZERS[name])
    assert_resumes_bit_for_bit(tiny, tmp_path, monkeypatch)


@pytest.mark.parametrize("optimizers", [GPT.configure_optimizers, sgd_and_adamw])
def test_a_run_resumes_in_float16_with_its_scaler(optimizers, tiny, tmp_path, monkeypatch):
    """Which lowers the scale of the loss in the first steps."""
    monkeypatch.setattr(GPT, "configure_optimizers", optimizers)
    assert_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, dtype="float16")


def test_a_checkpoint_of_another_optimizer_is_refused_with_the_way_on(tiny, tmp_path, monkeypatch):
    main(tiny(max_steps=4))
    monkeypatch.setattr(GPT, "configure_optimizers", OPTIMIZERS["SGD with momentum"])
    with pytest.raises(
        UserError, match="cannot resume: the checkpoint's optimizer does not match .*start a new run: --init_from"
    ):
        main(tiny(init_from="resume"))
    main(tiny(init_from=str(tmp_path / "log" / "model_00004.pt"), log_dir=str(tmp_path / "new"), max_steps=2))


def test_parameter_groups_keep_the_ratio_of_their_rates(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "configure_optimizers", sgd_and_adamw)
    main(tiny(max_steps=3, val_every=0))
    rate = float(re.findall(r"^2 lr (\S+)$", read_log(tmp_path / "log"), re.M)[0])
    parts = load_checkpoint(tmp_path / "log" / "model_00003.pt")["optimizer"]["optimizers"]
    assert [part["param_groups"][0]["lr"] for part in parts] == pytest.approx([10 * rate, rate], rel=1e-4)


def test_settings_changed_in_the_code_of_the_optimizer_are_taken_and_said(tiny, tmp_path, monkeypatch, capsys):
    def optimizer(betas):
        return lambda model, decay, lr, _: torch.optim.AdamW(model.parameters(), lr, betas=betas)

    monkeypatch.setattr(GPT, "configure_optimizers", optimizer((0.9, 0.95)))
    main(tiny(max_steps=4))
    monkeypatch.setattr(GPT, "configure_optimizers", optimizer((0.9, 0.99)))
    main(tiny(max_steps=6, init_from="resume"))
    assert "betas of parameter group 0 (0.9, 0.95) -> (0.9, 0.99)" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "log" / "model_00006.pt")["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


# -----------------------------------------------------------------------------
# Checkpoints of other code


def test_a_checkpoint_of_november_2026_resumes_to_the_same_losses(tmp_path, capsys):
    """tests/data/ holds one, made before log.txt had records of the learning rate and runs had names for their code."""
    write_shards(tmp_path / "data", [500, 3000], vocab_size=64)
    (tmp_path / "log").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "model_00006.pt", tmp_path / "log")
    before = (ROOT / "tests" / "data" / "log_of_model_00006.txt").read_text()
    (tmp_path / "log" / "log.txt").write_text(before)
    saved = load_checkpoint(tmp_path / "log" / "model_00006.pt")["train_config"]
    folders = {"data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "log"), "init_from": "resume"}
    torch.set_num_threads(1)
    known = {name: value for name, value in saved.items() if hasattr(TrainConfig, name)}  # some settings are gone since
    main(TrainConfig(**{**known, **folders, "val_every": 1}))  # of the whole split each, as it was
    assert "resuming at step 6" in capsys.readouterr().out
    log = [line for line in read_log(tmp_path / "log").splitlines() if "train" in line]
    assert log == [line for line in before.splitlines() if "train" in line]


def change_config(path, **fields):
    contents = load_checkpoint(path)
    contents["config"] = {name: value for name, value in {**contents["config"], **fields}.items() if value != "gone"}
    write_checkpoint(path, contents)


def test_configs_of_other_code_take_defaults_or_are_refused_by_name(tiny, tmp_path, capsys):
    main(tiny(max_steps=2))
    path = tmp_path / "log" / "model_00002.pt"
    change_config(path, block_size=32, dropout=0.0, rotary=False)
    model = train_gpt2.load_model(str(path))
    out = capsys.readouterr().out
    assert model.config == GPTConfig(32, 512, 2, 2, 32)
    assert "dropout is 0.0 in the checkpoint and ignored" in out and "rotary is False" in out
    change_config(path, rotary=True)
    with pytest.raises(
        UserError, match=r"has {'rotary': True} in its config, which this code's GPTConfig does not have"
    ):
        train_gpt2.load_model(str(path))
    change_config(path, rotary="gone", dropout="gone", n_head="gone")
    with pytest.raises(UserError, match="does not match|cannot be built"):  # 12 heads, the default, do not divide 32
        train_gpt2.load_model(str(path))


def test_two_matrices_that_the_code_ties_must_be_one(tiny, tmp_path):
    main(tiny(max_steps=2))
    contents = load_checkpoint(path := tmp_path / "log" / "model_00002.pt")
    contents["model"]["lm_head.weight"] = contents["model"]["lm_head.weight"] + 1
    write_checkpoint(path, contents)
    with pytest.raises(UserError, match="lm_head.weight differs from transformer.wte.weight, but this code ties them"):
        train_gpt2.load_model(str(path))


def test_a_resume_says_every_changed_setting_and_the_changed_code(tmp_path):
    copy_scripts(tmp_path)
    write_shards(tmp_path / "data", [1500, 5000])

    def run(*args):
        return run_warm(tmp_path / "train_gpt2.py", *FLAGS, "--log_every=6", *args, folder=tmp_path)

    def git(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", "*.py")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")[:7]
    assert run("--max_steps=4").returncode == 0
    script = tmp_path / "train_gpt2.py"
    script.write_text(script.read_text().replace("0.02)", "0.03)"))
    result = run("--init_from=resume", "--max_steps=6", "--val_tokens=64", "--micro_batch_size=2", "--log_every=3")
    line = re.search("resuming at step 4.*", result.stdout)[0]
    assert "max_steps 4 -> 6" in line and "val_tokens 100 -> 64" in line and "micro_batch_size 4 -> 2" in line
    assert "log_every" not in line and re.search(
        f"code {first} -> {first} with uncommitted changes [0-9a-f]{{7}}$", line
    )
    git("commit", "-qam", "second")
    result = run("--init_from=resume")
    assert re.search(f"code {first} with uncommitted .* -> {git('rev-parse', 'HEAD')[:7]}$", result.stdout, re.M)


# -----------------------------------------------------------------------------
# log.txt


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r\n with a mark and no last end"])
def test_records_of_other_kinds_stay_in_the_log_also_where_an_editor_rewrote_it(ends, tiny, tmp_path, capsys):
    main(tiny(max_steps=10))
    log = tmp_path / "log" / "log.txt"
    lines = log.read_text().splitlines()
    lines[7:7] = ["3 entropy 0.25", "3 note the rate was lowered here"]
    text = (
        ends[:2].strip(" ").join([*lines, "9 entropy 0.5"]) if ends[0] == "\r" else "\n".join([*lines, "9 entropy 0.5"])
    )
    log.write_bytes(b"\xef\xbb\xbf" * ("mark" in ends) + text.encode() + b"\r\n" * ("mark" not in ends))
    main(tiny(max_steps=12, init_from="resume"))
    now = log.read_text().splitlines()
    assert now[: len(lines)] == lines[:-1] + ["9 entropy 0.5"] or now[: len(lines)] == [*lines[:-1], "9 entropy 0.5"]
    assert losses(tmp_path / "log", "train").keys() == set(range(12))


def test_nothing_is_dropped_from_the_log_without_a_copy(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_step(patch, {17}, crash)
        main(tiny())
    before = read_log(tmp_path / "log").splitlines()
    main(tiny(init_from="resume"))
    dropped = (tmp_path / "log" / "log_dropped.txt").read_text().splitlines()
    assert dropped == [line for line in before if int(line.split()[0]) >= 10]


def test_weights_are_saved_though_the_log_cannot_be_written(tiny, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log" / "log.txt"

    def block():
        log.unlink()
        log.mkdir()

    at_step(monkeypatch, {7}, block)
    with pytest.raises(UserError, match="not all of log.txt"):
        main(tiny(max_steps=12))
    assert "log.txt CANNOT BE WRITTEN" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "log" / "model_00012.pt")["step"] == 12


# -----------------------------------------------------------------------------
# Loops around runs


def test_a_shell_loop_stops_where_its_run_was_stopped(tiny, tmp_path):
    write_shards(tmp_path / "data", [1500, 5000])
    flags = " ".join([*FLAGS, "--max_steps=1000000", f"--data_dir={tmp_path / 'data'}"])
    loop = f"for i in 1 2; do {sys.executable} {ROOT}/train_gpt2.py {flags} --log_dir=run$i; done; echo end of the loop"
    process = subprocess.Popen(
        ["bash", "-c", loop], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if re.match(r"step +3/", line):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the shell and to the run
    output = finish(process)
    assert "saved run1/" in output and "end of the loop" not in output and not (tmp_path / "run2").exists(), output
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_sweep_stops_where_its_run_was_stopped(number, error, tiny, tmp_path, monkeypatch):
    at_step(monkeypatch, {6}, lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(error) as stopped:
        main(tiny())
    assert isinstance(stopped.value, Stopped) and stopped.value.number == number
    assert (tmp_path / "log" / "model_00007.pt").exists() and signal.getsignal(number) == before


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again_as_it_began(tiny, tmp_path, monkeypatch, capsys):
    main(tiny(log_dir=str(tmp_path / "weights"), max_steps=8))
    begin = str(tmp_path / "weights" / "model_00008.pt")
    main(tiny(log_dir=str(tmp_path / "whole"), init_from=begin))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_step(patch, {5}, crash)
        main(tiny(init_from=begin))
    capsys.readouterr()
    main(tiny(init_from="resume"))
    assert f"no checkpoint in {tmp_path / 'log'}/ yet: starting at step 0, from {begin}" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "log", 20)
    assert load_checkpoint(tmp_path / "log" / "model_00020.pt")["train_config"]["init_from"] == begin


# -----------------------------------------------------------------------------
# The house


def test_the_rooms_of_lib_import_downwards_only():
    """Scripts import lib; the rooms data, run and model import the ground, and not each other; nothing imports up."""
    for path in ROOT.glob("lib/**/*.py"):
        room = path.relative_to(ROOT / "lib").parts[0]
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.M)
        names = {
            name for name in imported if name.split(".")[0] in ("lib", "tools", "train_gpt2", "fineweb", "hellaswag")
        }
        for name in names:
            assert name.startswith("lib."), f"{path} imports {name}"
            target = name.split(".")[1]
            assert target not in ("data", "run", "model") or target == room, f"{path} imports {name}"


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    copy_scripts(tmp_path)
    shutil.copy(ROOT / "train_gpt2.py", tmp_path / "mine.py")
    for script in (["train_gpt2.py"], ["mine.py"], ["-m", "tools.sample", "model"]):
        command, pipe = [sys.executable, "-X", "importtime", *script], subprocess.PIPE
        process = subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert any("lib.start" in line for line in process.stderr)  # then come numpy and torch
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT and "Traceback" not in err
