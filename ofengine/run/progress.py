"""Progress: where a run is, as plain data; changed by the loops, and where a run is resumed."""

from __future__ import annotations

import enum
from typing import Any, Dict

import attrs


class Point(enum.Enum):
    """How far a run is within a batch or epoch: what is done, and so where it would go on."""

    BEGIN = "begin"
    """No epoch was begun."""
    EPOCH_START = "epoch_start"
    """on_train_epoch_start; no batch was fetched."""
    STEP = "step"
    """Between on_train_batch_start and on_train_batch_end: nothing that is whole can be saved."""
    STEPPED = "stepped"
    """The step was made; on_train_batch_end; logging and validation are to come."""
    VALIDATING = "validating"
    """In the validation that follows a batch."""
    VALIDATED = "validated"
    """on_validation_end."""
    READY = "ready"
    """All that belongs to the batch is done."""
    EPOCH_END = "epoch_end"
    """on_train_epoch_end."""
    OVER = "over"
    """on_train_end, or after it."""


BETWEEN_EPOCHS = (Point.BEGIN, Point.EPOCH_START, Point.EPOCH_END, Point.OVER)
"""The points that lie in no epoch's batches."""


@attrs.define
class Progress:
    """Where a run is. ``state()`` is what a checkpoint keeps of it, ``load()`` the inverse."""

    global_step: int = 0
    """Optimizer steps done so far."""
    epoch: int = 0
    """The epoch being run, from 0."""
    batch_idx: int = 0
    """The batch stepped last, from 0 in each epoch; -1 before the first."""
    is_last_batch: bool = False
    """True from the beginning of an epoch's last batch until the next batch."""
    batches_done: int = 0
    """Batches of this epoch done, by all ranks together."""
    batches_seen: int = 0
    """Training batches done in the whole run, by all ranks together."""
    point: Point = Point.BEGIN
    """How far the run is within the batch or epoch."""

    def state(self) -> Dict[str, Any]:
        """Plain values. An epoch that is over counts as the last one's end."""
        return {
            "point": self.point.value,
            "epoch": self.epoch - (self.point is Point.OVER),
            "batches_done": self.batches_done,
            "global_step": self.global_step,
            "batches_seen": self.batches_seen,
        }

    def load(self, state: Dict[str, Any], ranks: int = 1) -> None:
        """Be where :meth:`state` was taken, by any number of ranks; now there are ``ranks``."""
        self.point = Point(state["point"])
        self.epoch = state["epoch"] + (self.point is Point.OVER)
        self.batches_done = state["batches_done"]
        done_by_all = self.batches_done // ranks
        if self.point in BETWEEN_EPOCHS:
            done_by_all = -(-self.batches_done // ranks)
        self.batch_idx = done_by_all - 1
        self.global_step = state["global_step"]
        self.batches_seen = state["batches_seen"]
