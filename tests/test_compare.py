"""tools.compare: equal code gives exactly 0, a known effect its verdict, and nothing is trained twice."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, environment, run_warm, write_shards

from lib.console import UserError
from lib.files import lock_folder
from tools import compare
from train_gpt2 import main, parse_args

FLAGS = (
    "--n_layer 1 --n_head 2 --n_embd 16 --vocab_size 512 --sequence_length 32 --total_batch_size 256 "
    "--micro_batch_size 4 --max_steps 8 --warmup_steps 1 --checkpoint_every 3 --device cpu"
)
GELU = 'F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 uses the approximation'


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The data and the runs of all tests, which have the unchanged side in common."""
    folder = tmp_path_factory.mktemp("shared")
    write_shards(folder / "data", [700, 5000])
    return folder


@pytest.fixture
def judged(shared, tmp_path, monkeypatch):
    """A function that compares as the command line does, its runs in processes that start fast; `started` lists them.
    Returns what --json has."""
    monkeypatch.chdir(tmp_path)

    def launch(command, console):
        judged.started.append(command)
        result = run_warm(command[1], *command[2:], folder=Path(command[1]).parent)
        console.write(result.stdout.encode())
        return result.returncode

    def judged(*args, data=shared / "data"):
        where = ["--both", f"{FLAGS} --data_dir {data}", "--folder", str(shared / "compare")]
        compare.main([*where, "--json", "out.json", *args])
        return json.loads(Path("out.json").read_text())

    monkeypatch.setattr(compare, "launch", launch)
    judged.started = []
    return judged


def write_diff(old, new):
    path = Path("my.diff")
    path.write_text(f"`train_gpt2.py`\n\n```diff\n-{old}\n+{new}\n```\nand some text\n")
    return path


def test_equal_code_gives_exactly_zero_and_more_seeds_train_only_those(judged, capsys):
    diff = write_diff(f"        return self.c_proj({GELU}", f"        return self.c_proj({GELU} and nothing else")
    found = judged("--diff", str(diff), "--seeds", "2")
    assert found["differences"] == [0, 0] and found["low"] == found["high"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict: no difference shown | val loss +0.0000 nats, 95% from +0.0000 to +0.0000, 2 pairs"
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    assert found["unchanged"][0] != found["unchanged"][1]
    judged.started.clear()
    assert judged("--diff", str(diff), "--seeds", "3")["differences"] == [0, 0, 0]
    assert {command[-1][-10:] for command in judged.started} == {"seed_3/log"}


def test_a_known_effect_is_called_by_its_name_with_its_costs(judged, capsys):
    found = judged("--seeds", "2", "--", "--max_lr=0", "--n_layer=2")
    sizes = [found[f"cost_of_{side}"]["parameters"] for side in ("changed", "unchanged")]
    assert found["verdict"] == "worse" and found["low"] > 0 and sizes[0] > sizes[1]
    last = capsys.readouterr().out.splitlines()[-1]
    numbers = r"val loss \+\d\.\d{4} nats, 95% from \+\d\.\d{4} to \+\d\.\d{4}, 2 pairs"
    assert re.fullmatch(rf"verdict: worse \| {numbers}", last)


def test_new_data_trains_again_and_data_that_are_gone_do_not(judged, shared, tmp_path):
    code, found = compare.copy_code(ROOT, shared / "compare"), []
    flags = ["--preset", "demo", *compare.QUIET, *FLAGS.split(), "--data_dir", str(tmp_path / "data")]
    for seed in (0, 0, 1):
        write_shards(tmp_path / "data", [700, 5000], seed=seed)
        found.append(compare.train(tmp_path / "runs", code, flags, 1)["val_loss"])
    (tmp_path / "data").rename(tmp_path / "gone")
    found.append(compare.train(tmp_path / "runs", code, flags, 1)["val_loss"])
    assert found[0] == found[1] != found[2] == found[3] and len(judged.started) == 2


def test_new_weights_train_again(judged, shared, tmp_path):
    code, flags = compare.copy_code(ROOT, shared / "compare"), ["--preset", "demo", *compare.QUIET, *FLAGS.split()]
    flags += ["--data_dir", str(shared / "data")]
    main(parse_args([*flags, "--log_dir", str(tmp_path / "base")]))
    flags += ["--init_from", str(tmp_path / "base")]
    first = [compare.train(tmp_path / "runs", code, flags, 1)["val_loss"] for _ in range(2)]
    main(parse_args([*flags[:-2], "--log_dir", str(tmp_path / "base"), "--init_from=resume", "--max_steps=40"]))
    assert first[0] == first[1] != compare.train(tmp_path / "runs", code, flags, 1)["val_loss"]
    assert len(judged.started) == 2


def test_a_single_step_has_a_verdict_and_a_picture(judged, shared):
    assert judged("--seeds", "2", "--both", f"{FLAGS} --data_dir {shared}/data --max_steps 1")["pairs"] == 2
    assert Path("compare.png").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_verdict(judged, capsys):
    assert judged("--seeds", "2", "--out", "curves.unknown", "--", "--max_lr=0")["verdict"] == "worse"
    warning, last = capsys.readouterr().out.splitlines()[-2:]
    assert warning.startswith("warning: no picture") and last.startswith("verdict: worse")


def test_a_run_of_another_comparison_is_left_alone(judged, shared, tmp_path):
    code, flags = compare.copy_code(ROOT, shared / "compare"), ["--preset", "demo", *compare.QUIET, *FLAGS.split()]
    flags += ["--data_dir", str(shared / "data")]
    run = compare.train(tmp_path / "runs", code, flags, 1)["run"].parent
    with lock_folder(run), pytest.raises(UserError, match="is being written by process"):
        compare.train(tmp_path / "runs", code, flags, 1)


def test_a_loss_of_an_earlier_step_is_not_judged(judged, capsys):
    diff = write_diff("        if run.due(config.val_every):", "        if step % config.val_every == 0:")
    with pytest.raises(SystemExit):
        judged("--seeds", "2", "--diff", str(diff))
    assert "no validation loss of the last step, 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, reason",
    [
        (["--", "--max_lr=1e20"], "NaN or infinite in steps"),
        ((f"        return self.c_proj({GELU}", "        return x @ x"), "RuntimeError"),
    ],
)
def test_a_change_that_does_not_train_is_a_verdict(change, reason, judged, capsys):
    args = change if isinstance(change, list) else ["--diff", str(write_diff(*change))]
    found = judged("--seeds", "2", *args)
    assert found["verdict"] == "does not train" and reason in found["reason"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("verdict: does not train: changed, seed 1: ") and reason in last


@pytest.mark.parametrize(
    "args, message",
    [
        (["--", "--max_lrr", "1"], "did you mean --max_lr?"),
        (["--", "--total_batch_size", "100"], "not divisible"),
        (["--", "--log-dir", "x"], "set by the comparison"),
        (["--", "--val_every=5"], "set by the comparison"),
        (["--diff", "missing.diff"], "missing.diff"),
        (["--code", "missing"], "missing"),
        (["--code", ""], "no such folder"),
        (["--", "--checkpoint_every=0"], "has no checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_an_error_not_a_verdict(args, message, judged, capsys):
    with pytest.raises(SystemExit) as error:
        judged("--seeds", "2", *args)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and message in err and err.count("\n") == 1 and "verdict" not in out


@pytest.fixture
def repository(tmp_path):
    """A function that runs git in a repository of three files, one of them at the end of a change."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*args):
        done = subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", *args], cwd=folder, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        return done.stdout

    git("init")
    for name in ("train_gpt2.py", "lib/gone.py", "lib/old.py", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(f"{name} {number}\n" for number in range(20)))
    git("add", ".")
    git("commit", "-m", "before")
    shutil.copytree(folder, tmp_path / "before", ignore=shutil.ignore_patterns(".git"))
    text = (folder / "train_gpt2.py").read_text().replace(" 3\n", " three\n\n")
    (folder / "train_gpt2.py").write_text(text + "the end\n")
    (folder / "README.md").write_text("changed\n")
    git("mv", "lib/old.py", "lib/renamed.py")
    git("rm", "lib/gone.py")
    (folder / "package").mkdir()
    (folder / "package" / "new.py").write_text("new = 1\n")
    git("add", ".")
    git("commit", "-m", "after")
    git.folder = folder
    return git


@pytest.mark.parametrize(
    "flags",
    [["diff", "HEAD~"], ["diff", "--no-prefix", "HEAD~"], ["diff", "--src-prefix=i/", "--dst-prefix=w/", "HEAD~"],
     ["format-patch", "--stdout", "HEAD~"], ["show"]],
)  # fmt: skip
def test_diffs_of_git_are_applied_once_and_whole(flags, repository, tmp_path):
    diff = repository(*flags)
    compare.apply_diff(diff, tmp_path / "before")
    assert (tmp_path / "before" / "README.md").read_text() != "changed\n"  # it is no code
    for folder in (tmp_path / "before", repository.folder):
        (folder / "README.md").unlink()
        shutil.rmtree(folder / ".git", ignore_errors=True)
    names = {path.relative_to(repository.folder) for path in repository.folder.rglob("*")}
    assert names == {path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*")}
    for name in names:
        if (repository.folder / name).is_file():
            assert (repository.folder / name).read_text() == (tmp_path / "before" / name).read_text()
    with pytest.raises(UserError, match="git cannot apply the diff"):
        compare.apply_diff(diff, tmp_path / "before")


@pytest.mark.parametrize("name", ["../outside.py", "{}/outside.py"])
def test_a_diff_changes_nothing_outside_of_the_copy(name, tmp_path):
    (tmp_path / "outside.py").write_text("old\n")
    (tmp_path / "copy").mkdir()
    name = name.format(tmp_path)
    with pytest.raises(UserError, match="git cannot apply"):
        compare.apply_diff(f"--- {name}\n+++ {name}\n@@ -1 +1 @@\n-old\n+new\n", tmp_path / "copy")
    assert (tmp_path / "outside.py").read_text() == "old\n"


PAGE = "`a.py`\n\nSome text.\n\n```diff\n one\n+new\n```\n\n```diff\n-last\n+end\n```\n"


def test_a_page_is_applied_once(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\nlast\n")
    compare.apply_diff(PAGE, tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nnew\ntwo\nend\n"
    with pytest.raises(UserError, match="is applied already, in a.py"):
        compare.apply_diff(PAGE, tmp_path)


NEW_FILE = (
    "diff --git a/lib/b.py b/lib/b.py\nnew file mode 100644\n--- /dev/null\n+++ b/lib/b.py\n@@ -0,0 +1 @@\n+new\n"
)


@pytest.mark.parametrize(
    "text, message",
    [("", "git cannot apply"), ("some text\n", "git cannot apply"), (NEW_FILE, "git cannot apply"),
     (PAGE.replace("`a.py`", "In `a.py`:"), "the name of a file"), (PAGE.replace("a.py", "../a.py"), "the name of a f"),
     (PAGE.removesuffix("```\n"), "end with ```"), (PAGE.replace("```diff\n one", "``` diff\n one"), "begin with ```d"),
     (PAGE.replace(" one", " twice"), "fits 2 places in a.py"), (NEW_FILE.replace("b.py", "b.md"), "git cannot apply"),
     (NEW_FILE.replace("lib/b.py", "docs/b.py"), "changes nothing")],
)  # fmt: skip
def test_a_diff_that_does_not_fit_or_does_nothing_is_refused(text, message, tmp_path):
    (tmp_path / "copy" / "lib").mkdir(parents=True)
    for name in ("lib/b.py", "lib/b.md"):
        (tmp_path / "copy" / name).write_text("is there already\n")
    for name in ("a.py", "copy/a.py"):
        (tmp_path / name).write_text("one\ntwice\nlast\ntwice\n")
    with pytest.raises(UserError, match=message):
        compare.apply_diff(text, tmp_path / "copy")
    assert (tmp_path / "a.py").read_text() == "one\ntwice\nlast\ntwice\n"


def test_the_copied_code_is_what_a_run_imports_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    (source / "lib").symlink_to(tmp_path / "lib")
    (source / "assets").mkdir()
    for name in ("train_gpt2.py", "package/part.py", "lib/table.csv", "data/big.npy", "tests/test_x.py", "README.md",
                 ".venv/x.py", "venv/lib/site-packages/x.py", "compare/code_1/train_gpt2.py"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    elsewhere = [compare.copy_code(source, folder).name for folder in (source, tmp_path, tmp_path / "compare")]
    (source / "compare" / "left_by_kill_9").mkdir()
    (source / "compare" / "left_by_kill_9" / "fineweb.py").write_text("")
    copy = compare.copy_code(source, source / "compare")
    assert compare.copy_code(source, source / "compare") == copy and {*elsewhere} == {copy.name}
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and path.parent.name != "lib"}
    assert {name for name in found if not name.startswith("lib/")} == {"train_gpt2.py", "package/part.py"}
    assert (copy / "lib" / "table.csv").exists() and not list(copy.rglob("__pycache__"))
    (copy / "train_gpt2.py").write_text("edited where a traceback points to")
    assert compare.copy_code(source, source / "compare") == copy
    assert (copy / "train_gpt2.py").read_text() == "train_gpt2.py"


@pytest.mark.parametrize("name", [path.name for path in ROOT.glob("docs/ingredients/*.diff")])
def test_the_diffs_of_the_ingredients_fit_and_leave_python(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    compare.apply_diff((ROOT / "docs" / "ingredients" / name).read_text(), tmp_path)
    compile((tmp_path / "train_gpt2.py").read_text(), name, "exec")


def test_the_interval_is_students():
    found = compare.judge([1.02, 2.01, 3.05, 4.02, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["difference"] == pytest.approx(0.02)
    assert (found["low"], found["high"]) == pytest.approx((-0.003226, 0.043226), abs=1e-5)  # scipy.stats.ttest_1samp
    assert found["verdict"] == "no difference shown" and found["unpaired_high"] > 2
    assert 1.96 < compare.half_width(1, 1, 1000) < 2.05
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(400):
        seeds, a, b = rng.normal(size=(3, 5))
        different += compare.judge((seeds + 0.1 * a).tolist(), (seeds + 0.1 * b).tolist())["verdict"][0] in "bw"
    assert 5 <= different <= 35  # 5% of 400 are 20


def test_an_interrupted_comparison_continues(tmp_path):
    write_shards(tmp_path / "data", [700, 5000])
    flags = f"{FLAGS} --data_dir data --max_steps 1000000 --checkpoint_every 1000000 --log_every 1"
    command = [sys.executable, ROOT / "tools" / "compare.py", "--both", flags, "--", "--max_lr=1e-3"]
    for printed in (b"step     5/", b"resuming at step"):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        while not any(printed in path.read_bytes() for path in tmp_path.glob("compare/*/seed_1/console.txt")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # to the parent alone: the run must not go on as an orphan
        assert "the same command continues" in process.communicate(timeout=60)[1]
        assert process.returncode == -signal.SIGINT
    (run,) = tmp_path.glob("compare/*/seed_1")
    assert "stopped by a signal" in (run / "console.txt").read_text() and list(run.glob("log/model_*.pt"))
