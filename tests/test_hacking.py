"""Every change of docs/hacking.md, taken from the page."""

import re
import shutil

import pytest
from support import PROBES, ROOT, run_warm, write_shards

from tools.compare import apply_diff

PAGE = (ROOT / "docs" / "hacking.md").read_text()
SECTIONS = {title: text for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
FLAGS = [
    "--n_layer=2", "--n_head=2", "--n_embd=16", "--sequence_length=32", "--total_batch_size=128",
    "--micro_batch_size=4", "--max_steps=12", "--warmup_steps=2", "--max_lr=1e-2", "--val_every=4", "--val_tokens=100",
    "--hellaswag_every=0", "--sample_every=0", "--plot_every=0", "--checkpoint_every=4", "--device=cpu",
    "--data_dir=data",
]  # fmt: skip
CHOSEN = {
    "Another activation": ["--activation=relu2"], "Another setting": ["--cooldown_steps=4"],
    "LoRA and dropout, for fine-tuning": ["--lora_rank=2", "--dropout=0.1", "--init_from=base/model_00012.pt"],
    "Another tokenizer": ["--vocab_size=512"],
}  # fmt: skip


def copy_scripts(folder):
    for name in ("train_gpt2.py", "hellaswag.py", "fineweb.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("lib", "tools", "assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if "```diff" in text])
def test_a_change_of_the_page_trains_resumes_and_does_what_it_says(title, tmp_path):
    copy_scripts(tmp_path)
    apply_diff(SECTIONS[title], tmp_path)
    for seed, name in enumerate(("data", "my_data")):
        write_shards(tmp_path / name, [1500, 5000, 3001], seed=seed)
    result = run_warm(PROBES / "hacked.py", title, *FLAGS, *CHOSEN.get(title, []), folder=tmp_path)
    assert result.returncode == 0, result.stdout
