"""Weights in, and the rehearsal of a run."""

from lib.model import load
from lib.model.rehearsal import rehearse

__all__ = ["load", "rehearse"]
