"""The rate plan of a run: from settings, a task and the length of an epoch."""

from __future__ import annotations

from typing import Any, Iterable, Optional, Sequence, Tuple

from ofengine.errors import RateError
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group, check_groups
from ofengine.rates.optimizers import (
    Optimization,
    make_schedule,
    read_optimizers,
)
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.run.settings import Settings

Decays = Iterable[Tuple[str, DecayEvents]]
"""When decay happens, and who says so."""


def plan_run(
    settings: Settings, task: Any, batches: Optional[int], decays: Decays = ()
) -> Tuple[Optimization, RatePlan]:
    """The checked optimizer and plan of a ``fit`` of ``task``.

    Args:
        settings: the Trainer's.
        task: a ``TaskModule``; its ``configure_optimizers`` is called.
        batches: batches in an epoch, or None where that is not known.
        decays: the decay events, by the name of who declares them.

    Raises:
        RateError: the groups, the schedule or two declarations of decay do not fit together.
    """
    name = type(task).__name__
    made = read_optimizers(_configure_optimizers(task), name)
    groups = check_groups(task, made.optimizer, scheduled=made.scheduler is not None)
    if not any(group.tensors for group in groups):
        raise RateError(f"{name} has no trainable parameter in any group.")
    plan = new_plan(settings, made, groups, batches)
    for owner, decay in decays:
        plan.set_decay(decay, owner)
    return made, plan


def new_plan(
    settings: Settings, made: Optimization, groups: Sequence[Group], batches: Optional[int]
) -> RatePlan:
    """A plan at the beginning of a run; its decay is to be set."""
    schedule = make_schedule(made, [group.name for group in groups], [group.lr for group in groups])
    calendar = Calendar(batches, settings.windows)
    plan = RatePlan(groups, calendar, schedule, made.interval, made.frequency)
    plan.stop = settings.total_steps(batches)
    return plan


def _configure_optimizers(task: Any) -> Any:
    try:
        return task.configure_optimizers()
    except ValueError as error:
        if "different warmup configs" in str(error):
            raise RateError(
                "OneFlow's linear warm-up takes groups of equal lr only: use "
                "ofengine.rates.WarmupLR, which takes any, or scale the groups by lr_scale."
            ) from error
        raise
