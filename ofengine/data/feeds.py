"""How a pass over several loaders is begun, at its start or behind batches that are done.

Each loader's order is drawn where a run that never stopped draws it: pass by pass, batch by batch,
the loaders in turn. So the samplers may share a generator, and draw when they like.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, Deque, Iterator, Optional, Sequence, Tuple

from oneflow.utils.data import DataLoader

from ofengine._oneflow.loaders import draw_as_begun
from ofengine.data.combined import END, CombinedLoader, length_of, rows
from ofengine.data.loading import Order, can_skip, open_source
from ofengine.data.sources import describe_once, ended_by_its_own, is_iterator
from ofengine.errors import DataError


def can_skip_all(combined: CombinedLoader) -> bool:
    """True where :func:`open_combined` can begin behind batches without loading them."""
    return all(can_skip(each) and length_of(each) is not None for each in combined.loaders)


def open_combined(
    combined: CombinedLoader, skipped: int, seed: Sequence[int], order: Order, what: str
) -> Iterator[Any]:
    """As :func:`~ofengine.data.loading.open_source`, of all loaders together.

    ``skipped`` is 0 where they cannot be skipped (:func:`can_skip_all`). ``what`` is how errors
    call them.
    """
    feeds = [
        _Feed(each, f"{what}[{name!r}]", (*seed, number))
        for number, (name, each) in enumerate(zip(combined.names, combined.loaders))
    ]
    order.parts = [feed.order for feed in feeds]
    batches = rows(combined, feeds, skipped)
    for _ in range(skipped):
        next(batches)
    for feed in feeds if skipped else ():
        feed.open()
    return batches


class _Feed:
    """The batches of one of the loaders. See :class:`ofengine.data.combined.Feed`."""

    def __init__(self, source: Any, what: str, seed: Tuple[int, ...]) -> None:
        self._source, self._what, self._seed = source, what, seed
        self._length = length_of(source)
        self._passes = self._position = 0
        self._drawn: Optional[_Drawn] = None
        self._batches: Optional[Iterator[Any]] = None
        self.order = Order()

    def begin(self, number: int, skips: bool) -> None:
        """See :class:`~ofengine.data.combined.Feed`."""
        self._passes += 1
        self._position, self._batches, self._drawn = 0, None, None
        self._noted, note = Order(), self.order.note  # not self: circles keep workers too long
        self._noted.note = lambda given: note((number + given[0], given[1]))
        if not skips:
            self.open()
        elif isinstance(self._source, DataLoader):
            self._drawn = _Drawn(self._source)

    def open(self) -> None:
        """Begin to load what was not passed by, where there is something and it is not begun."""
        if not self._passes or self._batches is not None or self._position == self._length:
            return
        seed, skipped = (*self._seed, self._passes), self._position
        if self._drawn is not None:
            drawn, skipped = self._drawn.left(), 0
            batches = open_source(self._source, 0, seed, self._noted, drawn=drawn)
        else:
            batches = open_source(self._source, skipped, seed, self._noted)
        if isinstance(self._source, DataLoader):
            batches = ended_by_its_own(batches, self._source, self._what, self._position)
        self._batches = batches

    def take(self, skips: bool) -> Any:
        """See :class:`~ofengine.data.combined.Feed`."""
        if self._position == self._length:
            self.finish()
            return END
        if skips:
            batch = self._pass_by()
        else:
            batch = END if self._batches is None else next(self._batches, END)
        if batch is not END:
            self._position += 1
        elif self._length is not None:
            raise DataError(
                f"{self._what} gave {self._position} batches, though its length is "
                f"{self._length}: correct its __len__, or remove it."
            )
        return batch

    def _pass_by(self) -> Any:
        if self._drawn is None:
            return None
        numbered = next(self._drawn, END)
        if numbered is not END:
            self._noted.note(numbered)
        return numbered

    def finish(self) -> None:
        """Go behind the last batch; raises where there are more than its length tells of."""
        if self._position == self._length and self._batches is not None:
            batches, self._batches = self._batches, None
            if next(batches, END) is not END:
                raise DataError(
                    f"{self._what} has more batches than its length, {self._length}: correct its "
                    "__len__, or remove it."
                )

    def gave_nothing(self) -> DataError:
        """See :class:`~ofengine.data.combined.Feed`."""
        once = f": {describe_once(self._source)}" if is_iterator(self._source) else ""
        return DataError(f"{self._what} gave no batch when it was begun anew{once}.")


class _Drawn:
    """The numbered batches of a DataLoader's order, drawn as a pass over it draws them."""

    def __init__(self, loader: DataLoader) -> None:
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._numbered = enumerate(iter(sampler))
        draw_as_begun(loader)
        if loader.num_workers and not loader.persistent_workers:
            self._numbered = enumerate(iter(sampler))  # which an iterator with workers does
        ahead = loader.num_workers * loader.prefetch_factor  # what workers are given at once
        self._ahead: Deque[Any] = deque(itertools.islice(self._numbered, ahead))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._ahead.extend(itertools.islice(self._numbered, 1))
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()

    def left(self) -> Iterator[Any]:
        """Those that were not taken, no further one being drawn."""
        return itertools.chain(self._ahead, self._numbered)
