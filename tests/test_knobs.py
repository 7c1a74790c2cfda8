"""Settings as people give them: what is accepted, what is refused with a way out, and what is warned of."""

import re
import shlex
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from support import losses, read_log, run_warm, write_shards

from lib import config as knobs
from lib.console import UserError
from lib.model.load import OPENAI_MODELS
from train_gpt2 import TrainConfig, main, parse_args


@pytest.mark.parametrize("name", ["compile", "activation_checkpointing"])
@pytest.mark.parametrize(
    "flags, value",
    [
        ("--{}", True), ("--{}=true", True), ("--{}=True", True), ("--{} 1", True), ("--{}=yes", True),
        ("--no-{}", False), ("--{}=False", False), ("--{} false", False), ("--{}=0", False), ("--{}=off", False),
    ],
)  # fmt: skip
def test_a_switch_takes_true_and_false(name, flags, value):
    config = parse_args([*flags.format(name).split(), "--max_steps=3"])
    assert getattr(config, name) is value and config.max_steps == 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max-lr=1e-3", "--data-dir=my-data", "--no-compile"], None),
        (["--max_learning_rate=1"], "unknown flag --max_learning_rate"),
        (["--min-lr-ration=1"], "unknown flag --min_lr_ration, did you mean --min_lr_ratio?"),
        (["--local-rank=1"], "start with torchrun"),
    ],
)
def test_dashes_are_underscores_and_an_unknown_flag_has_a_short_answer(flags, words, capsys):
    if words:
        with pytest.raises(SystemExit):
            parse_args(flags)
        err = capsys.readouterr().err
        assert (words in err or "unrecognized" in err) and len(err.splitlines()) <= 3
    else:
        config = parse_args(flags)
        assert (config.max_lr, config.data_dir, config.compile) == (1e-3, "my-data", False)


def test_a_switch_that_is_neither_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--compile=maybe"])
    assert "'maybe' is not true or false; or give the flag alone, or begin it with --no-" in capsys.readouterr().err
    assert parse_args(["--compile=None"]).compile is None


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
@pytest.mark.parametrize("settings", [{}, dict(micro_batch_size=5), dict(total_batch_size=500, sequence_length=32)])
def test_a_batch_that_the_ranks_cannot_share_names_one_near_that_they_can(ranks, settings):
    config = TrainConfig(**settings)
    with pytest.raises(UserError, match=r"--total_batch_size \d+$") as error:
        knobs.check(config, ranks, OPENAI_MODELS)
    near = replace(config, total_batch_size=int(str(error.value).split()[-1]))
    knobs.check(near, ranks, OPENAI_MODELS)
    assert 0.75 <= near.total_batch_size / config.total_batch_size <= 1.25


@pytest.mark.parametrize("kilobytes", [1, 24])
def test_from_a_little_text_to_a_run(kilobytes, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("Roses are red, violets are blue. " * (kilobytes * 30))
    built = run_warm("fineweb.py", "--source", tmp_path / "text.txt", "--out", tmp_path / "text", "--workers=1")
    assert built.returncode == 0, built.stdout
    config = tiny(data_dir=str(tmp_path / "text"), vocab_size=50304, n_layer=1, n_embd=8, max_steps=2)
    config = replace(config, sequence_length=1024, total_batch_size=524288, micro_batch_size=64)
    with pytest.raises(UserError, match="too few for one step .* needs 524,289: .* lower --total_batch_size"):
        main(config)
    main(replace(config, sequence_length=16, total_batch_size=32, micro_batch_size=2))
    assert list(losses(tmp_path / "log", "train")) == [0, 1] and list(losses(tmp_path / "log", "val")) == [0, 2]


def test_without_validation_a_run_needs_no_validation_shard(tiny, tmp_path):
    write_shards(tmp_path / "tokens", [20, 5000])
    for log_dir in ("short", "none"):  # of less than a sequence, and not there
        main(tiny(data_dir=str(tmp_path / "tokens"), log_dir=str(tmp_path / log_dir), val_every=0, max_steps=2))
        assert list(losses(tmp_path / log_dir, "train")) == [0, 1]
        (tmp_path / "tokens" / "tiny_val_000000.npy").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no .*_val_.* shards"):
        main(tiny(data_dir=str(tmp_path / "tokens"), log_dir=str(tmp_path / "other")))


def test_a_warm_up_longer_than_the_run_is_warned_of(tiny, capsys, tmp_path):
    main(tiny(max_steps=3, warmup_steps=30, max_lr=1e-3))
    out = capsys.readouterr().out
    assert "warning: the warm-up of 30 steps is longer than the run of 3, whose learning rate ends at 1.0e-04" in out
    main(tiny(max_steps=3, warmup_steps=3, log_dir=str(tmp_path / "other")))
    assert "warning" not in capsys.readouterr().out


def test_the_last_line_is_a_command_for_the_shell(tiny, tmp_path, capsys):
    small = dict(vocab_size=50257, n_layer=1, max_steps=1)
    main(tiny(log_dir=str(tmp_path / "it's my run"), sample_prompt='Say "$HOME", it\'s', **small))
    words = shlex.split(re.search("^next: (.*)$", capsys.readouterr().out, re.M)[1])
    model = str(tmp_path / "it's my run" / "model_00001.pt")
    assert words == ["python", "-m", "tools.sample", model, '--prompt=Say "$HOME", it\'s']


@pytest.mark.parametrize("size", ["", "1"])
def test_a_world_size_without_torchrun_is_one_rank(size, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    main(tiny(max_steps=1))
    assert list(losses(tmp_path / "log", "train")) == [0]


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "values",
    [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {**WHOLE, "LOCAL_RANK": ""}, {**WHOLE, "RANK": "a"}, {**WHOLE, "RANK": "2"}],
)
def test_an_environment_of_ranks_that_is_set_in_part_or_wrong_is_refused_by_name(values, tiny, monkeypatch):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the environment names no rank: .*'RANK': .*Start with torchrun"):
        main(tiny())


def test_no_steps_are_a_validation(tiny, tmp_path):
    metrics = main(tiny(max_steps=0))
    assert re.fullmatch(r"0 val \d\.\d{4}\n", read_log(tmp_path / "log")) and metrics["val_loss"] > 5
    assert not list((tmp_path / "log").glob("*.pt"))


@dataclass
class OtherSettings:
    betas: tuple[float, float] = (0.9, 0.95)
    clip: "float | None" = None
    kind: Literal["gelu", "relu"] = "gelu"
    sizes: tuple[int, ...] = ()
    more: dict = None


def test_settings_of_other_types_have_their_flag_and_are_plain_data():
    def parse(*flags):
        return knobs.plain(knobs.parse_args(OtherSettings, {"gpt2": {}}, "x", flags))

    assert parse() == OtherSettings()
    flags = "--betas=0.8,0.9", "--clip=0.5", "--kind=relu", "--sizes=1,2,3", "--more={'a': 1}"
    assert parse(*flags) == OtherSettings((0.8, 0.9), 0.5, "relu", (1, 2, 3), {"a": 1})
    assert parse("--clip=none").clip is None
    for flag in ("--betas=0.8", "--kind=tanh", "--clip=x"):
        with pytest.raises(SystemExit):
            parse(flag)
    with pytest.raises(UserError, match="kind is 'tanh': it must be"):
        knobs.plain(OtherSettings(kind="tanh"))
