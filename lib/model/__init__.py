"""Weights in and out, what they cost, and what is published of others."""

from lib.model.cpu_loss import chunked_cross_entropy
from lib.model.memory import fit_micro_batch

__all__ = ["chunked_cross_entropy", "fit_micro_batch"]
