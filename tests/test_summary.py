"""The end of a run says what came of it, on the console and as a page."""

import re

import pytest
from support import at_step, losses, terminate

from lib.console import Stopped
from train_gpt2 import TrainConfig, main, parse_args

SAMPLED = dict(vocab_size=50304, n_embd=8, sample_every=10, sample_prompt="The", plot_every=10)


def test_the_last_lines_and_the_page_say_what_came_of_the_run(tiny, tmp_path, capsys):
    metrics = main(tiny(**SAMPLED))
    out, page = capsys.readouterr().out, (tmp_path / "log" / "summary.md").read_text()
    assert "tokens: 10,240 in 20 steps" in out and re.search(r"time: 0.\d minutes, [\d,]+ tokens/s in training", out)
    perplexity = re.search(r"validation loss: (\S+), perplexity ([\d,.]+)", out)
    assert float(perplexity[1]) == pytest.approx(metrics["val_loss"], abs=1e-4)
    assert "Output in" in out and "summary.md, curve.png, samples.txt" in out
    assert (tmp_path / "log" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "log").glob("*.tmp"))
    for text in ("| tokens | 10,240 in 20 steps |", "![", "max_lr = 0.01", "n_embd = 8", "20 sample "):
        assert text in page, page
    assert "grad_clip" not in page  # the default
    samples = (tmp_path / "log" / "samples.txt").read_text().splitlines()
    assert [line.split()[0] for line in samples] == ["0"] * 3 + ["10"] * 3 + ["20"] * 3


def test_a_resumed_run_counts_its_time_and_shows_each_sample_once(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, {14}, terminate)
        main(tiny(**SAMPLED | {"plot_every": 0}))
    main(tiny(init_from="resume", **SAMPLED | {"plot_every": 0}))
    page = (tmp_path / "log" / "summary.md").read_text()
    assert len(re.findall(r"^\d+ sample .The", page, re.M)) == 9 and "since step" not in page and "in 20 steps" in page
    assert "seconds" not in losses(tmp_path / "log", "train")


def test_the_preset_for_own_text_differs_from_the_demo_in_its_text_alone():
    small, demo = (vars(parse_args([f"--preset={name}"])) for name in ("small", "demo"))
    assert {name for name in small if small[name] != demo[name]} == {
        "data_dir", "log_dir", "data_source", "sample_prompt",
    }  # fmt: skip
    assert small["data_source"] == TrainConfig().data_source
