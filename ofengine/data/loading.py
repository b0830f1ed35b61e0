"""How a pass over a dataloader is begun, at its start or behind batches that are done.

The randomness of a DataLoader's worker processes (augmentation, as a rule) is made a function of
the pass and of the batch's number, so that it does not matter which worker prepares a batch, what
that worker prepared before, or whether the pass was begun in the middle.
"""

from __future__ import annotations

import random
from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow.utils.data import DataLoader, IterableDataset

from ofengine._oneflow.loaders import open_with_indices


def derive_seed(*parts: int) -> int:
    """A seed that is a function of ``parts`` (numpy's SeedSequence), from 0 to 2**31 - 1."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def seed_everything(seed: int) -> int:
    """Seed Python's, numpy's and OneFlow's global generators; return ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    flow.manual_seed(seed)
    return seed


class _SeededIndices(List[Any]):
    """The indices of one batch; a worker that begins to load them is seeded for this batch."""

    def __init__(self, indices: Iterable[Any], parts: Tuple[int, ...]) -> None:
        super().__init__(indices)
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        seed_everything(derive_seed(*self.parts))
        return super().__iter__()

    def __reduce__(self) -> Any:
        # By itself a list is pickled by going through it, which would seed this very process.
        return _SeededIndices, (self[:], self.parts)


class _Indices:
    """A batch sampler (or sampler) from the ``skipped``-th of its batches on."""

    def __init__(self, sampler: Any, skipped: int, seed: Sequence[int], in_workers: bool) -> None:
        self._sampler = sampler
        self._skipped = skipped
        self._seed = tuple(seed)
        self._in_workers = in_workers
        self._newest = _IndicesIterator(iter(()), 0)

    def __iter__(self) -> Iterator[Any]:
        numbered: Iterator[Tuple[int, Any]] = enumerate(self._sampler)
        if self._in_workers:
            numbered = ((n, _SeededIndices(each, (*self._seed, n))) for n, each in numbered)
        self._newest = _IndicesIterator(numbered, self._skipped)
        return self._newest

    def go_ahead(self) -> None:
        """Go behind the skipped batches now, which draws the order they were in."""
        self._newest.go_ahead()

    def __len__(self) -> int:
        return len(self._sampler)


class _IndicesIterator:
    def __init__(self, numbered: Iterator[Tuple[int, Any]], skipped: int) -> None:
        self._numbered = numbered
        self._to_skip = skipped

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.go_ahead()
        return next(self._numbered)[1]

    def go_ahead(self) -> None:
        while self._to_skip:
            self._to_skip -= 1
            next(self._numbered, None)


def _is_plain(source: Any) -> bool:
    """True for a DataLoader that goes through a dataset by index, as the class itself does."""
    return (
        isinstance(source, DataLoader)
        and type(source).__iter__ is DataLoader.__iter__
        and not isinstance(source.dataset, IterableDataset)
        and (source.batch_sampler is not None or source.num_workers == 0)
    )


def can_skip(source: Any) -> bool:
    """True where :func:`open_source` can begin behind batches without loading them."""
    return _is_plain(source) or isinstance(source, (list, tuple))


def open_source(source: Any, skipped: int, seed: Sequence[int]) -> Iterator[Any]:
    """Begin a pass over ``source`` behind its first ``skipped`` batches.

    ``skipped`` is 0 where it cannot be skipped (:func:`can_skip`). ``seed`` is what the
    randomness in workers becomes a function of, with the batch's number.
    """
    if isinstance(source, (list, tuple)):
        return iter(source[skipped:] if skipped else source)
    if not _is_plain(source) or not (skipped or source.num_workers):
        return iter(source)
    in_workers = source.num_workers > 0
    made: List[_Indices] = []

    def wrap(own: Any) -> _Indices:
        made.append(_Indices(own, skipped, seed, in_workers))
        return made[0]

    opened = open_with_indices(source, wrap)
    made[0].go_ahead()
    return opened
