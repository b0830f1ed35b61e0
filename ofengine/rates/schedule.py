"""What a OneFlow scheduler would write into the groups, without writing it."""

from __future__ import annotations

import copy
from typing import Any, Dict, List

from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine.errors import RateError


class _StandInGroup(Dict[str, Any]):
    """A parameter group's options, apart from the optimizer's own."""

    @property
    def options(self) -> Dict[str, Any]:
        return self


class _StandInOptimizer:
    """What a scheduler sees of its optimizer: groups with rates, and no parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [_StandInGroup(group.options) for group in optimizer.param_groups]


class RecordedSchedule:
    """The rates of a scheduler at each of its positions, recorded from a twin of it.

    The twin is a deep copy of the scheduler over a stand-in of its optimizer. It is stepped
    as far as somebody asks and every rate is kept, so that the original is left alone and any
    deterministic scheduler works, a user's own subclass too.

    Args:
        scheduler: a ``oneflow.optim.lr_scheduler`` object; position 0 is where it stands now.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        stand_in = _StandInOptimizer(scheduler.optimizer)
        try:
            self._twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
        except Exception as error:
            raise RateError(
                f"{type(scheduler).__name__} cannot be copied ({error}): the engine steps a copy "
                "of the scheduler ahead of training; keep open files, locks and tensors out of it."
            ) from error
        self._twin.verbose = False
        self._groups = stand_in.param_groups
        self._recorded: List[List[float]] = [self._read()]

    def lr(self, group: int, position: int) -> float:
        """The scheduler's rate of ``group`` after ``position`` calls of its ``step``."""
        while len(self._recorded) <= position:
            self._twin.step()
            self._recorded.append(self._read())
        return self._recorded[position][group]

    def _read(self) -> List[float]:
        return [float(group["lr"]) for group in self._groups]
