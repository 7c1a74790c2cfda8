"""
HellaSwag: pick the most likely of four endings.

    python hellaswag.py -m gpt2 -d cuda                           # an OpenAI model, all 10,042 validation items
    python hellaswag.py -m log/model_19073.pt --style harness     # a checkpoint, as lm-evaluation-harness scores it

`acc` picks the ending with the lowest summed loss, `acc_norm` that with the lowest sum by length. OpenAI's GPT-2 has:

    style        context                              acc_norm divides by    124M               1558M
    completion   as it is in ctx                      tokens                 0.2859 / 0.2955    0.3842 / 0.4893
    harness      activity and ctx, without [marks]    characters             0.2892 / 0.3114    0.4004 / 0.5089

Items are JSON objects, one per line, as in https://github.com/rowanz/hellaswag; FIELDS: what each style reads.
"""

import lib.start  # noqa: F401 - Ctrl-C during the imports below ends the program at once

import argparse
import hashlib
import json
import re
import urllib.request
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F

from lib.console import UserError, run_as_command, say
from lib.data.readers import records_of
from lib.device import check_device, default_device, flash_attention
from lib.distributed import sum_over_ranks
from lib.files import atomic_write, expand
from lib.model.load import check_usable
from lib.tokenizer import EOT, VOCAB_SIZE, get_tokenizer

FOLDER = Path(__file__).parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
SHA256 = {"val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}  # the file of published results
FIELDS = {"completion": ["ctx"], "harness": ["activity_label", "ctx_a", "ctx_b"]}  # a style's context is made of these


def fetch(split):
    """Return the path of hellaswag/hellaswag_{split}.jsonl, verified; downloads it (12 MB) if it is missing."""
    path, url = FOLDER / f"hellaswag_{split}.jsonl", URL.format(split=split)
    try:
        found = path.exists()
        content = path.read_bytes() if found else urllib.request.urlopen(url, timeout=30).read()
        if split in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[split]:
            what, remedy = (path, "delete it to fetch it again") if found else (url, "try again")
            raise UserError(f"{what} is not the published file, {len(content):,} bytes, wrong sha256: {remedy}")
        if not found:
            FOLDER.mkdir(exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot fetch {url} to {path} ({error}): copy it there, or give another with --data") from None
    return path


def iterate_examples(split="val", path=None, style="completion"):
    """Yield the items of a split, or of a file (.jsonl, a JSON list, the hub's .parquet), as dicts with the fields that
    the style needs and their label as an int. Raises UserError for an item without them; blank lines are skipped."""
    path = path or fetch(split)
    for number, line in enumerate(records_of(path), start=1):
        if line == b"":
            continue
        try:
            item = json.loads(line) if isinstance(line, bytes) else line
            if item["label"] == "":
                raise ValueError("an empty label, as in the test split, whose answers are secret: use another split")
            label, endings = int(str(item["label"])), item["endings"]  # the hub's own data set has "3"
            if label not in range(4) or len(endings) != 4:
                raise ValueError(f"label {label} and {len(endings)} endings")
            if {type(text) for text in [item[field] for field in FIELDS[style]] + endings} != {str}:
                raise ValueError("a value that is not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = f"a JSON object with {', '.join(FIELDS[style])}, label 0 to 3 and 4 endings"
            raise UserError(
                f"{path}, line {number}: --style {style} needs {wanted}, not {error!r:.200}: {line!s:.100}"
            ) from None
        yield {**item, "label": label}


def clean(text):
    """lm-evaluation-harness's preprocess(): [title], [step] and the like are WikiHow markup."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def encode(example, style="completion"):
    """An item as plain numbers: label, ctx_tokens, ending_tokens, lengths (what acc_norm divides by), width."""
    ids, context, space, endings = get_tokenizer().encode_ordinary, example.get("ctx"), " ", example["endings"]
    if style == "harness":
        cleaned = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
        context, endings = cleaned.rstrip(), [clean(ending) for ending in endings]
        space = cleaned[len(context) :] + " "  # the context's last space belongs to the next word
    tokens = [ids(space + ending) for ending in endings]  # GPT-2's words carry their space in front
    lengths = [len(ending) for ending in (endings if style == "harness" else tokens)]
    context = ids(context) or [EOT]  # without a context, an ending begins a document
    item = {"label": example["label"], "ctx_tokens": context, "ending_tokens": tokens, "lengths": lengths}
    return {**item, "width": len(context) + max(map(len, tokens))}


def lay_out(items, width):
    """Encoded items as (tokens, mask), both (4n, width) int64: a row is context, ending, zeros; mask 1 on endings."""
    tokens, mask = torch.zeros(2, 4 * len(items), width, dtype=torch.long)
    rows = [(item["ctx_tokens"] + ending, len(ending)) for item in items for ending in item["ending_tokens"]]
    for i, (row, ending) in enumerate(rows):
        end = min(width, len(row))
        tokens[i, :end] = torch.tensor(row[-width:])  # over-long rows are truncated on the left
        mask[i, max(0, end - ending) : end] = 1
    return tokens, mask


def render_example(example, style="completion"):
    """Render an item as (what encode() returns, tokens (4, N), mask (4, N), the index of the right ending)."""
    item = encode(example, style)
    return item, *lay_out([item], item["width"]), item["label"]


def make_batches(examples, rank=0, world_size=1, max_length=1024, style="completion", batch_size=32):
    """Return this rank's share as a list of (places in examples, tokens, mask, lengths (n, 4), labels (n,)).

    Items of similar length go together. Every rank gets the same number of batches, of which the last may be empty.
    """
    items = [{**encode(example, style), "place": place} for place, example in enumerate(examples)]
    if (long := sum(item["width"] > max_length + 1 for item in items)) and rank == 0:
        say(f"HellaSwag: {long:,} of {len(items):,} items are longer than {max_length} tokens: their contexts are cut")
    mine, batches = sorted(items, key=lambda item: item["width"])[rank::world_size], []
    for start in range(0, -(-len(items) // world_size), batch_size):
        share = mine[start : start + batch_size]
        width = -(-max((item["width"] for item in share), default=0) // 8) * 8  # few shapes to plan kernels for
        places, lengths, labels = (torch.tensor([i[key] for i in share]) for key in ("place", "lengths", "label"))
        # the last token of a row is not fed to the model, as it predicts nothing: a row may have one beyond max_length
        batches.append((places, *lay_out(share, min(width, max_length) + 1), lengths, labels))
    return batches


def load(rank, local_rank, world_size, device, max_length):
    """This rank's HellaSwag batches; None on all ranks, with a message, if a machine can neither find nor fetch it."""
    have = 1
    if local_rank == 0:
        try:
            fetch("val")
        except UserError as error:
            have = 0
            say(f"continuing without HellaSwag: {error}")
    have = sum_over_ranks(torch.tensor(have, device=device)).item()
    return make_batches(iterate_examples("val"), rank, world_size, max_length) if have == world_size else None


@torch.no_grad()
@flash_attention()
def score(model, batches, device, check_stop=lambda: None):
    """The endings' losses in nats, in the order of the batches: (n, 2, 4) float32, sums over tokens and normalized.

    Only the positions that predict an ending's token go through the output head, which saves most of its work. The
    model runs in eval mode, then returns to its own. check_stop() is called before each batch.
    """
    was_training = model.training
    model.eval()
    scores = [torch.empty(0, 2, 4, device=device)]
    for _, tokens, mask, lengths, labels in batches:
        check_stop()
        if len(labels) == 0:
            continue
        tokens = tokens.to(device)
        predicts = mask[:, 1:].bool().to(device)  # position t predicts token t + 1
        logits = model.head(model.hidden_states(tokens[:, :-1])[predicts])  # (N, vocab_size), float32
        logits[:, VOCAB_SIZE:] = -torch.inf  # the padded ids are not tokens
        found = F.cross_entropy(logits, tokens[:, 1:][predicts], reduction="none")
        losses = torch.zeros(predicts.shape, device=device).masked_scatter(predicts, found)
        total = losses.sum(dim=1).view(-1, 4)
        scores.append(torch.stack([total, total / lengths.to(device)], dim=1))
    model.train(was_training)
    return torch.cat(scores)


def evaluate(model, batches, device, check_stop=lambda: None):
    """Return int64 counts (items right by sum, items right normalized, items) over batches of `make_batches`."""
    labels = torch.cat([labels for *_, labels in batches]).long().to(device)
    right = score(model, batches, device, check_stop).argmin(dim=2) == labels[:, None]
    return torch.tensor([*right.sum(dim=0), len(labels)], device=device)


def run(model_name, device, path, limit, style="completion", json_path=None):
    from tqdm import tqdm

    from train_gpt2 import load_model

    path, json_path = path and expand(path), json_path and expand(json_path)
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}: it must be 1 or more")
    check_device(device)
    examples = list(islice(iterate_examples("val", path, style), limit))
    if not examples:
        raise UserError(f"{path} is empty: it must hold HellaSwag items, one JSON object per line")
    torch.set_float32_matmul_precision("high")
    model = load_model(model_name)
    check_usable(model_name, model)
    batches = make_batches(examples, max_length=model.config.block_size, style=style)
    scores = score(model.to(device), tqdm(batches, desc="HellaSwag", unit="batch"), device).cpu()
    chosen = scores.argmin(dim=2)[torch.cat([places for places, *_ in batches]).argsort()]  # in the file's order
    n, labels = len(examples), torch.tensor([example["label"] for example in examples])
    acc, acc_norm = (chosen == labels[:, None]).double().mean(dim=0).tolist()
    stderr, norm_stderr = ((p * (1 - p) / max(1, n - 1)) ** 0.5 for p in (acc, acc_norm))
    if not scores.isfinite().all():
        raise UserError(f"{model_name} gives NaN or infinite losses: use a checkpoint from before the run diverged")
    say(f"{style} style, standard errors: acc {stderr:.4f} acc_norm {norm_stderr:.4f}")
    say(f"{n} acc: {acc:.4f} acc_norm: {acc_norm:.4f}")
    if json_path:
        by_sum, by_norm = chosen.T.tolist()
        facts = dict(model=str(model_name), style=style, n=n, acc=acc, acc_stderr=stderr, acc_norm=acc_norm,
                     acc_norm_stderr=norm_stderr, choices=by_sum, choices_norm=by_norm)  # fmt: skip
        try:
            with atomic_write(json_path) as file:
                file.write(json.dumps(facts).encode())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {json_path}: {error}") from None


def main():
    parser = argparse.ArgumentParser(description="Score a model on HellaSwag", allow_abbrev=False)
    parser.add_argument("-m", "--model", default="gpt2", help="OpenAI name, checkpoint or exported folder")
    parser.add_argument("-d", "--device", default=default_device(), help="cuda, mps, cpu")
    parser.add_argument("--data", help="a file of items (default: the validation set, downloaded)")
    parser.add_argument("--limit", type=int, help="score only the first N items")
    parser.add_argument("--style", choices=FIELDS, default="completion", help="default: %(default)s")
    parser.add_argument("--json", help="write the scores and each item's choices to this file")
    run_as_command(run, *vars(parser.parse_args()).values(), must_print=True)


if __name__ == "__main__":
    main()
