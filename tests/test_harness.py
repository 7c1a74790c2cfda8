"""--style harness against the real thing: where lm-eval[hf] is installed, its choices are ours, item by item."""

import json
import random
import string
from pathlib import Path

import pytest
import torch
from support import run

from lib.checkpoint import write_checkpoint
from tools.export_hf import export
from train_gpt2 import GPT, GPTConfig

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm-eval[hf]")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TASK = """
include: {hellaswag}
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items}}}}}
training_split: null
"""


def wikihow_items(count):
    """Items in random words, with what the cleaning is for: marks, stray spaces, capitals, words that are not ASCII."""
    rng = random.Random(0)
    words = ["the", "man", "Runs", "café", "it's", "12", "dry-clean", "roof.", "then", "[step]", "[title]", "  [x y]"]

    def text(low, high):
        return rng.choice(["", "", " ", "[header] "]) + " ".join(rng.choices(words, k=rng.randint(low, high)))

    for _ in range(count):
        yield {
            "activity_label": string.capwords(text(1, 3)), "ctx_a": text(3, 40), "ctx_b": rng.choice(["", text(1, 4)]),
            "label": rng.randrange(4), "endings": ["so " + text(1, 20) for _ in range(4)],
        }  # fmt: skip


def save_both(folder):
    """A model with weights large enough to have opinions, as our checkpoint and exported in Hugging Face's layout."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    contents = {"model": model.state_dict(), "optimizer": {}, "config": vars(model.config), "train_config": {}}
    write_checkpoint(folder / "model_00000.pt", {**contents, "step": 0})
    export(folder / "model_00000.pt", folder / "hf")
    return folder / "model_00000.pt", folder / "hf"


def lm_eval_choices(model, items, folder):
    """What lm-evaluation-harness's own hellaswag task chooses for each item: (by sum, normalized), and its results."""
    from lm_eval.tasks import TaskManager

    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(TASK.format(hellaswag=task, items=items))
    out = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", tasks=["hellaswag_local"], device="cpu",
        batch_size=8, task_manager=TaskManager(include_path=str(folder / "tasks")), log_samples=True,
    )  # fmt: skip
    samples = sorted(out["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    chosen = []
    for sample in samples:
        loss = [-log_p for ((log_p, _),) in sample["resps"]]
        normalized = [x / len(c) if c else float("inf") for x, c in zip(loss, sample["doc"]["choices"], strict=True)]
        chosen.append([loss.index(min(loss)), normalized.index(min(normalized))])
    return chosen, out["results"]["hellaswag_local"]


def test_the_harness_style_chooses_as_lm_eval_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in wikihow_items(60)))
    ours, theirs = save_both(tmp_path)
    expected, results = lm_eval_choices(theirs, items, tmp_path)
    result = run("hellaswag.py", "-m", ours, "-d", "cpu", "--data", items, "--style", "harness", "--json",
                 tmp_path / "scores.json")  # fmt: skip
    assert result.returncode == 0, result.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [list(pair) for pair in zip(scores["choices"], scores["choices_norm"], strict=True)] == expected
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert scores[name] == pytest.approx(results[f"{name},none"])
