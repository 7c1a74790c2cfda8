"""
Published runs to compare with, from assets/reference_runs.csv, which names their sources.
"""

import csv
import math
from itertools import groupby, pairwise
from typing import NamedTuple

from lib.files import ROOT

SIZES = {(12, 768): "124M", (24, 1024): "350M", (36, 1280): "774M", (48, 1600): "1558M"}  # by n_layer and n_embd
DATASETS = ("fineweb-edu", "fineweb")
OTHER = "other"  # a size or data set without published results


class Published(NamedTuple):
    """val, hella: (tokens, value) pairs; tokens are None for a model whose training is not published."""

    name: str
    dataset: str
    val: list
    hella: list


def size_of(config):
    """The size of a model of this config, a GPTConfig, as the published runs name it."""
    return SIZES.get((config.n_layer, config.n_embd), OTHER)


def dataset_of(shards):
    """Which of DATASETS the shards with these names hold: edufineweb_val_000000.npy is fineweb-edu."""
    if not shards or not all("fineweb" in name for name in shards):
        return OTHER
    return "fineweb-edu" if all("edu" in name for name in shards) else "fineweb"


def published(size):
    """The published runs and models of a size."""
    with open(ROOT / "assets" / "reference_runs.csv") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if size in row["run"].split()]

    def points(rows, column):
        return [(int(row["tokens"]) if row["tokens"] else None, float(row[column])) for row in rows if row[column]]

    runs = [(name, list(group)) for name, group in groupby(rows, key=lambda row: row["run"])]
    return [
        Published(name, rows[0]["dataset"].split(" ")[0], points(rows, "val_loss"), points(rows, "hellaswag_acc_norm"))
        for name, rows in runs
    ]


def compare(loss, tokens, config, shards):
    """How a model's validation loss on FineWeb-Edu after this many tokens compares with the published run of its size,
    as text; "" if there is none. The published curve is interpolated linearly over log(tokens)."""
    for run in published(size_of(config)) if dataset_of(shards) == "fineweb-edu" else []:
        for (before, higher), (after, lower) in pairwise(run.val):
            if 0 < before <= tokens <= 1.0001 * after:  # its last record is from the step before the last
                share = math.log(tokens / before) / math.log(after / before)
                difference = loss - (higher + share * (lower - higher))
                word = "worse" if difference > 0 else "better"
                return f" | {abs(difference):.4f} {word} than {run.name} after as many tokens"
    return ""


def beside(config, shards):
    """The results of the published runs and models of this size, (name, validation loss, HellaSwag acc_norm) each; None
    where they are not known or, for the loss, from other data."""
    rows = []
    for run in published(size_of(config)):
        losses = run.val if run.dataset in ("", dataset_of(shards)) else []
        rows.append((run.name, *(points[-1][1] if points else None for points in (losses, run.hella))))
    return [row for row in rows if row[1:] != (None, None)]


def flags(tokens_per_step, config, shards):
    """What tools/plot.py needs to know about a run, as its flags."""
    flags = {"--tokens_per_step": tokens_per_step, "--size": size_of(config), "--dataset": dataset_of(shards)}
    return [str(text) for item in flags.items() for text in item]
