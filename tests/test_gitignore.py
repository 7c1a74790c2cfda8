"""git adds nothing that a run leaves, whatever its folders are called, and ignores nothing that is tracked."""

import re
import shutil
import subprocess

import pytest
from support import ROOT, write_shards

from tools import plot
from train_gpt2 import main

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder, *args):
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def test_what_a_run_leaves_is_not_added(tiny, tmp_path):
    git(tmp_path, "init", "-q")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    main(tiny(max_steps=4, checkpoint_every=2, log_dir=str(tmp_path / "my log")))
    (tmp_path / "my log" / "samples.txt").write_text("9 sample 'x'\n")
    main(tiny(max_steps=6, checkpoint_every=2, log_dir=str(tmp_path / "my log"), init_from="resume"))
    main(tiny(max_steps=2, checkpoint_every=2, log_dir=str(tmp_path / "runs" / "small")))
    (tmp_path / "my log" / "model_00004.pt").rename(tmp_path / "my log" / "model_00004.pt.not_finite")
    plot.main([str(tmp_path / "my log"), "--out", str(tmp_path / "my log" / "curve.png")])
    write_shards(tmp_path / "my data", [1500, 5000], name="my_texts")
    for name in ("manifest.json", "fineweb_train_000001.bin"):
        (tmp_path / "my data" / name).write_bytes(b"{}")
    mine = ["notes/model.py", "my_data/train.txt", "my log/notes.md", "sample_train_1.npy"]
    for name in mine:  # what one writes oneself
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    found = git(tmp_path, "-c", "core.quotePath=false", "ls-files", "--others", "--exclude-standard", "-z")
    found = {
        name for name in "".join(found).split("\0")[:-1] if not name.endswith("/config.json")
    }  # small, and worth it
    assert found == {".gitignore", *mine}


def test_what_the_readme_makes_is_ignored():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    text = (ROOT / "README.md").read_text()
    made = re.findall(r"--log_dir (\S+)", text) + re.findall(r"tools\.(?:export_hf|import_model) \S+ ([\w-]+)", text)
    made = ["my_log", *made, "compare", "compare.png", "console.txt"]
    assert {"my-gpt2", "theirs", "trial", "trial2"} <= set(made)
    names = [f"{name}/config.json" if "." not in name else name for name in made]
    assert git(ROOT, "check-ignore", *names) == names


def test_nothing_that_is_tracked_is_ignored():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert "train_gpt2.py" in git(ROOT, "ls-files")
    assert git(ROOT, "ls-files", "--cached", "--ignored", "--exclude-standard") == []
