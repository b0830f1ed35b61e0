"""The rate plan in a checkpoint, and which of the two counts where a resumed run's differs."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import attrs

from ofengine.errors import CheckpointError, RateError
from ofengine.rates.groups import Group
from ofengine.rates.optimizers import Optimization, make_schedule
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.schedule import PlateauSchedule, as_read, describe_schedule, same_kind

POLICIES = ("checkpoint", "config")
Values = List[Optional[float]]
"""What the groups have of an option, None where it is no schedule's."""
_AHEAD = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""So many steps ahead rates are noted, to tell where checkpoint and code part."""
_NEAR = 10_000
"""The last step's rates are noted too where it is no more steps away."""
_AROUND = (-500, -200, -100, -50, -20, -10, *range(-4, 33), 50, 100, 200, 500, 1000)
"""So many positions from where it stands a schedule is noted, to notice another function."""


def plan_state(plan: RatePlan, made: Optimization, step: int) -> Dict[str, Any]:
    """What a checkpoint at ``step`` keeps of ``plan``."""
    schedule, last = plan.schedule, _last(plan, step)
    return {
        "step": step,
        "groups": [attrs.asdict(group) for group in plan.initial_groups],
        "decay": attrs.asdict(plan.decay),
        "schedule": describe_schedule(made.scheduler, plan.names),
        "interval": made.interval,
        "frequency": made.frequency,
        "changes": [list(change) for change in plan.changes],
        "plateau": schedule.state() if isinstance(schedule, PlateauSchedule) else None,
        "calendar": plan.calendar.state(step),
        "rates": _rates_ahead(plan, step),
        **({"last": last} if last is not None and step == plan.stop else {}),
        "positions": _rates_by_position(plan, step),
        **({} if plan.options is None else {"options": _options_near(plan, step)}),
    }


def _rates_ahead(plan: RatePlan, step: int) -> Dict[str, List[float]]:
    """The rates of all groups so many steps after ``step``."""
    left = None if plan.stop is None else plan.stop - step
    noted = [ahead for ahead in _AHEAD if left is None or ahead < left]
    if left is not None and 0 < left <= _NEAR:
        noted.append(left - 1)
    rates = {}
    for ahead in noted:
        try:
            rates[str(ahead)] = plan.rates(step + ahead)
        except Exception:  # a user's function need not know the steps after the last
            break
    return rates


def _last(plan: RatePlan, step: int) -> Optional[List[float]]:
    """The rates of the step before ``step``; None where they are not known any more."""
    try:
        return plan.rates(step - 1) if step else None
    except RateError:  # set_lr came after it
        return None


def _options_near(plan: RatePlan, step: int) -> Dict[str, Dict[str, Values]]:
    """The options that a schedule moves, at the steps whose rates are noted and the one before."""
    noted: Dict[str, Dict[str, Values]] = {}
    ahead = map(int, _rates_ahead(plan, step))
    for near in dict.fromkeys((max(step - 1, 0), *(step + each for each in ahead))):
        try:
            values = plan.scheduled(near)
        except Exception:  # a user's function need not know the steps after the last
            break
        for option, of_each in values.items():
            noted.setdefault(option, {})[str(near)] = of_each
    return noted


def _check_options(plan: RatePlan, kept: Dict[str, Dict[str, Values]], policy: str) -> List[str]:
    """A line for each option that a schedule moves otherwise than in the checkpoint.

    Raises :class:`RateError` for the first, unless the ``policy`` is that the code counts.
    """
    now = {} if plan.options is None else plan.scheduled(0)
    lines = []
    for option in dict.fromkeys((*kept, *now)):
        said = _other_option(plan, option, kept.get(option), option in now)
        if said is None:
            continue
        if policy == "checkpoint":
            raise RateError(
                f"{said}: put configure_optimizers() back as it was, or take the code's with "
                "fit(..., rates_on_resume='config')."
            )
        lines.append(f"{said}; the code's counts (rates_on_resume='config').")
    return lines


def _other_option(
    plan: RatePlan, option: str, kept: Optional[Dict[str, Values]], is_moved: bool
) -> Optional[str]:
    """How the schedule of ``option`` differs from what was ``kept``; None where it does not."""
    key = f"{option}_schedule"
    if kept is None:
        return f"the checkpoint has no {key}, and configure_optimizers() returns one"
    if not is_moved:
        return f"the checkpoint has a {key}, and configure_optimizers() returns none"
    for step, before in kept.items():
        for name, old, new in zip(plan.names, before, plan.scheduled(int(step))[option]):
            if old != new:
                was, is_now = ("its own" if each is None else f"{each:.9g}" for each in (old, new))
                return (
                    f"{key} gave group {name!r} {was} at step {step} in the checkpoint, and gives "
                    f"{is_now} now"
                )
    return None


def _rates_by_position(plan: RatePlan, step: int) -> Dict[str, List[float]]:
    """The schedule alone, of all groups, at some positions around that of ``step``."""
    schedule = plan.schedule
    if schedule is None or isinstance(schedule, PlateauSchedule):
        return {}
    here = plan.position(max(step - 1, 0))  # one that was asked for already, if any was
    last = here if plan.stop is None else plan.position(max(plan.stop - 1, step - 1, 0))
    rates = {}
    noted = {here + around for around in _AROUND}
    if last - here <= _NEAR:
        noted.add(last)
    for position in sorted(noted):
        # Of a run without an end no function is asked for more than it was asked for already.
        if schedule.earliest() <= position <= last:
            rates[str(position)] = schedule.lrs(position)
    return rates


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
    mend = "a run is resumed with the groups it was begun with."
    for before, now in zip(kept, plan.groups):
        if (before.tensors, before.numbers) != (now.tensors, now.numbers):
            raise CheckpointError(
                f"group {now.name!r} has {now.tensors} parameters ({now.numbers:,} numbers), and "
                f"{before.tensors} ({before.numbers:,}) in the checkpoint: {mend}"
            )
        # Files of the first days of this format do not name them.
        others = sorted(set(now.parameters) - set(before.parameters or now.parameters))
        if others:
            raise CheckpointError(
                f"group {now.name!r} holds {others[0]!r}, which it did not in the checkpoint: "
                f"{mend}"
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
        A line for each group that has another rate by the code than by the checkpoint, at this
        step or at one of those ahead that the checkpoint has noted; and for each option that a
        schedule moves otherwise.

    Raises:
        RateError: the checkpoint's schedule cannot go on, because the code has one of another
            kind, or a function that gives other rates; or a schedule of weight decay or momentum
            gives other values.
    """
    step = state["step"]
    plan.calendar.load_state(state["calendar"], step)
    others = _check_options(plan, state.get("options", {}), policy)
    other = _by_code(plan, made, state, policy)
    by_code = _rates_ahead(other, step)
    if policy == "checkpoint":
        _take_over(plan, made, state)
        _check_positions(plan, state)
    counting, noted = _rates_ahead(plan, step), state["rates"]
    if "last" in state:  # the run had come to its end
        noted = {"-1": state["last"]}
        for rates, of in ((by_code, other), (counting, plan)):
            last = _last(of, step)
            rates.update({} if last is None else {"-1": last})
    lines = []
    for index, name in enumerate(plan.names):
        for ahead, kept in noted.items():
            if ahead not in by_code or kept[index] == by_code[ahead][index]:
                continue
            lines.append(
                f"group {name!r}: its rate at step {step + int(ahead)} is {kept[index]:.9g} by the "
                f"checkpoint and {by_code[ahead][index]:.9g} by the code; "
                f"{counting.get(ahead, kept)[index]:.9g} counts (rates_on_resume={policy!r})."
            )
            break
    return lines + others


def _by_code(plan: RatePlan, made: Optimization, state: Dict[str, Any], policy: str) -> RatePlan:
    """The code's plan, apart from ``plan``, with what happened in the run where that counts."""
    if policy != "checkpoint":
        return plan
    groups = plan.initial_groups
    schedule = make_schedule(made, plan.names, [group.lr for group in groups])
    other = RatePlan(groups, plan.calendar, schedule, made.interval, made.frequency)
    other.set_decay(plan.decay, "the code")
    other.stop = plan.stop
    for step, group, lr in state["changes"]:
        other.set_lr(group, lr, step)
    if isinstance(schedule, PlateauSchedule) and state["plateau"] is not None:
        now = as_read(describe_schedule(made.scheduler, plan.names))
        if now == state["schedule"] and [g.lr for g in groups] == [
            group["lr"] for group in state["groups"]
        ]:
            schedule.load_state(state["plateau"])
    return other


def _take_over(plan: RatePlan, made: Optimization, state: Dict[str, Any]) -> None:
    kept, own = state["schedule"], as_read(describe_schedule(made.scheduler, plan.names))
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


def _check_positions(plan: RatePlan, state: Dict[str, Any]) -> None:
    """Raise :class:`RateError` where the schedule gives another rate than it did."""
    schedule = plan.schedule
    if schedule is None:
        return
    for position, kept in state.get("positions", {}).items():  # the first files have none
        if int(position) < schedule.earliest():
            continue
        for index, (before, now) in enumerate(zip(kept, schedule.lrs(int(position)))):
            if now != before:
                raise RateError(
                    f"the schedule gave group {plan.names[index]!r} the rate {before:.9g} at "
                    f"{state['interval']} {int(position) * state['frequency']} in the checkpoint, "
                    f"and gives {now:.9g} now: it has become another, and the one before cannot be "
                    "read from the checkpoint. Put it back into configure_optimizers(), or take "
                    "the code's with fit(..., rates_on_resume='config')."
                )


def _in_words(description: Optional[Dict[str, Any]], interval: str, frequency: int) -> str:
    if description is None:
        return "none"
    every = interval if frequency == 1 else f"{frequency} {interval}s"
    return f"{_what(description)} by {every}"


def _what(description: Optional[Dict[str, Any]]) -> str:
    """The classes of a schedule and of those inside it."""
    if description is None:
        return "none"
    inside = list(description.get("by_group", []))
    for parts in description.get("parts", {}).values():
        inside += parts
    what = str(description["class"])
    return f"{what} ({', '.join(map(_what, inside))})" if inside else what
