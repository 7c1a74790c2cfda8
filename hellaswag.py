"""
HellaSwag: choose the right one of four endings by the language model's loss on each.

    python hellaswag.py -m gpt2 -d cuda                   # an OpenAI model, all 10,042 validation items
    python hellaswag.py -m log/model_19073.pt -d cuda     # a checkpoint of train_gpt2.py

Completion style: the endings follow the raw context, `acc` picks the lowest sum of losses, `acc_norm` the lowest mean
per token. In this style OpenAI's GPT-2 124M has acc 0.2859 and acc_norm 0.2955. An item, one JSON object a line in
https://github.com/rowanz/hellaswag: {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using ...",
"is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}
"""

import argparse
import hashlib
import json
import urllib.request
from pathlib import Path

import torch
from torch.nn import functional as F

from lib.common import InputError, atomic_write, get_tokenizer, run_as_command
from lib.machine import sum_over_ranks

FOLDER = Path(__file__).parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
VAL_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def fetch(split):
    """Return the path of hellaswag/hellaswag_{split}.jsonl, downloading it (12 MB) where it is not there yet."""
    path = FOLDER / f"hellaswag_{split}.jsonl"
    if not path.exists():
        url = URL.format(split=split)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise InputError(
                f"cannot fetch {url} ({error}): copy that file to {path}, or name one with --data"
            ) from None
        if split == "val" and hashlib.sha256(content).hexdigest() != VAL_SHA256:
            raise InputError(f"{url} is not the file that published results are for (its sha256 differs): try again")
        FOLDER.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    return path


def iterate_examples(split="val", path=None):
    """Yield the items of a split, or of the .jsonl file `path`, as dicts with at least ctx, label and four endings."""
    path = path or fetch(split)
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    example = json.loads(line.decode("utf-8"))
                    assert isinstance(example["ctx"], str) and example["label"] in range(4)
                    assert len(example["endings"]) == 4 and all(isinstance(end, str) for end in example["endings"])
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise InputError(
                        f"{path}, line {number} is not a HellaSwag item (a JSON object with ctx, label 0 to 3 and "
                        f"4 endings): {error!r}. Mend it, or delete the file to fetch it again"
                    ) from None
                yield example
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def render_example(example):
    """Render an item as (data, tokens, mask, label).

    tokens: (4, N) int64, context then ending in each row, zeros after; mask: (4, N) int64, 1 on the ending's tokens;
    label: index of the right ending; data: the same as plain lists, for use outside Python.
    """
    encode = get_tokenizer().encode_ordinary
    context = encode(example["ctx"])
    endings = [encode(" " + ending) for ending in example["endings"]]  # GPT-2's words carry their space in front
    longest = len(context) + max(map(len, endings))
    tokens = torch.zeros(4, longest, dtype=torch.long)
    mask = torch.zeros(4, longest, dtype=torch.long)
    for row, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[row, :end] = torch.tensor(context + ending)
        mask[row, len(context) : end] = 1
    data = {"label": example["label"], "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, example["label"]


def make_batches(examples, rank=0, world_size=1, max_length=1024, batch_size=32):
    """Return this rank's share of the items as a list of (tokens (4n, N), mask (4n, N), labels (n,)), n <= batch_size.

    Items of like length go together, and N is a multiple of 32: little padding, and few shapes to plan kernels for.
    Items of more than max_length tokens lose the start of their context. Every rank gets the same number of batches;
    the last ones may be empty.
    """
    rendered = sorted((render_example(example)[1:] for example in examples), key=lambda item: item[0].size(1))
    mine = rendered[rank::world_size]
    batches = []
    for start in range(0, -(-len(rendered) // world_size), batch_size):
        items = mine[start : start + batch_size]
        width = min(max_length, -(-max((tokens.size(1) for tokens, _, _ in items), default=0) // 32) * 32)
        tokens, mask = torch.zeros(2, 4 * len(items), width, dtype=torch.long)
        for i, (item_tokens, item_mask, _) in enumerate(items):
            item_tokens, item_mask = item_tokens[:, -max_length:], item_mask[:, -max_length:]
            tokens[4 * i : 4 * i + 4, : item_tokens.size(1)] = item_tokens
            mask[4 * i : 4 * i + 4, : item_mask.size(1)] = item_mask
        batches.append((tokens, mask, torch.tensor([label for _, _, label in items], dtype=torch.long)))
    return batches


def load(rank, local_rank, world_size, device, max_length):
    """This rank's HellaSwag batches; None on all ranks, said once, where a machine has no copy and can fetch none."""
    have = 1
    if local_rank == 0:
        try:
            fetch("val")
        except InputError as error:
            have = 0
            print(f"going on without HellaSwag: {error}", flush=True)
    if sum_over_ranks(torch.tensor(have, device=device)).item() < world_size:
        return None
    return make_batches(iterate_examples("val"), rank, world_size, max_length)


@torch.no_grad()
def score(model, tokens, mask):
    """Sum and mean, over the masked tokens of each row, of the loss in nats: two float32 tensors (4n,).

    Only the positions that predict an ending's token go through the output head, which is most of its work saved.
    The losses are float32: bfloat16 logits tie on 2.6% of the items.
    """
    predicts = mask[:, 1:].bool()  # position t predicts token t + 1
    hidden = model.hidden_states(tokens)[:, :-1][predicts]
    targets, found = tokens[:, 1:][predicts], []
    on_cpu = hidden.device.type == "cpu"  # where fresh memory costs more than the softmax: few rows at a time, in place
    chunk = 128 if on_cpu else 2048
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.head(h)
        log_p = torch.log_softmax(logits, dim=1, out=logits if on_cpu else None)
        found.append(F.nll_loss(log_p, y, reduction="none"))
    losses = torch.zeros(predicts.shape, device=tokens.device)
    losses[predicts] = torch.cat(found)
    total = losses.sum(dim=1)
    return total, total / predicts.sum(dim=1)


def evaluate(model, batches, device, before_batch=lambda: None):
    """Return int64 counts (items right by sum, items right by mean, items) over batches of `make_batches`.

    The model scores in eval mode and is left as it was found. before_batch() is called before each.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.long, device=device)
    for tokens, mask, labels in batches:
        before_batch()
        if len(labels):
            labels = labels.to(device)
            total, mean = score(model, tokens.to(device), mask.to(device))
            counts[0] += (total.view(-1, 4).argmin(dim=1) == labels).sum()
            counts[1] += (mean.view(-1, 4).argmin(dim=1) == labels).sum()
            counts[2] += len(labels)
    model.train(was_training)
    return counts


def run(model_name, device, path, limit):
    from itertools import islice

    from tqdm import tqdm

    from train_gpt2 import load_model

    torch.set_float32_matmul_precision("high")
    model = load_model(model_name).to(device).eval()
    examples = islice(iterate_examples("val", path), limit)
    batches = make_batches(examples, max_length=model.config.block_size)
    if sum(len(labels) for _, _, labels in batches) == 0:
        raise InputError(f"{path} holds no items")
    right, right_norm, total = evaluate(model, tqdm(batches, desc="HellaSwag", unit="batch"), device).tolist()
    print(f"{total} acc: {right / total:.4f} acc_norm: {right_norm / total:.4f}")


def main():
    parser = argparse.ArgumentParser(description="Score a model on HellaSwag", allow_abbrev=False)
    parser.add_argument("-m", "--model", default="gpt2", help="OpenAI model name or checkpoint (default: %(default)s)")
    parser.add_argument(
        "-d", "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps"
    )
    parser.add_argument("--data", help="a .jsonl of items (default: the validation set, fetched on first use)")
    parser.add_argument("--limit", type=int, help="score only the first N items")
    args = parser.parse_args()
    run_as_command(run, args.model, args.device, args.data, args.limit)


if __name__ == "__main__":
    main()
