"""The rate plan in a checkpoint, and which of the two counts where a resumed run's differs."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import attrs

from ofengine.errors import CheckpointError, RateError
from ofengine.optimizers import Optimization
from ofengine.rates.groups import Group
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.schedule import PlateauSchedule, describe_schedule, same_kind

POLICIES = ("checkpoint", "config")
_SAMPLES = (0, 1, 2, 10, 100)
"""So many steps ahead rates are noted, to notice a function that gives others now."""


def plan_state(plan: RatePlan, made: Optimization, step: int) -> Dict[str, Any]:
    """What a checkpoint at ``step`` keeps of ``plan``."""
    schedule = plan.schedule
    return {
        "step": step,
        "groups": [attrs.asdict(group) for group in plan.initial_groups],
        "decay": attrs.asdict(plan.decay),
        "schedule": describe_schedule(made.scheduler, plan.names),
        "interval": made.interval,
        "frequency": made.frequency,
        "changes": [list(change) for change in plan.changes],
        "plateau": schedule.state() if isinstance(schedule, PlateauSchedule) else None,
        "calendar": plan.calendar.state(),
        "rates": {str(ahead): rates for ahead, rates in _samples(plan, step).items()},
    }


def _samples(plan: RatePlan, step: int) -> Dict[int, List[float]]:
    return {
        ahead: plan.rates(step + ahead)
        for ahead in _SAMPLES
        if plan.stop is None or step + ahead < plan.stop
    }


def check_groups_fit(plan: RatePlan, state: Dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` where the checkpoint has other parameter groups."""
    kept = [Group(**group) for group in state["groups"]]
    names = [group.name for group in kept]
    if names != plan.names:
        raise CheckpointError(
            f"the checkpoint's parameter groups are {names}, and param_groups() gives "
            f"{plan.names}: a run is resumed with the groups it was begun with. To start anew from "
            "its weights: ofengine.load_weights(task, path)."
        )
    for before, now in zip(kept, plan.groups):
        if (before.tensors, before.numbers) != (now.tensors, now.numbers):
            raise CheckpointError(
                f"group {now.name!r} has {now.tensors} parameters ({now.numbers:,} numbers), and "
                f"{before.tensors} ({before.numbers:,}) in the checkpoint: a run is resumed with "
                "the groups it was begun with."
            )


def resume_plan(
    plan: RatePlan, made: Optimization, state: Dict[str, Any], policy: str
) -> List[str]:
    """Let ``plan``, made by the code as it is now, go on from a checkpoint's ``state``.

    With the ``policy`` "checkpoint" rates, scales, decay and schedule go on as they were; what
    the code says now counts only where it says the same. With "config" they are what the code
    says now, as if it had said so from the first step on; what ``set_lr`` and
    ``ReduceLROnPlateau`` have done is forgotten. Either way the steps count on, and so do the
    epochs that ended.

    Returns:
        A line for each group whose rate at this step differs between the two.

    Raises:
        RateError: the checkpoint's schedule cannot go on, because the code has one of another
            kind, or a function that gives other rates.
    """
    plan.calendar.load_state(state["calendar"])
    step = state["step"]
    if plan.stop is not None and step >= plan.stop:
        return []
    own, kept = plan.rates(step), state["rates"].get("0")
    if policy == "checkpoint":
        _take_over(plan, made, state)
        _check_samples(plan, state)
    lines = []
    for name, by_code, by_checkpoint in zip(plan.names, own, kept or own):
        if by_code != by_checkpoint:
            counts = by_checkpoint if policy == "checkpoint" else by_code
            lines.append(
                f"group {name!r}: its rate at step {step} is {by_checkpoint:g} by the checkpoint "
                f"and {by_code:g} by the code; {counts:g} counts (rates_on_resume={policy!r})."
            )
    return lines


def _take_over(plan: RatePlan, made: Optimization, state: Dict[str, Any]) -> None:
    kept, own = state["schedule"], describe_schedule(made.scheduler, plan.names)
    moved_on = (state["interval"], state["frequency"])
    if not same_kind(kept, own) or (kept and moved_on != (made.interval, made.frequency)):
        raise RateError(
            f"the checkpoint's schedule is {_in_words(kept, *moved_on)}, and the code's is "
            f"{_in_words(own, made.interval, made.frequency)}, so the checkpoint's cannot go on: "
            "put it back into configure_optimizers(), or take the code's with "
            "fit(..., rates_on_resume='config')."
        )
    if plan.schedule is not None and kept != own:
        plan.schedule.adopt(kept)
    plan.adopt([Group(**group) for group in state["groups"]], DecayEvents(**state["decay"]))
    for step, group, lr in state["changes"]:
        plan.set_lr(group, lr, step)
    if isinstance(plan.schedule, PlateauSchedule) and state["plateau"] is not None:
        plan.schedule.load_state(state["plateau"])


def _check_samples(plan: RatePlan, state: Dict[str, Any]) -> None:
    for ahead, kept in state["rates"].items():
        step = state["step"] + int(ahead)
        if plan.stop is not None and step >= plan.stop:
            continue
        for name, now, before in zip(plan.names, plan.rates(step), kept):
            if now != before:
                raise RateError(
                    f"the rate of group {name!r} at step {step} was to be {before:g} by the "
                    f"checkpoint, and the schedule gives {now:g} now: it has become another. Put "
                    "the one before back, or take this one with "
                    "fit(..., rates_on_resume='config')."
                )


def _in_words(description: Optional[Dict[str, Any]], interval: str, frequency: int) -> str:
    if description is None:
        return "none"
    every = interval if frequency == 1 else f"{frequency} {interval}s"
    return f"{description['class']} by {every}"
