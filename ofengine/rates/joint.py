"""JointPlan: the rates of several optimizers, each with its own plan and count of steps."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import attrs
from oneflow.optim import Optimizer

from ofengine.errors import CheckpointError, RateError
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.optimizers import Optimization
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.several import Named
from ofengine.run.settings import Settings


@attrs.frozen
class NamedPlan:
    """One of several optimizers, and the plan of its rates, by its own steps."""

    named: Named
    plan: RatePlan
    settings: Settings
    """The Trainer's, as they are for this optimizer: its length and accumulation are in its own
    steps."""

    @property
    def name(self) -> str:
        """What the optimizer is called."""
        return self.named.name


def settings_for(named: Named, settings: Settings, batches: Optional[int]) -> Settings:
    """``settings`` with which the plan of ``named`` is made, for epochs of ``batches``.

    An optimizer that steps in every n-th batch has the steps of one that accumulates n.
    """
    every, most = named.every_n_batches, settings.max_steps
    if batches and most > 0:
        most = Calendar(batches, every).steps_before(*divmod(most, batches))
    return attrs.evolve(settings, accumulate_grad_batches=every, max_steps=most)


class _JointCalendar(Calendar):
    """A step for each batch; what is learnt of epochs, the optimizers' own calendars learn too."""

    def __init__(self, batches: Optional[int], own: Sequence[Calendar]) -> None:
        super().__init__(batches)
        self._own = own

    def outgrown(self, epoch: int) -> None:
        super().outgrown(epoch)
        for each in self._own:
            each.outgrown(epoch)

    def epoch_ended(self, epoch: int, batches: int) -> bool:
        surprise = super().epoch_ended(epoch, batches)
        for each in self._own:
            each.epoch_ended(epoch, batches)
        return surprise


class JointPlan(RatePlan):
    """Every group's rate of several optimizers; a group is called "<optimizer>/<group>".

    A step is a batch, in which each optimizer whose turn it is makes one of its own.

    Args:
        parts: the optimizers, in the order in which they step.
        batches: batches in an epoch, or None where that is not known.
        stop: the steps of the run, or None where that is not known.
    """

    def __init__(
        self, parts: Sequence[NamedPlan], batches: Optional[int], stop: Optional[int]
    ) -> None:
        self.parts = tuple(parts)
        calendar = _JointCalendar(batches, [part.plan.calendar for part in parts])
        super().__init__(self._joined(), calendar)
        self.stop = stop

    def _joined(self) -> List[Group]:
        return [
            attrs.evolve(group, name=f"{part.name}/{group.name}")
            for part in self.parts
            for group in part.plan.groups
        ]

    def refresh(self) -> None:
        """The groups of a part are others, or were given other rates."""
        self.groups = tuple(self._joined())
        self.changes = [
            (step, f"{part.name}/{group}", lr)
            for part in self.parts
            for step, group, lr in part.plan.changes
        ]
        self._forget()

    def resume(self, calendar: Dict[str, Any], step: int) -> None:
        """Go on at ``step``, where all parts do; ``calendar`` is what one of them had."""
        self.calendar.load_state(calendar, step)
        self.refresh()

    def own_steps(self, part: NamedPlan, step: int) -> int:
        """The steps that ``part`` has made before ``step`` of the run."""
        if part.named.every_n_batches == 1:
            return step
        return part.plan.calendar.steps_before(*self.calendar.place(step))

    def set_decay(self, decay: DecayEvents, owner: str) -> None:
        super().set_decay(decay, owner)
        for part in self.parts:
            part.plan.set_decay(decay, owner)

    # ------------------------------------------------------------------ asking

    def _rates(self, step: int) -> List[float]:
        """Those that each optimizer's newest step has, in ``step`` or before it."""
        return [
            rate
            for part in self.parts
            for rate in part.plan.rates(max(self.own_steps(part, step + 1) - 1, 0))
        ]

    def scheduled(self, step: int) -> Dict[str, List[Optional[float]]]:
        found: Dict[str, List[Optional[float]]] = {}
        before = 0
        for part in self.parts:
            own = part.plan.scheduled(max(self.own_steps(part, step + 1) - 1, 0))
            for option, values in own.items():
                every = found.setdefault(option, [None] * len(self.groups))
                every[before : before + len(values)] = values
            before += len(part.plan.groups)
        return found

    def unscaled(self, step: int) -> List[float]:
        return [
            rate
            for part in self.parts
            for rate in part.plan.unscaled(max(self.own_steps(part, step + 1) - 1, 0))
        ]

    def is_constant(self) -> bool:
        return all(part.plan.is_constant() for part in self.parts)

    def depends_on_epochs(self) -> bool:
        return any(part.plan.depends_on_epochs() for part in self.parts)

    # ------------------------------------------------------------------ changing

    def set_lr(self, group: str, lr: float, step: int) -> None:
        self.index(group)  # raises for one that is not there
        owner, _, own = group.partition("/")
        part = next(each for each in self.parts if each.name == owner)
        with named_in_errors(owner):
            part.plan.set_lr(own, lr, self.own_steps(part, step))
        self.refresh()

    # ------------------------------------------------------------------ live groups

    def watch(self, *optimizers: Optimizer) -> None:
        for part, optimizer in zip(self.parts, optimizers):
            part.plan.watch(optimizer)

    def check_untouched(self) -> None:
        for part in self.parts:
            with named_in_errors(part.name):
                part.plan.check_untouched()

    def check_number_of_groups(self) -> None:
        for part in self.parts:
            with named_in_errors(part.name):
                part.plan.check_number_of_groups()

    def write(self, step: int) -> None:
        for part in self.parts:
            with named_in_errors(part.name):
                part.plan.write(self.own_steps(part, step))


def single_plans(
    made: Optional[Optimization], plan: RatePlan
) -> List[Tuple[Optimization, RatePlan]]:
    """What a run is made of: one optimizer with its plan, or several."""
    if isinstance(plan, JointPlan):
        return [(part.named.made, part.plan) for part in plan.parts]
    return [] if made is None else [(made, plan)]


@contextlib.contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """An error in the block says which of several optimizers it is about; "" is a single one."""
    try:
        yield
    except (RateError, CheckpointError) as error:
        if not name:
            raise
        raise type(error)(f"optimizer {name!r}: {error}") from None
