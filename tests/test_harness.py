"""--style harness against the real thing: where lm-eval[hf] is installed, its choices are ours, item by item."""

import json
import random
import string
from pathlib import Path

import pytest
import torch
from support import run

from lib import checkpoint
from lib.tokenizer import get_tokenizer
from train_gpt2 import GPT, GPTConfig

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm-eval[hf]")
transformers = pytest.importorskip("transformers")
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


def bytes_to_unicode():
    """GPT-2's way to write any byte as a printable character: the unprintable ones are moved to 256 and above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(moved)}}


def save_tokenizer(folder):
    """Our ranks as Hugging Face's vocab.json and merges.txt: a token was made by joining its two parts when all joins
    of a lower rank were done."""
    ranks, letters = get_tokenizer()._mergeable_ranks, bytes_to_unicode()

    def written(token):
        return "".join(letters[byte] for byte in token)

    def parts(token):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            i = min(range(len(pieces) - 1), key=lambda i: ranks.get(pieces[i] + pieces[i + 1], 1 << 30))
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    merges = [" ".join(map(written, parts(token))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    vocabulary = {written(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)


def save_both(folder):
    """A model with weights large enough to have opinions, as our checkpoint and in Hugging Face's format."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    (folder / "log").mkdir()
    c = model.config
    contents = {"model": model.state_dict(), "config": vars(c), "train_config": {}, "step": 0}
    checkpoint.save_checkpoint(folder / "log", contents, keep=2)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50257, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                n_head=c.n_head))  # fmt: skip
    weights = model.state_dict()
    for key, weight in theirs.state_dict().items():
        is_convolution = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weight.copy_(weights[key].t() if is_convolution else weights[key][: len(weight)])
    theirs.save_pretrained(folder / "hf")
    return folder / "log" / "model_00000.pt", folder / "hf"


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
    save_tokenizer(theirs)
    expected, results = lm_eval_choices(theirs, items, tmp_path)
    result = run("hellaswag.py", "-m", ours, "-d", "cpu", "--data", items, "--style", "harness", "--json",
                 tmp_path / "scores.json")  # fmt: skip
    assert result.returncode == 0, result.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [list(pair) for pair in zip(scores["choices"], scores["choices_norm"], strict=True)] == expected
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert scores[name] == pytest.approx(results[f"{name},none"])
