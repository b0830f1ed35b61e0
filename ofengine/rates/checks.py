"""Schedules and decays that look like a mistake, told before training starts."""

from __future__ import annotations

import math
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np

from ofengine.errors import RateError, warn
from ofengine.rates.optimizers import Optimization
from ofengine.rates.plan import RatePlan

# Where OneFlow's schedulers keep how many positions they are made for.
_LENGTHS = ("T_max", "decay_steps", "max_decay_steps")
_STEPS_TO_LOOK_AHEAD = 10_000
_FADED = 1e-3
"""Nothing trains any more at such a part of the first rate."""
_SMALLEST = float(np.finfo(np.float32).tiny)


def check_rates(
    plan: RatePlan,
    made: Optimization,
    total_steps: Optional[int],
    max_epochs: int,
    begin: int = 0,
) -> None:
    """Warn of what is probably not meant; raise :class:`RateError` for what cannot work.

    Args:
        plan: the plan, decay included.
        made: what ``configure_optimizers`` returned.
        total_steps: the optimizer steps of the run, or None where that is not known.
        max_epochs: the epochs of the run, or -1.
        begin: the step at which the run begins, where it is resumed.
    """
    _check_finite(plan, plan.within(begin))
    if plan.options is not None:
        plan.options.check(plan.within(begin), total_steps)
    if not total_steps:
        return
    if total_steps <= _STEPS_TO_LOOK_AHEAD:
        _check_finite(plan, total_steps - 1)
        if begin == 0:
            _check_faded(plan, made, total_steps, max_epochs)
    _check_underflow(plan, total_steps)
    positions = plan.position(total_steps - 1) + 1
    unit = "epoch" if made.interval == "epoch" else "step"
    per_epoch = total_steps / max_epochs if max_epochs > 0 else None
    for name, length, is_warmup in _lengths(made.scheduler):
        if is_warmup:
            if length >= positions:
                warn(
                    f"the warm-up of {name} takes {length} {unit}s, but the run has {positions}: "
                    "it never ends. Shorten it, or train longer."
                )
        elif unit == "step" and per_epoch and per_epoch > 1 and 1 < length <= max_epochs:
            warn(
                f"{name} has a length of {length} and moves on at every step, so it is over in the "
                f"first {length} of {positions} steps: did you mean 'interval': 'epoch'?"
            )
        elif unit == "epoch" and per_epoch and per_epoch > 1 and length >= total_steps:
            warn(
                f"{name} has a length of {length} and moves on once an epoch, but the run has "
                f"{positions} epochs of {per_epoch:g} steps: did you mean 'interval': 'step'?"
            )
        elif length < positions - 1:
            warn(
                f"{name} is over after {length} {unit}s, but the run has {positions}: from there "
                "on its rate is no longer what it was made for. Lengthen it, or train shorter."
            )


def _check_finite(plan: RatePlan, step: int) -> None:
    for name, rate in zip(plan.names, plan.rates(step)):
        if not math.isfinite(rate) or rate < 0:
            raise RateError(
                f"the rate of group {name!r} is {rate} at step {step}: the schedule must give "
                "finite rates that are not negative."
            )


def _check_faded(plan: RatePlan, made: Optimization, total_steps: int, max_epochs: int) -> None:
    """Warn of a schedule that was made for epochs, and has ended training long before the run."""
    middle = total_steps // 2
    if not made.unasked or not 1 < max_epochs < middle:
        return
    first, then = plan.rates(0), plan.rates(middle)
    if any(rate > _FADED * begun for begun, rate in zip(first, then)) or not any(first):
        return
    most = max(rate / begun for begun, rate in zip(first, then) if begun)
    warn(
        f"the schedule moves on at every step, and at step {middle} of {total_steps} no rate is "
        f"above {most:.1e} of its first: did you mean 'interval': 'epoch'?"
    )


def _check_underflow(plan: RatePlan, total_steps: int) -> None:
    for index, name in enumerate(plan.names):
        factor, first = plan.decay_scale(index), plan.groups[index].lr * plan.scale(index)
        if not 0 < factor < 1 or first == 0:
            continue
        most = math.log(_SMALLEST / first) / math.log(factor)  # the events it can stand

        def is_lost(step: int, most: float = most) -> bool:
            every, per_epoch = plan.decay.every_n_batches, plan.decay.per_epoch
            return plan.calendar.events_before(step, every, per_epoch) > most

        last = total_steps - 1
        if not is_lost(last):
            continue
        low, high = 0, last  # the first step from which the rate is lost
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_lost(middle) else (middle + 1, high)
        warn(
            f"the decay of group {name!r} ({factor:g} every {plan.decay.every_n_batches} batches) "
            f"makes its rate too small for float32 from step {low} of {total_steps} on: raise "
            "lr_decay_scale or every_n_batches."
        )


def _lengths(scheduler: Any) -> Iterator[Tuple[str, int, bool]]:
    """(name, length in positions, is a warm-up) of ``scheduler`` and its last part."""
    if isinstance(scheduler, dict):
        for part in scheduler.values():
            yield from _lengths(part)
        return
    name = type(scheduler).__name__
    if isinstance(scheduler, (list, tuple)):
        yield f"the table of {len(scheduler)} factors", len(scheduler), False
        return
    warmup = getattr(scheduler, "warmup_iters", None)
    if isinstance(warmup, int) and warmup > 0:
        yield name, warmup, True
    parts: List[Any] = list(getattr(scheduler, "schedulers", ()))
    if parts:
        if parts[-1] is not scheduler and len(parts) > 1:
            start = scheduler.milestones[-1] if getattr(scheduler, "milestones", ()) else 0
            offset = start if (getattr(scheduler, "interval_rescaling", ()) or [False])[-1] else 0
            for part_name, length, is_warmup in _lengths(parts[-1]):
                yield part_name, length + offset, is_warmup
        return
    if name in ("ConstantLR", "LinearLR"):
        return  # they hold their last rate, as is meant
    for attribute in _LENGTHS:
        value = getattr(scheduler, attribute, None)
        if isinstance(value, int) and value > 0:
            yield f"{name}({attribute}={value})", value, False
            return
