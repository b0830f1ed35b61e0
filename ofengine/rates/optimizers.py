"""What ``configure_optimizers`` may return, taken apart and checked."""

from __future__ import annotations

import math
from typing import Any, Dict, Optional, Sequence, Tuple

import attrs
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer
from oneflow.optim.lr_scheduler import ReduceLROnPlateau

from ofengine.data.structure import describe_returned
from ofengine.errors import ConfigurationError, RateError
from ofengine.rates.counted import CountedSchedule, interval_of, is_counted
from ofengine.rates.options import OPTION_OF_KEY, OptionSchedule, read_option_schedules
from ofengine.rates.schedule import (
    ConstantSchedule,
    FunctionSchedule,
    PerGroupSchedule,
    PlateauSchedule,
    RecordedSchedule,
    Schedule,
    TableSchedule,
)
from ofengine.run.arguments import check_flag


@attrs.frozen
class Optimization:
    """An optimizer and how its rates move."""

    optimizer: Optimizer
    scheduler: Any = None
    """A OneFlow or flowvision scheduler, a function of the position that returns a factor, a list
    of factors, a dict of these by group name, or None."""
    interval: str = "step"
    frequency: int = 1
    monitor: Optional[str] = None
    """The metric of ReduceLROnPlateau."""
    strict: bool = True
    """False to let a ReduceLROnPlateau wait where its metric was not logged, with a warning."""
    unasked: bool = False
    """True where it moves on by step because nothing says otherwise."""
    listed: bool = False
    """True for a scheduler in a list that says nothing of its interval: it moves on by epoch, as in
    Lightning."""
    options: Tuple[OptionSchedule, ...] = ()
    """The schedules of weight decay and momentum."""


OPTIMIZER_KEYS = {"optimizer", "lr_scheduler", "monitor", *OPTION_OF_KEY}
_SCHEDULER_KEYS = {"scheduler", "interval", "frequency", "monitor", "name", "strict"}


def read_optimizers(returned: Any, task_name: str, name: str = "") -> Optimization:
    """Understand what ``configure_optimizers`` returned, in any of Lightning's forms.

    ``name``: of several optimizers that whose this is.
    """
    where = f"{task_name}.configure_optimizers()" + (f"[{name!r}]" if name else "")
    scheduler: Any = None
    is_listed = False
    optimizer = returned
    if isinstance(returned, dict):
        check_keys(returned, OPTIMIZER_KEYS, where)
        optimizer, scheduler = returned.get("optimizer"), returned.get("lr_scheduler")
    elif isinstance(returned, (list, tuple)):
        pair = len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned)
        optimizers = returned[0] if pair else returned
        schedulers = returned[1] if pair else ()
        if len(optimizers) != 1 or len(schedulers) > 1:
            raise ConfigurationError(
                f"{where} returned {len(optimizers)} optimizers and {len(schedulers)} schedulers: "
                "return one optimizer, with several param_groups, and at most one scheduler, as "
                "{'optimizer': ..., 'lr_scheduler': ...} or [optimizer], [scheduler]; or several "
                "by name, as {'generator': ..., 'discriminator': ...}."
            )
        optimizer = optimizers[0]
        scheduler = schedulers[0] if schedulers else None
        is_listed = isinstance(scheduler, LRScheduler) or (
            isinstance(scheduler, dict)
            and isinstance(scheduler.get("scheduler"), LRScheduler)
            and "interval" not in scheduler
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"{where} returned {describe_returned(optimizer)} for the optimizer: return a "
            'oneflow.optim optimizer, or {"optimizer": ..., "lr_scheduler": ...}.'
        )
    given = returned if isinstance(returned, dict) else {}
    moved = read_option_schedules(given, optimizer, where)
    if scheduler is None:
        return Optimization(optimizer, options=moved)
    options: Dict[str, Any] = {}
    if isinstance(scheduler, dict) and not scheduler:
        raise ConfigurationError(
            f"lr_scheduler of {where} is an empty dict: put the scheduler under 'scheduler', or "
            "leave lr_scheduler out."
        )
    if isinstance(scheduler, dict) and "scheduler" in scheduler:
        check_keys(scheduler, _SCHEDULER_KEYS, f"lr_scheduler of {where}")
        options, scheduler = scheduler, scheduler["scheduler"]
    if "monitor" in given:
        options = {"monitor": given["monitor"], **options}
    if isinstance(scheduler, (list, tuple)) and any(isinstance(s, LRScheduler) for s in scheduler):
        raise RateError(
            f"lr_scheduler of {where} is a list of schedulers: write one, and for one after the "
            "other a SequentialLR or ChainedScheduler of oneflow.optim.lr_scheduler."
        )
    if is_listed:
        options = {**options, "interval": "epoch"}
    made = _with_scheduler(optimizer, scheduler, options, where)
    return attrs.evolve(made, listed=is_listed, options=moved)


def _with_scheduler(
    optimizer: Optimizer, scheduler: Any, options: Dict[str, Any], where: str
) -> Optimization:
    parts = list(scheduler.values()) if isinstance(scheduler, dict) else [scheduler]
    for part in parts:
        _check_scheduler(optimizer, part, where)
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    if not plateau and any(isinstance(part, ReduceLROnPlateau) for part in parts):
        raise RateError(
            f"{where} gave one group a ReduceLROnPlateau of its own: it can only move all groups."
        )
    monitor = options.get("monitor")
    if plateau and (not isinstance(monitor, str) or not monitor):
        raise RateError(
            f"{where} returned ReduceLROnPlateau without a metric: add 'monitor', for example "
            "{'scheduler': ..., 'monitor': 'val_loss'}."
        )
    counts = sorted({interval_of(part) for part in parts if is_counted(part)})
    if len(counts) > 1:
        raise RateError(
            f"{where} returned schedulers that count steps and others that count epochs: give all "
            "of them the same t_in_epochs."
        )
    interval = options.get("interval", "epoch" if plateau else (counts or ["step"])[0])
    frequency = options.get("frequency", 1)
    if interval not in ("step", "epoch"):
        raise RateError(f"interval={interval!r} in {where}: use 'step' or 'epoch'.")
    if counts and interval != counts[0]:
        raise RateError(
            f"interval={interval!r} in {where} does not fit a scheduler that counts "
            f"{counts[0]}s: leave the interval out, or make the scheduler with "
            f"t_in_epochs={interval == 'epoch'}."
        )
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise RateError(f"frequency={frequency!r} in {where}: use a whole number from 1 on.")
    strict = check_flag(f"'strict' in {where}", options.get("strict", True))
    unasked = interval == "step" and "interval" not in options and not counts
    monitored = monitor if plateau else None
    return Optimization(optimizer, scheduler, interval, frequency, monitored, strict, unasked)


def _check_scheduler(optimizer: Optimizer, scheduler: Any, where: str) -> None:
    if isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)) or is_counted(scheduler):
        if scheduler.optimizer is not optimizer:
            raise ConfigurationError(
                f"the scheduler of {where} was made for another optimizer than the one beside it."
            )
        if getattr(scheduler, "param_group_field", "lr") != "lr":
            raise RateError(
                f"the scheduler of {where} moves {scheduler.param_group_field!r}, and an "
                "lr_scheduler moves rates, with param_group_field='lr': weight decay and momentum "
                "have 'weight_decay_schedule' and 'momentum_schedule' beside it."
            )
    elif isinstance(scheduler, (list, tuple)):
        numbers = [isinstance(f, (int, float)) and math.isfinite(f) and f >= 0 for f in scheduler]
        if not numbers or not all(numbers):
            raise RateError(
                f"the table of factors in {where} must hold finite numbers that are not negative."
            )
    elif not callable(scheduler) or isinstance(scheduler, type):
        raise ConfigurationError(
            f"{where} returned {describe_returned(scheduler)} for the scheduler: return a "
            "oneflow.optim.lr_scheduler or flowvision.scheduler object, a function of the step "
            "that returns a factor, a list of factors, or a dict of these by group name."
        )


def make_schedule(made: Optimization, names: Sequence[str], lrs: Sequence[float]) -> Any:
    """The :class:`Schedule` of what ``configure_optimizers`` returned, or None.

    ``names`` and ``lrs`` are the groups' names and base rates.
    """
    if not isinstance(made.scheduler, dict):
        return None if made.scheduler is None else _schedule_of(made.scheduler, lrs)
    unknown = sorted(set(made.scheduler) - set(names))
    if unknown:
        raise RateError(
            f"schedulers were given for the groups {unknown}, but the groups are {list(names)}."
        )
    return PerGroupSchedule(
        [
            _schedule_of(made.scheduler[name], lrs)
            if name in made.scheduler
            else ConstantSchedule(lrs)
            for name in names
        ]
    )


def _schedule_of(scheduler: Any, lrs: Sequence[float]) -> Schedule:
    if isinstance(scheduler, ReduceLROnPlateau):
        return PlateauSchedule(scheduler)
    if isinstance(scheduler, LRScheduler):
        return RecordedSchedule(scheduler)
    if is_counted(scheduler):
        return CountedSchedule(scheduler)
    if isinstance(scheduler, (list, tuple)):
        return TableSchedule(lrs, scheduler)
    return FunctionSchedule(lrs, scheduler)


def check_keys(given: Dict[str, Any], known: Any, where: str) -> None:
    """Raise where ``given`` has a key that is not ``known``."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigurationError(f"{where} has the unknown keys {unknown}: known: {sorted(known)}.")
