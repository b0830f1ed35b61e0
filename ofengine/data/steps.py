"""What the loop over batches is given: a batch with its place, and where a resumed run begins."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterator, List, Optional, Tuple

import attrs

Step = Tuple[Any, int, int, bool, bool]
"""One batch of an epoch, with its place in the accumulation window.

The batch, or :data:`STEPPED` where a resumed run has only what follows it left to do; its index;
how many batches its window has; True where the window closes, so that the optimizer steps after
this batch; True for the last batch of the epoch. A tuple, for it is made at every step.
"""


class _Stepped:
    def __repr__(self) -> str:
        return "STEPPED"


STEPPED: Any = _Stepped()


@attrs.frozen
class Resumption:
    """Where in an epoch a resumed run goes on."""

    done: int
    """Batches whose step was made."""
    again: bool
    """True where what follows the last of them is still to be done."""
    begin: Callable[[], None]
    """Puts the generators where they were at the beginning of the pass."""
    reached: Callable[[], None]
    """Puts the generators where they were when the run stopped."""
    watch: Optional[Callable[[Iterator[Any]], Iterator[Any]]] = None
    """Gives the first batch behind these, where making it is to be watched."""

    def behind(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches that follow those that were done."""
        return batches if self.watch is None else itertools.chain(self.watch(batches), batches)


def listed(batches: Iterator[Any]) -> List[Any]:
    """``list(batches)``, whose errors arrive.

    An error in the middle of ``list`` lets go of the tensors it has so far, and where workers made
    them OneFlow forgets the error meanwhile: "returned NULL without setting an exception".
    """
    listed: List[Any] = []
    listed.extend(batches)
    return listed


def step_of(count: int, accumulate: int, batch_idx: int, batch: Any) -> Step:
    place = batch_idx % accumulate
    window = min(accumulate, count - (batch_idx - place))
    return batch, batch_idx, window, place == window - 1, batch_idx == count - 1


def resumed_step(step: Step, resumption: Resumption) -> Iterator[Step]:
    """What a resumed run does about the batches that were done.

    Behind the last of them the generators are put where they were when the run stopped.
    """
    _, batch_idx, window, closes, is_last = step
    if batch_idx == resumption.done - 1:
        resumption.reached()
        if resumption.again:
            yield STEPPED, batch_idx, window, closes, is_last
