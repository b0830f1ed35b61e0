"""Seeds: every random thing of a run as a function of the run's seed and the epoch."""

from __future__ import annotations

import oneflow as flow
from oneflow import nn

from ofengine._oneflow.generator_seeds import GeneratorSeeds
from ofengine.data.batches import Batches
from ofengine.data.loading import derive_seed, seed_everything

__all__ = ["BatchSeeds", "derive_seed", "seed_epoch", "seed_everything"]


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


_ODD = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio: its multiples are far from each other in all bits."""


class BatchSeeds:
    """Makes what a step draws a function of (seed, epoch, layer, batch) alone.

    Where an optimizer step averages several batches, it does not matter then which process goes
    through which of them: ranks draw the masks that one process would.
    """

    def __init__(self, seed: int, epoch: int, task: nn.Module) -> None:
        self._seeds = [(GeneratorSeeds(flow.default_generator), derive_seed(seed, epoch, 3))]
        for index, module in enumerate(task.modules()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                own = derive_seed(seed, epoch, 4, index)
                self._seeds.append((GeneratorSeeds(module.generator), own))

    def begin(self, number: int) -> None:
        """The step of the batch with this number of the epoch, of all ranks together, comes."""
        for generator, seed in self._seeds:
            generator.seed(_behind(seed, number + 1))

    def load(self, number: int) -> None:
        """The batch with this number comes to be loaded, in one process behind the step before it.

        So ranks that load each other's batches draw alike, whichever steps they themselves took.
        """
        if number:
            generator, seed = self._seeds[0]
            generator.seed(_behind(seed, number))


def _behind(seed: int, batches: int) -> int:
    """The seed that holds once the step of so many batches has begun."""
    return (seed + batches * _ODD) % 2**63
