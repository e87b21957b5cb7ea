"""Randomness as a function of what is being done, not of what was done before.

A sample is augmented and masked under a seed of (seed, epoch, sample index), a batch of a step draws (drop path, Mixup)
under one of (seed, epoch, step, rank, batch). So nothing depends on the number of workers, and a run can be taken up at
any step without the state of a generator.
"""

import random

import numpy as np
import torch


def seed_words(*keys: int) -> list[int]:
    """Four seeds of 32 bits, as good as independent, from a tuple of non-negative integers."""
    # the length goes in because SeedSequence by itself does not tell (1,) from (1, 0)
    return [int(word) for word in np.random.SeedSequence((len(keys), *keys)).generate_state(4)]


def seed_all(*keys: int) -> None:
    """Seed Python's, NumPy's and torch's global generators from a tuple of non-negative integers."""
    words = seed_words(*keys)
    seed_cpu(words)
    torch.manual_seed(words[2])


def seed_cpu(words: list[int]) -> None:
    """As `seed_all`, but of torch's generators only the CPU's, which is a hundred times faster."""
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
