"""A rank's share of the batches: every N-th of those that one process would go through.

All ranks go through the same order, and a rank loads its own batches of it. In the place of each
of the others' it has :data:`OTHERS`, so that places, windows and the end are known to all alike.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Iterator

import attrs


class _Mark:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


OTHERS: Any = _Mark("OTHERS")
"""Stands for a batch that another rank takes."""
ABSENT: Any = _Mark("ABSENT")
"""Stands for the batch of a rank that has none in a round: the data has come to its end."""


@attrs.frozen
class Share:
    """Which of the batches are this rank's."""

    rank: int
    size: int

    def has(self, number: int) -> bool:
        """True where the batch with this number, from 0 on, is this rank's."""
        return number % self.size == self.rank

    def rounds(self, batches: int) -> int:
        """So many batches are there for the rank that has most of them."""
        return -(-batches // self.size)

    def of(self, batches: Iterable[Any], first: int) -> Iterator[Any]:
        """``batches``, which begin at the number ``first``, with the others' replaced."""
        for number, batch in enumerate(batches, first):
            yield batch if self.has(number) else OTHERS

    def among(
        self,
        own: Iterator[Any],
        first: int,
        known_until: Callable[[int], int],
        before_own: Callable[[int], None],
    ) -> Iterator[Any]:
        """The ``own`` batches, loaded one by one, and :data:`OTHERS` between them.

        Args:
            own: this rank's batches from the number ``first`` on.
            first: the number of the batch that comes first, whosever it is.
            known_until: finds out whether there are so many batches; says how many there are, up
                to that number.
            before_own: called with the number of a batch before it is loaded.
        """
        number = first
        while True:
            end = (number // self.size + 1) * self.size
            until = known_until(end)
            while number < until:
                if self.has(number):
                    before_own(number)
                    batch = next(own, OTHERS)
                    if batch is OTHERS:
                        return
                    yield batch
                else:
                    yield OTHERS
                number += 1
            if until < end:
                return


ALONE = Share(0, 1)
"""All of them."""
