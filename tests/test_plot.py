"""The picture holds what the logs say, over tokens; logs as crashes leave them are drawn, others refused."""

import builtins
import re

import numpy as np
import pytest
import torch
from support import ROOT, write_shards

from lib.console import UserError
from lib.model import published as reference
from lib.run.log import read_log
from tools import plot
from train_gpt2 import GPTConfig, main

EDU = ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"]


def write_log(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text(text)
    return folder / "log.txt"


@pytest.fixture
def curves(monkeypatch):
    """What plot.main draws: a list of (panel, tokens, values, label), filled when it is called."""
    drawn = []

    def keep(curves):
        for panel, tokens, values, style in curves:
            drawn.append((panel, tokens.tolist(), values.tolist(), style.get("label")))
            yield panel, tokens, values, style

    for name in ("curves_of_run", "curves_of_peer"):
        original = getattr(plot, name)
        monkeypatch.setattr(plot, name, lambda *args, original=original: keep(original(*args)))
    return drawn


def test_a_run_is_drawn_over_tokens_from_its_log_and_checkpoint(tiny, tmp_path, curves, monkeypatch):
    main(tiny(max_steps=10))
    monkeypatch.chdir(tmp_path)
    plot.main(["log", "--out", "out.png"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    records = read_log(tmp_path / "log" / "log.txt")
    by_label = {label: (panel, tokens, values) for panel, tokens, values, label in curves}
    panel, tokens, values = by_label["log, validation"]
    assert panel == "val" and tokens == [0, 5 * 512, 10 * 512] and values == list(records["val"].values())
    assert by_label[None][1:] == ([step * 512 for step in range(10)], list(records["train"].values()))


def test_two_runs_with_different_batches_lie_over_their_own_tokens(tiny, tmp_path, curves):
    main(tiny(max_steps=2, checkpoint_every=2))
    main(tiny(max_steps=2, checkpoint_every=2, total_batch_size=1024, log_dir=str(tmp_path / "large")))
    plot.main([str(tmp_path / "log"), str(tmp_path / "large" / "log.txt"), "--out", str(tmp_path / "out.svg")])
    ends = {label: tokens[-1] for _, tokens, _, label in curves if label and "validation" in label}
    assert ends == {"log, validation": 1024, "large, validation": 2048}


def test_a_folder_is_named_in_the_picture_whatever_its_name(tmp_path):
    write_log(tmp_path / r"_r $\foo$", "5 train 9.9\n0 val 10.8\n0 train 10.9\n1 train 9.9\n")
    plot.main([str(tmp_path / r"_r $\foo$"), "--tokens_per_step", "512", "--out", str(tmp_path / "out.svg")])
    assert "<!-- \xa0_r $\\foo$, training: 9.9000 -->".replace("\xa0", " ") in (tmp_path / "out.svg").read_text()


def texts_of(picture):
    """The texts of a .svg, in their order: matplotlib draws them, and says them in comments."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def test_every_kind_of_record_has_a_panel_after_the_two_main_ones(tmp_path):
    lines = [f"{step} lr {1e-3 * step:.4e}" for step in range(300)]
    lines[9:9] = ["9 grad_noise 2.5", "9 norm 0.25"]
    lines[:0] = ["0 grad_noise 1.5", "0 norm 9.0", "0 hella 0.25", "0 train 10.9", "0 val 10.8"]
    log = write_log(tmp_path / "log", "\n".join([*lines, ""]))
    flags = ["--tokens_per_step=512", "--size=other", "--dataset=other"]
    plot.main([str(log), *flags, "--out", str(tmp_path / "out.svg")])
    texts = texts_of(tmp_path / "out.svg")
    titles = ["loss, nats per token", "HellaSwag, acc_norm", "learning rate", "gradient norm, before clipping"]
    assert [text for text in texts if text in (*titles, "grad_noise")] == [*titles, "grad_noise"]
    for label in ("log, validation: 10.8000", "log: 0.2500", "log: 0.299", "log: 0.25", "log: 2.5"):
        assert label in texts


@pytest.mark.parametrize("kind", ["val", "train"])
def test_of_two_runs_that_agree_both_are_seen(tmp_path, kind):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    text = "".join(f"{step} {kind} {9 - step / 50:.6f}\n" for step in range(0, 300, 1 if kind == "train" else 50))
    logs = [str(write_log(tmp_path / name, text)) for name in "ab"]
    plot.main([*logs, "--tokens_per_step=512", "--size=other", "--dataset=other", "--out", str(tmp_path / "out.png")])
    picture = imread(tmp_path / "out.png")[150:, :, :3]  # below the legend
    for color in ("C0", "C1"):
        wanted = np.array(to_rgb(color)) - np.mean(to_rgb(color))  # the hue, whatever it is laid over
        hue = picture - picture.mean(axis=2, keepdims=True)
        alike = (hue @ wanted) / (np.linalg.norm(hue, axis=2) * np.linalg.norm(wanted) + 1e-9)
        assert ((alike > 0.95) & (np.linalg.norm(hue, axis=2) > 0.3)).sum() > 200, color


def test_the_published_runs_alone_can_be_read_at_step_500(tmp_path):
    for name in ("out.svg", "out.png"):
        plot.main(["--size", "124M", "--dataset", "fineweb-edu", "--out", str(tmp_path / name)])
    texts = texts_of(tmp_path / "out.svg")
    assert {"500", "5.51", "steps of 524,288 tokens", "GPT2-From-Scratch 124M: 3.2638"} <= {*texts}
    assert (tmp_path / "out.png").stat().st_size < 100_000  # it is in the README
    for size in ("350M", "774M", "1558M"):  # of some sizes there are no curves
        plot.main(["--size", size, "--out", str(tmp_path / "out.svg")])


def test_published_runs_stand_beside_runs_of_their_size_and_data(tmp_path, curves):
    log = write_log(tmp_path / "a", "0 val 10.9\n0 hella 0.25\n250 val 6.0\n250 hella 0.25\n")
    flags = [str(log), "--tokens_per_step", "524288", "--size", "124M", "--out", str(tmp_path / "a.png")]
    plot.main([*flags, "--dataset", "fineweb-edu"])
    lines = {(panel, label): values for panel, _, values, label in curves}
    assert lines["val", "OpenAI GPT-2 124M checkpoint"] == [3.2924, 3.2924]
    assert lines["hella", "OpenAI GPT-3 124M"] == [0.337, 0.337]
    assert len(lines["val", "GPT2-From-Scratch 124M"]) == 78
    curves.clear()
    plot.main([*flags, "--dataset", "other"])  # the loss on other data is no yardstick, HellaSwag is
    assert {panel for panel, _, _, label in curves if label and label.startswith(("OpenAI", "GPT2"))} == {"hella"}


def test_the_smoothed_curve_ignores_what_is_not_finite():
    values = np.array([1, np.nan, np.inf] + [3] * 97)
    smoothed = plot.smooth(values)
    assert np.isfinite(smoothed).all() and smoothed[:2].tolist() == [1, 2] and smoothed[-1] == 3
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


def test_what_cannot_be_drawn_is_refused_with_advice(tmp_path, monkeypatch):
    log = write_log(tmp_path / "a", "0 val 9.0\n")
    for argv, message in {
        (): "give the log_dir of a run, or --size",
        (str(tmp_path / "none"),): "Give the log.txt of a run, or its log_dir",
        (str(tmp_path),): "cannot read .*/log.txt",
        (str(log),): "give --tokens_per_step",
        (str(log), "--tokens_per_step=0"): "tokens_per_step is 0: give",
        (str(log), "--tokens_per_step=8", "--out", str(tmp_path / "no" / "a.png")): "cannot write",
        (str(log), "--tokens_per_step=8", "--out", str(tmp_path / "a.doc")): "cannot write .*supported",
    }.items():
        with pytest.raises(UserError, match=message):
            plot.main([*argv])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main([str(log), "--tokens_per_step=8", "--size=other", "--dataset=other"])


def test_a_checkpoint_of_another_program_is_no_obstacle(tmp_path):
    log = write_log(tmp_path, "0 val 9.0\n")
    torch.save({"config": GPTConfig()}, tmp_path / "model_00005.pt")  # as the tutorial does
    (tmp_path / "model_00006.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="give --tokens_per_step"):
        plot.main([str(log)])
    plot.main([str(log), "--tokens_per_step=8", "--out", str(tmp_path / "a.png")])


def test_a_validation_loss_is_compared_at_the_same_number_of_tokens():
    compare, gpt2 = reference.compare, GPTConfig(vocab_size=50304)
    text = compare(6.0, 131072000, gpt2, EDU)
    assert text == " | 0.2907 better than GPT2-From-Scratch 124M after as many tokens"
    assert " | 0.0100 worse than" in compare(3.2738, 9999220736, gpt2, EDU)
    assert "than" in compare(3.2738, 19_073 * 2**19, gpt2, EDU)  # the last one of a run, a step beyond its records
    between = compare(5.0, 2**18 * 700, gpt2, EDU)  # of another batch size
    assert 0.5 < float(between.split()[1]) < 1.3 and "better" in between
    assert compare(3.0, 2**30, GPTConfig(n_layer=24, n_embd=1024), EDU) == ""
    assert compare(3.0, 2**30, gpt2, ["fineweb_val_000000.bin"]) == ""
    assert compare(3.0, 0, gpt2, EDU) == compare(3.0, 2**40, gpt2, EDU) == ""  # before and beyond its records


def test_size_and_dataset_are_known_by_shape_and_names():
    assert reference.size_of(GPTConfig()) == "124M" and reference.size_of(GPTConfig(n_layer=2)) == "other"
    assert reference.dataset_of(EDU) == "fineweb-edu" and reference.dataset_of(["fineweb_val_000000.bin"]) == "fineweb"
    assert reference.dataset_of(["tiny_val_000000.npy"]) == reference.dataset_of(None) == "other"


def test_every_published_run_names_its_source():
    text = (ROOT / "assets" / "reference_runs.csv").read_text()
    comments = "".join(line for line in text.splitlines() if line.startswith("#"))
    for size in ("124M", "350M", "774M", "1558M"):
        for run_ in reference.published(size):
            assert run_.name.split(f" {size}")[0] + ":" in comments


def test_the_trainer_draws_while_it_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "size_of", lambda config: "124M")
    write_shards(tmp_path / "edu", [3000, 9000], name="edufineweb")
    main(tiny(data_dir=str(tmp_path / "edu"), plot_every=5, max_steps=10))
    picture = tmp_path / "log" / "curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.glob("*.tmp")] == []


def test_a_picture_that_fails_ends_no_run(tiny, tmp_path):
    (tmp_path / "log" / "curve.png").mkdir(parents=True)
    assert main(tiny(plot_every=5, max_steps=5))["step"] == 5


def test_the_console_says_how_the_loss_compares_and_the_log_does_not(tiny, tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "edu", [3000, 9000], name="edufineweb")
    theirs = reference.Published("theirs", "fineweb-edu", [(1, 0), (10**6, 0)], [])
    monkeypatch.setattr(reference, "published", lambda size: [theirs] if size == "124M" else [])
    for sizes, count in (({}, 0), ({(2, 32): "124M"}, 1)):
        monkeypatch.setattr(reference, "SIZES", sizes)
        main(tiny(data_dir=str(tmp_path / "edu"), log_dir=str(tmp_path / str(count)), max_steps=5))
        line = r"^step     5 \| val loss (\S+) \| \1 worse than theirs after as many tokens$"
        assert len(re.findall(line, capsys.readouterr().out, re.M)) == count
        assert "theirs" not in (tmp_path / str(count) / "log.txt").read_text()
