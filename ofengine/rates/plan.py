"""RatePlan: the one object that knows every group's learning rate at every step."""

from __future__ import annotations

import math
import operator
from array import array
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import attrs
import numpy as np
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.graphs import updates_many_tensors_at_once
from ofengine._oneflow.lowering import lower_rates
from ofengine._oneflow.watched_options import set_quietly, watch_options
from ofengine.constructors import tells_unknown_arguments
from ofengine.errors import RateError
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.options import ScheduledOptions
from ofengine.rates.schedule import PlateauSchedule, Schedule

_MOST_ENTRIES = 1_000_000
"""Rates that are compiled into a graph at most; more are compiled in when these are used up."""
_lr_of = operator.itemgetter("lr")


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


@tells_unknown_arguments
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
        schedule: what moves the rates, or None for constant ones.
        interval: what moves the schedule on, "step" or "epoch".
        frequency: how many of them move it on by one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        calendar: Calendar,
        schedule: Optional[Schedule] = None,
        interval: str = "step",
        frequency: int = 1,
    ) -> None:
        self.groups: Tuple[Group, ...] = tuple(groups)
        self.initial_groups = self.groups
        """The groups before any :meth:`set_lr`."""
        self.calendar = calendar
        self.decay = DecayEvents()
        self._decay_owner: Optional[str] = None
        self.schedule = schedule
        self.by_epoch = interval == "epoch"
        self.frequency = frequency
        self._optimizer: Any = SimpleNamespace(param_groups=[])
        """The optimizer whose groups are watched; until then one that has none."""
        self._live_groups: List[Any] = []
        self._options: List[Dict[str, Any]] = []
        """The options of each of its groups."""
        self._standing: List[float] = []
        self._standing_scales: List[float] = []
        self.changes: List[Tuple[int, str, float]] = []
        """What :meth:`set_lr` was told so far: (step, group, lr)."""
        self.stop: Optional[int] = None
        """The steps of the run, or None where that is not known: no rate is asked for beyond."""
        self.options: Optional[ScheduledOptions] = None
        """The weight decay and momentum of all groups, where a schedule moves them."""
        self._decayed: Dict[int, List[float]] = {}
        self._latest: Tuple[Optional[Tuple[int, int]], List[float]] = (None, [])
        """What the rates of the step asked for last depend on, and these rates."""
        self._constant: Optional[List[float]] = None
        self._before_change: Tuple[int, List[float]] = (-1, [])
        """The step before the newest :meth:`set_lr`, and its rates."""
        self._forget()

    # ------------------------------------------------------------------ setting up

    def set_decay(self, decay: DecayEvents, owner: str) -> None:
        """Say when ``owner`` decays rates; two owners that differ are a :class:`RateError`."""
        if self._decay_owner is not None and decay != self.decay:
            raise RateError(
                f"{self._decay_owner} and {owner} disagree about decay: {self.decay} against "
                f"{decay}. Give both the same arguments, or list one of them."
            )
        self.decay = decay
        self._decay_owner = owner
        self._forget()

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
        """The learning rates of all groups at ``step``, in the groups' order.

        Behind a :meth:`set_lr` only the step right before it is still known as it was.
        """
        if step == self._before_change[0]:
            return list(self._before_change[1])
        return list(self._rates(step))

    def scheduled(self, step: int) -> Dict[str, List[Optional[float]]]:
        """What ``step`` has of the options that a schedule moves: "weight_decay", "momentum".

        For each the values of all groups, in their order; None for a group that keeps its own.
        """
        return {} if self.options is None else self.options.at(step)

    def _rates(self, step: int) -> List[float]:
        if self._constant is not None:
            return self._constant
        moment = self._moment(step)
        if moment == self._latest[0]:
            return self._latest[1]
        # Two float32 values have a product that float64 holds exactly: it is rounded once.
        unscaled = array("f", self._unscaled(*moment))
        rates = array("f", map(operator.mul, unscaled, self._factors)).tolist()
        self._latest = moment, rates
        if self.is_constant():
            self._constant = rates
        return rates

    def scale(self, index: int) -> float:
        """The constant multiplier of the group number ``index``, from 0."""
        return 1.0 if self.decay.key == "lr_scale" else self.groups[index].lr_scale

    def decay_scale(self, index: int) -> float:
        """The factor of the group number ``index``, from 0, at each decay event."""
        group = self.groups[index]
        return group.lr_scale if self.decay.key == "lr_scale" else group.lr_decay_scale

    def unscaled(self, step: int) -> List[float]:
        """Schedule and decay of all groups at ``step``, before ``lr_scale``, in float64."""
        return self._unscaled(*self._moment(step))

    def _unscaled(self, position: int, events: int) -> List[float]:
        if self.schedule is None:
            return [self._decay(i, group.lr, events) for i, group in enumerate(self.groups)]
        lrs = self.schedule.lrs(position)
        if not self._decays:
            return lrs
        return [lr * self._decay(index, 1.0, events) for index, lr in enumerate(lrs)]

    def _decay(self, index: int, start: float, events: int) -> float:
        factor = self.decay_scale(index)
        if factor == 1.0:
            return start
        values = self._decayed.setdefault(index, [start])
        while len(values) <= events:
            values.append(values[-1] * factor)
        return values[events]

    def _moment(self, step: int) -> Tuple[int, int]:
        """All that the rates of ``step`` depend on: the schedule's position, the decay events."""
        events = 0
        if self._decays:
            every, per_epoch = self.decay.every_n_batches, self.decay.per_epoch
            events = self.calendar.events_before(step, every, per_epoch)
        return self.position(step), events

    def within(self, step: int) -> int:
        """``step``, or the run's last one where that is known and earlier."""
        return step if self.stop is None else max(0, min(step, self.stop - 1))

    def position(self, step: int) -> int:
        """How often a hand-written loop would have called ``scheduler.step()`` before ``step``."""
        if self.schedule is None:
            return 0
        return (self.calendar.epoch_of(step) if self.by_epoch else step) // self.frequency

    def is_constant(self) -> bool:
        """True where no group's rate changes any more, unless somebody changes it."""
        steady = self.schedule is None or isinstance(self.schedule, PlateauSchedule)
        return steady and not self._decays

    def depends_on_epochs(self) -> bool:
        """True where the length of epochs matters to a rate or an option."""
        by_epoch = self.by_epoch or (self.options is not None and self.options.depends_on_epochs)
        return by_epoch or self._decays

    # ------------------------------------------------------------------ changing

    def set_lr(self, group: str, lr: float, step: int) -> None:
        """Let ``lr`` be the base rate of ``group`` from ``step`` on; the schedule goes on over it.

        Raises :class:`RateError` for a rate that is negative or not finite.
        """
        index = self.index(group)
        if not math.isfinite(lr) or lr < 0:
            raise RateError(f"set_lr({group!r}, {lr!r}): a rate is finite and not negative.")
        if step - 1 != self._before_change[0]:
            self._before_change = (step - 1, self._rates(step - 1) if step else [])
        self.changes.append((step, group, float(lr)))
        if self.schedule is not None:
            self.schedule.rebase(index, float(lr), self.position(step))
        groups = list(self.groups)
        groups[index] = attrs.evolve(groups[index], lr=float(lr))
        self.groups = tuple(groups)
        self._forget()

    def observe(self, metric: float) -> bool:
        """Show ``ReduceLROnPlateau`` the metric's new value; True where a rate changed."""
        changed = isinstance(self.schedule, PlateauSchedule) and self.schedule.observe(metric)
        if changed:
            self._forget()
        return changed

    def adopt(self, groups: Sequence[Group], decay: DecayEvents) -> None:
        """Take the groups and the decay events of a checkpoint, from the first step on."""
        for index, group in enumerate(groups):
            if self.schedule is not None and group.lr != self.groups[index].lr:
                self.schedule.rebase(index, group.lr, 0)
        self.groups = self.initial_groups = tuple(groups)
        self.changes = []
        self._before_change = (-1, [])
        self.decay = decay
        self._forget()

    # ------------------------------------------------------------------ live groups

    def watch(self, *optimizers: Optimizer) -> None:
        """Remember the rates and scales that stand in the groups of ``optimizers`` now."""
        (self._optimizer,) = optimizers
        self._find_options()
        self._standing = [*map(_lr_of, self._options)]
        self._standing_scales = _scales_of(self._options)

    def _find_options(self) -> None:
        self._live_groups = list(self._optimizer.param_groups)
        self._mark = watch_options(self._optimizer)
        self._options = [group.options for group in self._live_groups]

    def check_untouched(self) -> None:
        """Raise :class:`RateError` where somebody wrote a rate or a scale since :meth:`watch`."""
        if self._optimizer.param_groups != self._live_groups:  # load_state_dict makes new ones
            self.check_number_of_groups()
            self._find_options()
        if self._mark.rates:
            now = [*map(_lr_of, self._options)], _scales_of(self._options)
            if now != (self._standing, self._standing_scales):
                raise self._changed_by_hand()
            self._mark.rates = False

    def check_number_of_groups(self) -> None:
        """Raise :class:`RateError` where groups were added or taken away since :meth:`watch`."""
        number = len(self._optimizer.param_groups)
        if number != len(self._standing):
            raise RateError(
                f"the optimizer has {number} parameter groups instead of "
                f"{len(self._standing)} during training: declare all of them in "
                "param_groups(); trainer.set_lr(name, 0) keeps a group as it is."
            )

    def _changed_by_hand(self) -> RateError:
        rows = zip(self.names, self._options, self._standing, self._standing_scales)
        name, key, before, after = next(
            (name, key, before, after)
            for name, options, lr, scale in rows
            for key, before, after in (
                ("lr", lr, options["lr"]),
                ("lr_scale", scale, options.get("lr_scale", 1.0)),
            )
            if before != after
        )
        call = f"set_lr({name!r}, {after:g})" if key == "lr" else f"set_lr({name!r}, ...)"
        return RateError(
            f"the {key} of group {name!r} was changed by hand from {before:g} to {after:g} during "
            "training: the plan decides the rates, in both modes alike. Call "
            f"trainer.{call}, or declare the change as lr_decay_scale or as a scheduler."
        )

    def write(self, step: int) -> None:
        """Write the rates and options of ``step`` into the watched groups; none beyond the run."""
        if self._mark.rates or self._optimizer.param_groups != self._live_groups:
            self.check_untouched()
        moved = self.options
        if moved is None and (self._constant is self._standing or not self._options):
            return
        if self.stop is not None and step >= self.stop:
            return
        if moved is not None:
            moved.write(self._options, step)
        rates = self._rates(step)
        if rates != self._standing:
            for options, rate in zip(self._options, rates):
                set_quietly(options, "lr", rate)
            self._standing = rates

    def _forget(self) -> None:
        """Forget what was derived from the groups, the schedule and the decay; they are others."""
        indices = range(len(self.groups))
        self._factors = array("f", [self.scale(index) for index in indices])
        self._decays = any(self.decay_scale(index) != 1.0 for index in indices)
        self._decayed.clear()
        self._latest = (None, [])
        self._constant = None

    # ------------------------------------------------------------------ lowering

    def tables(
        self, start: int, stop: int, most: int
    ) -> Tuple[List[Tuple[List[int], List[float]]], int]:
        """``unscaled`` of every group for the steps from ``start``, runs of equal values merged.

        Ends before ``stop``, or earlier once there are ``most`` values in all. Returns for each
        group the steps at which a new value begins and the values, and the step of the end.
        """
        tables: List[Tuple[List[int], List[float]]] = [([], []) for _ in self.groups]
        step, entries = start, 0
        while step < stop and entries < most:
            for (starts, values), value in zip(tables, self.unscaled(step)):
                if not values or value != values[-1]:
                    starts.append(step)
                    values.append(value)
                    entries += 1
            step = self._next_moment(step, stop)
        return tables, min(step, stop)

    def _next_moment(self, step: int, stop: int) -> int:
        """The first step after ``step`` at which some rate may be another."""
        moments = [stop]
        if self.by_epoch:
            moments.append(self.calendar.next_epoch(step) or stop)
        elif self.schedule is not None:
            moments.append((step // self.frequency + 1) * self.frequency)
        if self._decays:
            every, per_epoch = self.decay.every_n_batches, self.decay.per_epoch
            moments.append(self.calendar.next_event(step, every, per_epoch, stop))
        return min(moments)

    def lower_into(self, graph: nn.Graph, start: int, stop: int, before: int = 0) -> Optional[int]:
        """Make ``graph``, not compiled yet, use the rates of the steps in [start, stop).

        ``before`` are the steps that its optimizer had made before the run's first.
        Returns the first step whose rate is not in the graph; None where all are.
        """
        constant = self.is_constant()
        tables, end = self.tables(start, start + 1 if constant else stop, _MOST_ENTRIES)
        scales = [self.scale(index) for index in range(len(self.groups))]
        if updates_many_tensors_at_once(graph):  # and forgets their lr_scale
            tables = [
                (starts, [float(np.float32(v) * np.float32(scale)) for v in values])
                for (starts, values), scale in zip(tables, scales)
            ]
            scales = [1.0] * len(scales)
        counted = [([step + before for step in starts], values) for starts, values in tables]
        lower_rates(graph, counted, scales)
        return None if constant else end


def _scales_of(options: Sequence[Dict[str, Any]]) -> List[float]:
    return [each.get("lr_scale", 1.0) for each in options]
