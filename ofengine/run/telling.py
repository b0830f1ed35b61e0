"""Telling: whom a hook was told to, and who is still to be told of the moment at hand."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List

import attrs

from ofengine.run.progress import Point

HOOK_AT = {
    Point.EPOCH_START: "on_train_epoch_start",
    Point.STEPPED: "on_train_batch_end",
    Point.VALIDATED: "on_validation_end",
    Point.EPOCH_END: "on_train_epoch_end",
}
"""The hook that is fired at each point at which a checkpoint does not repeat what belongs to it."""


@attrs.define
class Telling:
    """How far the calls of the hook have come that is being fired, asked for where a run is saved.

    Attributes:
        owners: by hook the callbacks, and the task, that it calls, in order.
        left: the calls of the hook at hand; an iterator of a list, so that a step pays next to
            nothing for it.
        owed: who is to be told yet of the moment that a resumed run goes on from.
        failed: True where the call that was begun last raised an error, and so is owed.
        sending: True while, or since, a row did not come to all loggers.
    """

    owners: Dict[str, List[Any]] = attrs.Factory(dict)
    left: Iterator[Callable[..., Any]] = attrs.Factory(lambda: iter([]))
    owed: List[Any] = attrs.Factory(list)
    failed: bool = False
    sending: bool = False

    def untold(self, point: Point) -> List[Any]:
        """Who was not told of the moment at hand, in the order of the calls."""
        hook = HOOK_AT.get(point)
        # As for pickle: the iterator tells its place in the list, and none behind the list's end.
        state: Any = self.left.__reduce__()
        place = state[2:]
        if hook is None or not place:
            return []
        return self.owners.get(hook, [])[int(place[0]) - self.failed :]

    def left_for_later(self, point: Point) -> List[Any]:
        """Those of them that a resumed run tells; it has no batch and no outputs to give."""
        untold = self.untold(point)
        return [each for each in untold if point is not Point.STEPPED or _needs_no_batch(each)]

    def is_lost(self, point: Point) -> bool:
        """True where a run that is resumed from this moment could not make up for all.

        Who raised an error at a batch was told of it, whatever it has made of that.
        """
        others = self.untold(point)[self.failed :]
        return self.sending or (point is Point.STEPPED and not all(map(_needs_no_batch, others)))


def _needs_no_batch(owner: Any) -> bool:
    """True for a ModelCheckpoint: of ofengine's own that fire last, each only looks at the run."""
    at_batch = getattr(owner, "on_train_batch_end", None)
    is_own = getattr(at_batch, "__module__", "").startswith("ofengine.")
    return is_own and bool(getattr(owner, "fires_last", False))
