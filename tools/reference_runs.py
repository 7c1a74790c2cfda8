"""
Published runs to compare with, from assets/reference_runs.csv, which names their sources.
"""

import csv
from itertools import groupby
from typing import NamedTuple

from lib.files import ROOT

SHAPES = {(12, 768): "124M", (24, 1024): "350M", (36, 1280): "774M", (48, 1600): "1558M"}  # by n_layer and n_embd
DATASETS = ("fineweb-edu", "fineweb")
OTHER = "other"  # a size or data set without published results


class Published(NamedTuple):
    """val, hella: (tokens, value) pairs; tokens are None for a model whose training is not published."""

    name: str
    dataset: str
    val: list
    hella: list


def dataset_of(names):
    """Which of DATASETS the shards of these names hold: edufineweb_val_000000.npy is fineweb-edu."""
    if not names or not all("fineweb" in name for name in names):
        return OTHER
    return "fineweb-edu" if all("edu" in name for name in names) else "fineweb"


def published(size, dataset):
    """The published runs and models of a size; losses on another data set are left out."""
    with open(ROOT / "assets" / "reference_runs.csv") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if size in row["run"].split()]

    def points(rows, column):
        return [(int(row["tokens"]) if row["tokens"] else None, float(row[column])) for row in rows if row[column]]

    for name, group in groupby(rows, key=lambda row: row["run"]):
        group = list(group)
        theirs = group[0]["dataset"].split(" ")[0]  # "" if it is not known
        losses = points(group, "val_loss") if theirs in ("", dataset) else []
        yield Published(name, theirs, losses, points(group, "hellaswag_acc_norm"))
