"""Weights in and out, and what they cost."""

from lib.model.cpu_loss import chunked_cross_entropy
from lib.model.memory import fit_micro_batch

__all__ = ["chunked_cross_entropy", "fit_micro_batch"]
