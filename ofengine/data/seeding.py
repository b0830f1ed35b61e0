"""Seeds: every random thing of a run as a function of the run's seed and the epoch."""

from __future__ import annotations

from oneflow import nn

from ofengine.data.batches import Batches
from ofengine.data.loading import derive_seed, seed_everything

__all__ = ["derive_seed", "seed_epoch", "seed_everything"]


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
