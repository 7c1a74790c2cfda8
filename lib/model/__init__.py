"""Weights in and out, and what they cost."""

from lib.model.cpu_loss import fast_loss
from lib.model.memory import fit_micro_batch

__all__ = ["fast_loss", "fit_micro_batch"]
