"""How a pass over a dataloader is begun, at its start or behind batches that are done.

The randomness of a DataLoader's worker processes (augmentation, as a rule) is made a function of
the pass and of the batch's number, so that it does not matter which worker prepares a batch, what
that worker prepared before, or whether the pass was begun in the middle.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow.utils.data import DataLoader, IterableDataset, get_worker_info

from ofengine._oneflow.loaders import SHARED_GENERATOR, forget_workers, noted, open_with_indices
from ofengine.data.generator_state import seed_generator
from ofengine.data.generators import find_generators
from ofengine.data.sources import is_sequence
from ofengine.ranks.shares import Share


def derive_seed(*parts: int) -> int:
    """A seed that is a function of ``parts`` (numpy's SeedSequence), from 0 to 2**31 - 1."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def seed_everything(seed: int) -> int:
    """Seed Python's, numpy's and OneFlow's global generators; return ``seed``.

    That of all DataLoaders which were given none is among them.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    flow.manual_seed(seed)
    SHARED_GENERATOR.manual_seed(seed)
    return seed


class Order:
    """Which samples the latest batches of a pass are made of, so that they are known again."""

    def __init__(self) -> None:
        self._given: Deque[Tuple[int, Any]] = deque(maxlen=_MOST_GIVEN)
        self.note: Callable[[Tuple[int, Any]], None] = self._given.append
        """Takes (index of the batch in the pass, what it is made of)."""
        self.parts: List[Order] = []
        """Of each loader, where several are gone through together."""
        self.known: Dict[int, str] = {}
        """Digests, by index, that were not taken from these batches: a checkpoint has them."""

    def samples(self, batch_idx: int) -> str:
        """Which samples the batch at this index is made of, as "samples 4, 5"; "" if not known."""
        if self.parts:
            return "; ".join(filter(None, (each.samples(batch_idx) for each in self.parts)))
        indices = next((each for number, each in self._given if number == batch_idx), None)
        if indices is None:
            return ""
        listed = indices[:] if isinstance(indices, list) else [indices]
        return f"samples {', '.join(map(str, listed[:8]))}{', ...' if listed[8:] else ''}"

    def digest(self, batch_idx: int) -> Optional[str]:
        """What tells the samples of the batch at this index of the pass; None where not known."""
        if batch_idx in self.known:
            return self.known[batch_idx]
        if self.parts:
            return "".join(each.digest(batch_idx) or "" for each in self.parts) or None
        indices = next((each for number, each in self._given if number == batch_idx), None)
        if indices is None:
            return None
        text = repr(_as_plain(indices[:] if isinstance(indices, list) else indices))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_MOST_GIVEN = 1024
"""More batches than workers load ahead."""


def _as_plain(indices: Any) -> Any:
    if isinstance(indices, (list, tuple)):
        return [_as_plain(each) for each in indices]
    return int(indices) if isinstance(indices, np.integer) else indices


_generators_of_worker: Dict[int, List[Any]] = {}
"""In a worker process: the generators that its copy of a dataset holds, found once."""


def _seed_worker(parts: Tuple[int, ...]) -> None:
    """Make all that is drawn for a batch in a worker process a function of ``parts``."""
    seed_everything(derive_seed(*parts))
    worker = get_worker_info()
    if worker is None:
        return
    own = _generators_of_worker.get(id(worker.dataset))
    if own is None:
        own = [each for _, each in find_generators(None, worker.dataset)]
        _generators_of_worker[id(worker.dataset)] = own
    for number, generator in enumerate(own):
        seed_generator(generator, derive_seed(*parts, number))


class _SeededIndices(List[Any]):
    """The indices of one batch; a worker that begins to load them is seeded for this batch."""

    def __init__(self, indices: Iterable[Any], parts: Tuple[int, ...]) -> None:
        super().__init__(indices)
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        _seed_worker(self.parts)
        return super().__iter__()

    def __reduce__(self) -> Any:
        # By itself a list is pickled by going through it, which would seed this very process.
        return _SeededIndices, (self[:], self.parts)


class _Indices:
    """A batch sampler (or sampler) from the ``skipped``-th of its batches on.

    With a ``share``, what it gives are the batches of that rank. All others are drawn too, and a
    whole round of them at once, so that samplers and generators are where they are on all ranks.
    """

    def __init__(
        self,
        sampler: Any,
        skipped: int,
        seed: Sequence[int],
        in_workers: bool,
        order: Order,
        share: Optional[Share] = None,
        drawn: Optional[Iterator[Tuple[int, Any]]] = None,
    ) -> None:
        self._sampler = sampler
        self._drawn = drawn
        self._skipped = skipped
        self._seed = tuple(seed)
        self._in_workers = in_workers
        self._order = order
        self._share = share
        self._newest = _IndicesIterator(iter(()), 0, order)

    def __iter__(self) -> Iterator[Any]:
        numbered = enumerate(self._sampler) if self._drawn is None else self._drawn
        if self._in_workers:
            numbered = ((n, _SeededIndices(each, (*self._seed, n))) for n, each in numbered)
        if self._share is None:
            self._newest = _IndicesIterator(numbered, self._skipped, self._order)
        else:
            self._newest = _OwnIndices(numbered, self._skipped, self._order, self._share)
        return self._newest

    def go_ahead(self) -> None:
        """Go behind the skipped batches now, which draws the order they were in."""
        self._newest.go_ahead()

    def known_until(self, number: int) -> int:
        """How many batches there are, up to ``number``; those of a share alone."""
        return self._newest.known_until(number)

    def __len__(self) -> int:
        return len(self._sampler)


class _IndicesIterator:
    def __init__(self, numbered: Iterator[Tuple[int, Any]], skipped: int, order: Order) -> None:
        self._numbered = numbered
        self._to_skip = skipped
        self._note = order.note

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._to_skip:
            self.go_ahead()
        numbered = next(self._numbered)
        self._note(numbered)
        return numbered[1]

    def go_ahead(self) -> None:
        while self._to_skip:
            self._to_skip -= 1
            numbered = next(self._numbered, None)
            if numbered is not None:
                self._note(numbered)

    def known_until(self, number: int) -> int:
        return number


class _OwnIndices(_IndicesIterator):
    """The batches of one rank; the others' are drawn and passed over."""

    def __init__(
        self, numbered: Iterator[Tuple[int, Any]], skipped: int, order: Order, share: Share
    ) -> None:
        super().__init__(numbered, skipped, order)
        self._share = share
        self._drawn = skipped
        self._own: Deque[Any] = deque()

    def __next__(self) -> Any:
        while not self._own:
            end = (self._drawn // self._share.size + 1) * self._share.size
            if self.known_until(end) < end and not self._own:
                raise StopIteration
        return self._own.popleft()

    def known_until(self, number: int) -> int:
        self.go_ahead()
        while self._drawn < number:
            numbered = next(self._numbered, None)
            if numbered is None:
                break
            self._note(numbered)
            if self._share.has(numbered[0]):
                self._own.append(numbered[1])
            self._drawn += 1
        return min(number, self._drawn)


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
    return _is_plain(source) or is_sequence(source)


def open_source(
    source: Any,
    skipped: int,
    seed: Sequence[int],
    order: Order,
    share: Optional[Share] = None,
    drawn: Optional[Iterator[Tuple[int, Any]]] = None,
) -> Iterator[Any]:
    """Begin a pass over ``source`` behind its first ``skipped`` batches.

    ``skipped`` is 0 where it cannot be skipped (:func:`can_skip`). ``seed`` is what the
    randomness in workers becomes a function of, with the batch's number. ``order`` takes note of
    the indices. With a ``share``, the batches of the other ranks are not loaded where that can be
    helped, and ``OTHERS`` stands in their place. ``drawn`` are the numbered indices of a pass that
    is begun already; default: those that the sampler gives.
    """
    if is_sequence(source):
        batches = iter(source[skipped:] if skipped else source)
        return batches if share is None else share.of(batches, skipped)
    if not _is_plain(source):
        if isinstance(source, DataLoader) and source.persistent_workers:
            # How far workers are with such data is known to them alone.
            forget_workers(source)
        return noted(iter(source)) if share is None else share.of(noted(iter(source)), 0)
    in_workers = source.num_workers > 0
    made: List[_Indices] = []

    def wrap(own: Any) -> _Indices:
        made.append(_Indices(own, skipped, seed, in_workers, order, share, drawn))
        return made[0]

    opened = open_with_indices(source, wrap)
    made[0].go_ahead()
    if share is None:
        return opened

    def seed_batch(number: int) -> None:
        if not in_workers:  # as a worker does for it
            seed_everything(derive_seed(*seed, number))

    return share.among(opened, skipped, made[0].known_until, seed_batch)
