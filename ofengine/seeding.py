"""Seeds: every random thing of a run as a function of the run's seed and the epoch."""

from __future__ import annotations

import random

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.data import Batches


def seed_everything(seed: int) -> int:
    """Seed Python's, numpy's and OneFlow's global generators; return ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    flow.manual_seed(seed)
    return seed


def derive_seed(*parts: int) -> int:
    """A seed that is a function of ``parts`` (numpy's SeedSequence), from 0 to 2**31 - 1."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def seed_epoch(seed: int, epoch: int, train: Batches, task: nn.Module) -> None:
    """Make shuffling, dropout and the global generators functions of (seed, epoch) alone.

    Each dropout layer gets a seed of its own; left to itself, OneFlow gives all of them the
    same one, so that layers of one shape share their masks.
    """
    train.reseed(derive_seed(seed, epoch, 0))
    seed_everything(derive_seed(seed, epoch, 1))
    for index, module in enumerate(task.modules()):
        if isinstance(module, nn.Dropout):
            module.generator.manual_seed(derive_seed(seed, epoch, 2, index))
