"""
The random numbers of a step.
"""

import numpy as np


def step_seed(seed, step, rank):
    """A seed for each step and rank, so that resuming needs no random states, and ranks draw different numbers."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
