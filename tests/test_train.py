import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from support import (
    PROBES,
    ROOT,
    TINY,
    command_of,
    environment,
    flags_of,
    load,
    losses,
    make_items,
    read_log,
    run,
    run_warm,
    write_shards,
)

import train_gpt2
from lib.console import UserError
from train_gpt2 import TrainConfig, main, parse_args

HAS_COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()


def test_a_run_leaves_its_log_and_checkpoints(tiny, tmp_path, capsys):
    metrics = main(tiny(max_steps=21, keep_checkpoints=2))
    log = read_log(tmp_path / "log")
    record = r"\d+ (train \d+\.\d{6}|val \d+\.\d{4}|lr \d\.\d{4}e-\d\d|norm \d+\.\d{4})"
    assert all(re.fullmatch(record, line) for line in log.splitlines())
    train, val = losses(tmp_path / "log", "train"), losses(tmp_path / "log", "val")
    assert list(train) == list(range(21)) and list(val) == [0, 5, 10, 15, 20, 21]  # the weights of the last update too
    assert val[21] < val[0] - 1 and metrics["step"] == 21 and abs(metrics["val_loss"] - val[21]) < 1e-4
    assert sorted(p.name for p in (tmp_path / "log").glob("*.pt")) == ["model_00020.pt", "model_00021.pt"]
    checkpoint = load(tmp_path / "log" / "model_00021.pt")
    assert checkpoint["step"] == 21 and checkpoint["val_loss"] == metrics["val_loss"]
    assert checkpoint["config"]["n_layer"] == 2 and checkpoint["train_config"]["max_steps"] == 21
    assert {"model", "optimizer", "tokens"} <= set(checkpoint)
    model = train_gpt2.load_model(str(tmp_path / "log" / "model_00021.pt"))
    loader = train_gpt2.DataLoaderLite(4, 32, 0, 1, "val", data_root=tmp_path / "data")
    val_loss = train_gpt2.evaluate_loss(model, loader, 31, torch.device("cpu"))
    assert val_loss == pytest.approx(metrics["val_loss"], abs=1e-5)
    out = capsys.readouterr().out
    assert re.search(r"step +20/21 \| loss .* \| lr .* \| norm .* \| .* ms \| .* tok/s", out)


def test_the_console_shows_a_line_every_so_often_and_log_txt_every_step(tiny, tmp_path, capsys):
    main(tiny(log_every=8))
    shown = re.findall(r"^step +(\d+)/20 \| loss", capsys.readouterr().out, re.M)
    assert shown == ["0", "8", "16"] and list(losses(tmp_path / "log", "train")) == list(range(20))


def test_the_same_seed_gives_the_same_log_bit_for_bit(tiny, tmp_path):
    for name in "ab":
        main(tiny(log_dir=str(tmp_path / name)))
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    main(tiny(log_dir=str(tmp_path / "c"), seed=1))
    assert read_log(tmp_path / "a") != read_log(tmp_path / "c")


def test_micro_batch_size_changes_nothing(tiny, tmp_path):
    for size in (1, 64):  # a step has 16 sequences: 64 are taken as 16
        main(tiny(log_dir=str(tmp_path / str(size)), micro_batch_size=size))
    for kind in ("train", "val"):
        small, large = (losses(tmp_path / d, kind) for d in ("1", "64"))
        assert small == pytest.approx(large, abs=1e-4 if kind == "val" else 1e-5)


def test_two_ranks_equal_one(tiny, tmp_path):
    few = 29 * 32  # tokens of validation: in the last batch, rank 0 has one sequence and rank 1 none
    main(tiny(log_dir=str(tmp_path / "one"), micro_batch_size=4, val_tokens=few))
    config = tiny(log_dir=str(tmp_path / "two"), micro_batch_size=2, val_tokens=few)  # 4 micro-batches on each rank
    result = run_warm("train_gpt2.py", *flags_of(config), ranks=2)
    assert result.returncode == 0, result.stdout
    for kind, count, tolerance in (("train", 20, 1e-5), ("val", 5, 1.01e-4)):
        one, two = (losses(tmp_path / d, kind) for d in ("one", "two"))
        assert len(one) == count and two == pytest.approx(one, abs=tolerance)
    a, b = (load(tmp_path / d / "model_00020.pt")["model"] for d in ("one", "two"))
    for key in a:
        difference = (a[key] - b[key]).abs()
        if key.endswith(
            "c_attn.bias"
        ):  # softmax does not see the keys': their gradients are rounding, made large by Adam
            difference[32:64] = 0
        assert difference.max() < 1e-4, key
    assert "Warning" not in result.stdout and "destroy_process_group" not in result.stdout


def test_gradients_are_equal_on_both_ranks_and_synchronized_once_a_step(tiny, tmp_path):
    result = run_warm(PROBES / "synchronization.py", *flags_of(tiny()), ranks=2)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("group left True, steps checked 20") == 2


def test_the_gradients_lie_in_the_buckets_of_ddp_and_nowhere_else(tiny):
    result = run_warm(PROBES / "gradient_storage.py", *flags_of(tiny(max_steps=3)), ranks=2)
    assert result.returncode == 0 and result.stdout.count("outside 0 bytes, kept 28 of 28") == 6, result.stdout


def test_token_ids_are_checked_by_the_model_that_is_trained_on_them(tiny, tmp_path):
    main(tiny(vocab_size=50257, n_layer=1, max_steps=1, val_every=0))
    path = tmp_path / "data" / "tiny_train_000003.npy"
    tokens = np.load(path)
    tokens[-200:] = 50260  # below the vocab_size of a run by default
    np.save(path, tokens)
    start = dict(init_from=str(tmp_path / "log" / "model_00001.pt"), log_dir=str(tmp_path / "tuned"))
    with pytest.raises(UserError, match=r"token id 50260 at offset \d+, not below vocab_size 50257"):
        main(tiny(vocab_size=50304, max_steps=30, val_every=0, **start))


def test_shards_of_another_program_are_not_built_anew(tiny, tmp_path, capfd):
    assert main(tiny(data_source="demo", max_steps=1))["step"] == 1
    assert "building it" not in capfd.readouterr().out
    with pytest.raises(UserError, match="no .*_train_.* shards in /"):
        main(tiny(data_dir="", log_dir=str(tmp_path / "other")))  # --data_dir $UNSET


def test_bfloat16_and_compile_off_by_default_on_cpu(tiny, tmp_path, capsys):
    main(tiny(dtype="bfloat16"))
    assert "bfloat16, compile off" in capsys.readouterr().out
    assert losses(tmp_path / "log", "val")[20] < 5.5


def test_flags_override_the_preset_and_the_preset_the_defaults():
    assert parse_args([]) == TrainConfig()
    config = parse_args(["--preset", "demo", "--max_steps", "7", "--no-compile"])
    assert (config.n_embd, config.max_steps, config.compile, config.vocab_size) == (48, 7, False, 50304)
    assert parse_args(["--preset", "gpt2-xl"]).n_layer == 48


REFUSALS = {
    "n_embd 32 is not divisible by n_head 3: choose a multiple": ["--n_head=3"],
    "give another micro_batch_size, or --total_batch_size 480": ["--micro_batch_size=5"],
    "give another micro_batch_size, or --total_batch_size 512": ["--total_batch_size=500"],
    "n_layer is 0: it must be 1 or more": ["--n_layer=0"],
    "dtype is 'int8': it must be one of auto": ["--dtype=int8"],
    "device is cuda, but": ["--device=cuda"],
    "device is mps, but": ["--device=mps"],
    "is not a file and none of scratch": ["--init_from=gpt5"],
    "was not written by this trainer": [f"--init_from={ROOT / 'README.md'}"],
    "give at least that many, or --sample_every 0": ["--sample_every=5"],
    "keep_checkpoints is 1": ["--keep_checkpoints=1"],
    "python fineweb.py": ["--data_dir=nowhere"],
    "too few for one step": ["--total_batch_size=32768"],
    "not below vocab_size 300": ["--vocab_size=300"],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_name_the_remedy_and_write_nothing(message, tiny, tmp_path):
    if message.startswith("device is") and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("this machine has a GPU")
    config = parse_args([*flags_of(tiny()), *REFUSALS[message]])
    with pytest.raises(UserError) as error:
        main(config)
    assert message in str(error.value)
    assert {path.name for path in tmp_path.glob("log/*")} <= {"lock", "config.json"}


def test_the_front_door_exits_with_2_and_no_traceback(tiny, tmp_path):
    result = run("train_gpt2.py", *flags_of(tiny(), n_head=3))
    assert result.returncode == 2 and result.stdout.startswith("error: n_embd") and "Traceback" not in result.stdout
    for flag in ("--preset=gpt3", "--max_step=3"):
        with pytest.raises(SystemExit) as exit:
            parse_args([flag])
        assert exit.value.code == 2
    result = run_warm("train_gpt2.py", *flags_of(tiny(), data_dir=str(tmp_path / "nowhere")), ranks=2)
    assert result.returncode == 2 and "error: no *_train_*.npy shards" in result.stdout
    assert not (tmp_path / "log").exists()


def test_a_log_dir_that_holds_a_run_is_refused(tiny, tmp_path):
    main(tiny(max_steps=1))
    before = read_log(tmp_path / "log")
    with pytest.raises(UserError, match="--init_from resume"):
        main(tiny(max_steps=1))
    assert read_log(tmp_path / "log") == before


def test_unfinished_shards_are_refused(tiny, tmp_path):
    (tmp_path / "data" / "manifest.json").write_text('{"complete": false}')
    with pytest.raises(UserError, match="unfinished"):
        main(tiny())


def test_missing_hellaswag_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    import hellaswag

    write_shards(tmp_path / "data", [1500, 5000])
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/{split}")
    config = TrainConfig(**{**TINY, "vocab_size": 50304, "hellaswag_every": 1, "max_steps": 2,
                            "data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "log")})  # fmt: skip
    main(config)
    out = capsys.readouterr().out
    assert out.count("continuing without HellaSwag: cannot fetch") == 1 and "saved" in out


def test_hellaswag_and_samples_during_training(tmp_path, monkeypatch, capsys):
    import hellaswag

    write_shards(tmp_path / "data", [1500, 5000])
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(json.dumps(item) + "\n" for item in make_items(9)))
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path)
    monkeypatch.setattr(hellaswag, "SHA256", {})  # not the published file
    config = TrainConfig(**{**TINY, "vocab_size": 50304, "sequence_length": 128, "hellaswag_every": 2, "max_steps": 3,
                            "sample_every": 3, "data_dir": str(tmp_path / "data"),
                            "log_dir": str(tmp_path / "log")})  # fmt: skip
    metrics = main(config)
    hella = losses(tmp_path / "log", "hella")
    assert list(hella) == [0, 2, 3] and hella[3] == pytest.approx(metrics["hella"], abs=1e-4)
    out = capsys.readouterr().out
    assert len(re.findall(r"step +3 \| sample", out)) == 3 and not re.search(r"step +0 \| sample", out)


@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler and Python's headers on CPU")
@pytest.mark.timeout(600)
def test_compile_stays_on_and_nothing_recompiles_after_step_0(tmp_path):
    write_shards(tmp_path / "data", [1500, 5000])
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(json.dumps(item) + "\n" for item in make_items(9)))
    settings = {**TINY, "vocab_size": 50304, "n_layer": 1, "sequence_length": 128, "micro_batch_size": 2,
                "max_steps": 5, "hellaswag_every": 2, "val_every": 2, "sample_every": 2,
                "data_dir": str(tmp_path / "data")}  # fmt: skip
    env = {"TORCH_LOGS": "recompiles", "HELLASWAG_FOLDER": str(tmp_path)}
    for name, flag, start in (("plain", "--no-compile", run_warm), ("compiled", "--compile", run)):
        flags = flags_of(TrainConfig(**settings, log_dir=str(tmp_path / name)))
        result = start(PROBES / "hellaswag_at.py", *flags, flag, env=env, timeout=280)
        assert result.returncode == 0, result.stdout
    before, after = re.split(r"step +0/5 ", result.stdout)
    assert "compile on" in before and "Recompiling" not in after
    assert "idx is targets" not in before and "stride mismatch" not in before  # what the rehearsal compiled is used
    assert after.count("| HellaSwag") == after.count("val loss") == 3 and after.count("| sample") == 9
    for kind, tolerance in (("train", 1e-4), ("val", 2e-4), ("hella", 0)):
        plain, compiled = (losses(tmp_path / name, kind) for name in ("plain", "compiled"))
        assert compiled == pytest.approx(plain, abs=tolerance)


@pytest.mark.by_hand
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler and Python's headers on CPU")
@pytest.mark.timeout(600)
def test_a_user_id_without_an_account_trains_compiled(tiny, tmp_path):
    """As in a container that was started with --user 54321."""
    stranger = ["unshare", "--user", "--map-user=54321"]
    if not shutil.which("unshare") or subprocess.run([*stranger, "true"], capture_output=True).returncode:
        pytest.skip("it takes user namespaces")
    command = command_of("train_gpt2.py", *flags_of(tiny(n_layer=1, max_steps=2, val_every=0)), "--compile")
    env = {name: value for name, value in environment().items() if name not in ("HOME", "USER", "LOGNAME", "LNAME")}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run([*stranger, *command], env={**env, "TMPDIR": str(tmp_path)}, **output)
    assert result.returncode == 0 and "compile on" in result.stdout, result.stdout
    assert list(losses(tmp_path / "log", "train")) == [0, 1]


def test_importing_touches_nothing(tmp_path):
    result = run(PROBES / "imports.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
