"""RatePlan: the one object that knows every group's learning rate at every step."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import attrs
import numpy as np
from oneflow import nn

from ofengine._oneflow import lower_rates
from ofengine.errors import RateError
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.schedule import RecordedSchedule


@attrs.frozen
class DecayEvents:
    """When the decay of ``LRDecayCallback`` happens, and what it multiplies by.

    Attributes:
        every_n_batches: an event follows every batch whose index is divisible by it, 0 included.
        per_epoch: count batch indices anew in each epoch (else over the whole run).
        key: the groups' key that holds the factor, "lr_decay_scale" or, as in the cookbook's
            code, "lr_scale" (which then is no constant multiplier).
    """

    every_n_batches: int = 10
    per_epoch: bool = True
    key: str = "lr_decay_scale"


class RatePlan:
    """Every group's rate at every optimizer step, in plain Python.

    ``rate(g, t) = schedule(lr of g, t) * lr_scale of g * lr_decay_scale of g ** events before t``

    The arithmetic is OneFlow's, so that both modes agree to the last bit: schedule and decay
    in float64, rounded to float32, times ``lr_scale`` rounded to float32, in float32. Decay
    multiplies one event after the other, as the cookbook's loop does: into the rate itself
    where there is no schedule, else into the factor of the schedule's rate.

    Args:
        groups: the groups, in the optimizer's order.
        calendar: where the steps lie.
        schedule: the recorded scheduler, or None for constant rates.
        interval: what moves the schedule on, "step" or "epoch".
        frequency: how many of them move it on by one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        calendar: Calendar,
        schedule: Optional[RecordedSchedule] = None,
        interval: str = "step",
        frequency: int = 1,
    ) -> None:
        self.groups: Tuple[Group, ...] = tuple(groups)
        self.calendar = calendar
        self.decay = DecayEvents()
        self._decay_owner: Optional[str] = None
        self._schedule = schedule
        self._by_epoch = interval == "epoch"
        self._frequency = frequency
        self._decayed: Dict[int, List[float]] = {}
        self._constant: Optional[List[float]] = None

    # ------------------------------------------------------------------ setting up

    def set_decay(self, decay: DecayEvents, owner: str) -> None:
        """Say when decay happens. Two callbacks that say different things are an error."""
        if self._decay_owner is not None and decay != self.decay:
            raise RateError(
                f"{self._decay_owner} and {owner} disagree about decay: {self.decay} against "
                f"{decay}. Give both the same arguments, or list one of them."
            )
        self.decay = decay
        self._decay_owner = owner
        self._decayed.clear()
        self._constant = None

    # ------------------------------------------------------------------ asking

    @property
    def names(self) -> List[str]:
        """The groups' names, in order."""
        return [group.name for group in self.groups]

    def index(self, group: str) -> int:
        """The position of the group called ``group``; raises :class:`RateError` for another."""
        if group not in self.names:
            raise RateError(f"there is no group {group!r}: the groups are {self.names}.")
        return self.names.index(group)

    def rate(self, group: str, step: int) -> float:
        """The learning rate of ``group`` at optimizer step ``step`` (from 0): a float32 value."""
        return self.rates(step)[self.index(group)]

    def rates(self, step: int) -> List[float]:
        """The learning rates of all groups at ``step``, in the groups' order."""
        if self._constant is not None:
            return self._constant
        rates = [
            float(np.float32(self.unscaled(index, step)) * np.float32(self.scale(index)))
            for index in range(len(self.groups))
        ]
        if self.is_constant():
            self._constant = rates
        return rates

    def scale(self, index: int) -> float:
        """The constant multiplier of a group."""
        return 1.0 if self.decay.key == "lr_scale" else self.groups[index].lr_scale

    def decay_scale(self, index: int) -> float:
        """The factor of a group at each decay event."""
        group = self.groups[index]
        return group.lr_scale if self.decay.key == "lr_scale" else group.lr_decay_scale

    def unscaled(self, index: int, step: int) -> float:
        """Schedule and decay of a group at ``step``, before ``lr_scale``, in float64."""
        factor = self.decay_scale(index)
        if self._schedule is None:
            base = self.groups[index].lr
            return base if factor == 1.0 else self._decay(index, base, factor, step)
        base = self._schedule.lr(index, self.position(step))
        return base if factor == 1.0 else base * self._decay(index, 1.0, factor, step)

    def _decay(self, index: int, start: float, factor: float, step: int) -> float:
        events = self.calendar.events_before(step, self.decay.every_n_batches, self.decay.per_epoch)
        values = self._decayed.setdefault(index, [start])
        while len(values) <= events:
            values.append(values[-1] * factor)
        return values[events]

    def position(self, step: int) -> int:
        """How often a hand-written loop would have called ``scheduler.step()`` before ``step``."""
        if self._schedule is None:
            return 0
        return (self.calendar.epoch_of(step) if self._by_epoch else step) // self._frequency

    def is_constant(self) -> bool:
        """True where no group's rate ever changes."""
        return self._schedule is None and all(
            self.decay_scale(index) == 1.0 for index in range(len(self.groups))
        )

    def table(self, index: int, start: int, stop: int) -> Tuple[List[int], List[float]]:
        """``unscaled`` of a group for the steps in [start, stop), runs of equal values merged.

        Returns the steps at which a new value begins, and the values.
        """
        starts: List[int] = []
        values: List[float] = []
        for step in range(start, stop):
            value = self.unscaled(index, step)
            if not values or value != values[-1]:
                starts.append(step)
                values.append(value)
        return starts, values

    def depends_on_epochs(self) -> bool:
        """True where the length of epochs matters to a rate."""
        return self._by_epoch or any(self.decay_scale(i) != 1.0 for i in range(len(self.groups)))

    def lower_into(self, graph: nn.Graph, start: int, stop: int) -> Optional[int]:
        """Make ``graph``, not compiled yet, use the rates of the steps in [start, stop).

        Returns the first step whose rate is not in the graph; None where all are.
        """
        indices = range(len(self.groups))
        constant = self.is_constant()
        tables = [self.table(index, start, start + 1 if constant else stop) for index in indices]
        lower_rates(graph, tables, [self.scale(index) for index in indices])
        return None if constant else stop
