"""The picture holds what the logs say, over tokens; logs as crashes leave them are drawn, others refused."""

import json
import re

import numpy as np
import pytest
from support import ROOT

from lib.console import UserError
from tools import plot
from tools.plot import read_log
from train_gpt2 import main

SIZES = {"n_layer": 12, "n_embd": 768, "data_dir": "edu_fineweb10B", "init_from": "scratch"}  # of a run that has peers


def write_log(folder, text, **config):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text(text)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "log.txt"


@pytest.fixture
def curves(monkeypatch):
    """What plot.main draws: a list of (panel, tokens, values, label), filled when it is called."""
    drawn = []

    def keep(curves):
        for panel, tokens, values, style in curves:
            drawn.append((panel, tokens.tolist(), values.tolist(), style.get("label")))
            yield panel, tokens, values, style

    for name in ("curves_of_run", "published"):
        original = getattr(plot, name)
        monkeypatch.setattr(plot, name, lambda *args, original=original: keep(original(*args)))
    return drawn


def test_a_run_is_drawn_over_tokens_from_its_log_and_config(tiny, tmp_path, curves, monkeypatch):
    main(tiny(max_steps=10))
    monkeypatch.chdir(tmp_path)
    plot.main(["log", "--out", "out.png"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    records = read_log(tmp_path / "log" / "log.txt")
    by_label = {(panel, label): (tokens, values) for panel, tokens, values, label in curves}
    tokens, values = by_label["val", "log, validation"]
    assert tokens == [0, 5 * 512, 10 * 512] and values == list(records["val"].values())
    assert by_label["val", None] == ([step * 512 for step in range(10)], list(records["train"].values()))


def test_two_runs_with_different_batches_lie_over_their_own_tokens(tmp_path, curves):
    text = "0 val 10.8\n2 val 9.9\n"
    write_log(tmp_path / "log", text, total_batch_size=512, **SIZES)
    write_log(tmp_path / "large", text, total_batch_size=1024, **SIZES)
    plot.main([str(tmp_path / "log"), str(tmp_path / "large" / "log.txt"), "--out", str(tmp_path / "out.svg")])
    ends = {label: tokens[-1] for _, tokens, _, label in curves if label and "validation" in label}
    assert ends == {"log, validation": 1024, "large, validation": 2048}


def test_if_the_batch_has_changed_the_tokens_are_those_of_the_log(tmp_path, curves):
    text = "0 val 10.8\n0 train 10.9\n2 val 9.9\n3 train 9.7\n4 val 9.0\n4 tokens 4096\n6 train 8.0\n"
    log = write_log(tmp_path / "log", text, total_batch_size=512)
    plot.main([str(log), "--out", str(tmp_path / "out.svg")])
    by_label = {label: tokens for _, tokens, _, label in curves}
    assert by_label["log, validation"] == [0, 1024, 4096] and by_label["log, training"] == [0, 2560, 5120]
    assert {panel for panel, *_ in curves} == {"val"} and "steps of" not in (tmp_path / "out.svg").read_text()


def test_a_folder_is_named_in_the_picture_whatever_its_name(tmp_path):
    write_log(tmp_path / r"_r $\foo$", "5 train 9.9\n0 val 10.8\n0 train 10.9\n1 train 9.9\n")
    plot.main([str(tmp_path / r"_r $\foo$"), "--tokens_per_step", "512", "--out", str(tmp_path / "out.svg")])
    assert "9.9000  _r $\\foo$, training" in texts_of(tmp_path / "out.svg")


def texts_of(picture):
    """The texts of a .svg, in their order: matplotlib draws them, and says them in comments."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def test_every_kind_of_record_has_a_panel(tmp_path):
    lines = [f"{step} lr {1e-3 * step:.4e}" for step in range(300)]
    lines[9:9] = ["9 grad_noise 2.5", "9 norm 0.25"]
    lines[:0] = ["0 grad_noise 1.5", "0 norm 9.0", "0 hella 0.25", "0 train 10.9", "0 val 10.8"]
    log = write_log(tmp_path / "log", "\n".join([*lines, ""]), total_batch_size=512)
    plot.main([str(log), "--tokens_per_step=512", "--out", str(tmp_path / "out.svg")])
    texts = texts_of(tmp_path / "out.svg")
    titles = ["loss, nats per token", "HellaSwag, acc_norm", "learning rate: 0.299", "gradient norm: 0.25"]
    assert [text for text in texts if text in (*titles, "grad_noise: 2.5")] == [*titles, "grad_noise: 2.5"]
    assert {"10.8000  log, validation", "10.9000  log, training", "0.2500  log"} <= {*texts}


@pytest.mark.parametrize("small", range(8))
def test_the_panels_fill_the_picture(small):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    places = plot.lay_out(figure, 2, small)
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    covered = sum(axes.get_tightbbox().width * axes.get_tightbbox().height for axes in places) / (width * height)
    assert len(places) == 2 + small and covered > 0.85


def test_the_end_of_a_fall_is_enlarged_and_of_anything_else_is_not():
    from matplotlib.figure import Figure

    tokens = np.linspace(0, 100, 200)
    for values, count in ((3 + 7 * np.exp(-tokens / 8), 1), (10 - tokens / 20, 0), (np.full(200, 3.0), 0)):
        axes = Figure().subplots()
        curves = [(tokens, values, {})]
        plot.enlarge_the_end(axes, curves, plot.plot_curves(axes, curves, 100, 1), 100, 1)
        assert len(axes.child_axes) == count


def test_published_runs_stand_beside_runs_of_their_size_and_data(tmp_path, curves):
    def peers(**changes):
        curves.clear()
        text = "0 val 10.9\n0 hella 0.25\n250 val 6.0\n250 hella 0.25\n"
        log = write_log(tmp_path / "a", text, **{**SIZES, "total_batch_size": 524288, **changes})
        plot.main([str(log), "--out", str(tmp_path / "a.png")])
        return {(panel, label): values for panel, _, values, label in curves if label and not label.startswith("a")}

    lines = peers()
    assert lines["val", "OpenAI GPT-2 124M checkpoint"] == [3.2924, 3.2924]
    assert lines["hella", "OpenAI GPT-3 124M"] == [0.337, 0.337]
    assert len(lines["val", "GPT2-From-Scratch 124M"]) == 78
    assert {panel for panel, _ in peers(data_dir="my_data")} == {"hella"}  # the same whatever the data
    assert peers(init_from="gpt2") == peers(n_layer=2) == {}
    other = peers(data_dir="data/fineweb10B").keys()
    assert ("val", "llm.c 124M 2024-10") in other and ("val", "GPT2-From-Scratch 124M") not in other


def test_the_smoothed_curve_ignores_what_is_not_finite():
    values = np.array([1, np.nan, np.inf] + [3] * 97)
    smoothed = plot.smooth(values)
    assert np.isfinite(smoothed).all() and smoothed[:3].tolist() == [1, 1, 7 / 3] and smoothed[-1] == 3
    assert np.isnan(plot.smooth(np.full(5, np.nan))).all()


def test_a_torn_last_line_is_no_record(tmp_path):
    assert read_log(write_log(tmp_path, "0 train 10.9\n1 train 9.8\n2 train 9")) == {"train": {0: 10.9, 1: 9.8}}


def test_where_steps_go_back_the_later_records_count(tmp_path, capsys):
    text = "0 val 9.0\n0 train 9.0\n1 train 8.0\n2 train 7.0\n2 val 7.0\n1 train 6.0\n2 train nan\nno\n3 train 3.1.4\n"
    records = read_log(write_log(tmp_path, text))
    assert records["val"] == {0: 9} and records["train"][1] == 6 and np.isnan(records["train"][2])
    said = capsys.readouterr().out
    assert "goes back from step 2 to 1" in said and "2 lines that are not records" in said


@pytest.mark.parametrize("text", ["", "5 train 3.", "nothing\n"])
def test_a_log_without_records_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="has no records"):
        read_log(write_log(tmp_path, text))


def test_what_cannot_be_drawn_is_refused_with_advice(tmp_path):
    log = write_log(tmp_path / "a", "0 val 9.0\n")
    for argv, message in {
        (str(tmp_path / "none"),): "Give the log.txt of a run, or its log_dir",
        (str(tmp_path),): "cannot read .*/log.txt",
        (str(log),): "give --tokens_per_step",
        (str(log), "--tokens_per_step=0"): "give --tokens_per_step, .* 1 or more",
        (str(log), "--tokens_per_step=8", "--out", str(tmp_path / "no" / "a.png")): "cannot write",
        (str(log), "--tokens_per_step=8", "--out", str(tmp_path / "a.doc")): "cannot write .*supported",
    }.items():
        with pytest.raises(UserError, match=message):
            plot.main([*argv])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_config_of_another_program_is_no_obstacle(tmp_path):
    log = write_log(tmp_path, "0 val 9.0\n", learning_rate=1)
    with pytest.raises(UserError, match="give --tokens_per_step"):
        plot.main([str(log)])
    plot.main([str(log), "--tokens_per_step=8", "--out", str(tmp_path / "a.png")])


def test_every_published_run_names_its_source():
    text = (ROOT / "assets" / "reference_runs.csv").read_text()
    comments = "".join(line for line in text.splitlines() if line.startswith("#"))
    for (n_layer, n_embd), size in plot.SIZES.items():
        config = {"n_layer": n_layer, "n_embd": n_embd, "init_from": "scratch", "data_dir": "edu_fineweb10B"}
        names = {style["label"] for *_, style in plot.published(config, 1)}
        assert len(names) >= 2 and all(name.split(f" {size}")[0] + ":" in comments for name in names)


def test_a_picture_that_fails_ends_no_run(tiny, tmp_path):
    (tmp_path / "log" / "curve.png").mkdir(parents=True)
    assert main(tiny(plot_every=5, max_steps=5))["step"] == 5
