"""What ``configure_optimizers`` may return, taken apart and checked."""

from __future__ import annotations

from typing import Any, Dict, Optional

import attrs
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer

from ofengine.errors import ConfigurationError, RateError


@attrs.frozen
class Optimization:
    """An optimizer and how its rates move."""

    optimizer: Optimizer
    scheduler: Optional[LRScheduler] = None
    interval: str = "step"
    frequency: int = 1


_OPTIMIZER_KEYS = {"optimizer", "lr_scheduler"}
_SCHEDULER_KEYS = {"scheduler", "interval", "frequency", "monitor", "name", "strict"}


def read_optimizers(returned: Any, task_name: str) -> Optimization:
    """Understand what ``configure_optimizers`` returned, in any of Lightning's forms."""
    where = f"{task_name}.configure_optimizers()"
    scheduler: Any = None
    optimizer = returned
    if isinstance(returned, dict):
        _check_keys(returned, _OPTIMIZER_KEYS, where)
        optimizer, scheduler = returned.get("optimizer"), returned.get("lr_scheduler")
    elif isinstance(returned, (list, tuple)):
        pair = len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned)
        optimizers = returned[0] if pair else returned
        schedulers = returned[1] if pair else ()
        if len(optimizers) != 1 or len(schedulers) > 1:
            raise ConfigurationError(
                f"{where} returned {len(optimizers)} optimizers and {len(schedulers)} schedulers: "
                "one optimizer, with several param_groups, and at most one scheduler can train."
            )
        optimizer = optimizers[0]
        scheduler = schedulers[0] if schedulers else None
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"{where} returned {_kind(optimizer)} for the optimizer: return a oneflow.optim "
            'optimizer, or {"optimizer": ..., "lr_scheduler": ...}.'
        )
    if scheduler is None:
        return Optimization(optimizer)
    options: Dict[str, Any] = {}
    if isinstance(scheduler, dict):
        _check_keys(scheduler, _SCHEDULER_KEYS, f"lr_scheduler of {where}")
        options, scheduler = scheduler, scheduler.get("scheduler")
    return _with_scheduler(optimizer, scheduler, options, where)


def _with_scheduler(
    optimizer: Optimizer, scheduler: Any, options: Dict[str, Any], where: str
) -> Optimization:
    if type(scheduler).__name__ == "ReduceLROnPlateau":
        raise RateError(
            f"{where} returned ReduceLROnPlateau, whose rates depend on metrics: the rate plan "
            "does not know such schedules yet. Use a schedule of steps or epochs."
        )
    if not isinstance(scheduler, LRScheduler):
        raise ConfigurationError(
            f"{where} returned {_kind(scheduler)} for the scheduler: return a "
            "oneflow.optim.lr_scheduler object, or a dict with it under 'scheduler'."
        )
    if scheduler.optimizer is not optimizer:
        raise ConfigurationError(
            f"the scheduler of {where} was made for another optimizer than the one beside it."
        )
    interval, frequency = options.get("interval", "step"), options.get("frequency", 1)
    if interval not in ("step", "epoch"):
        raise RateError(f"interval={interval!r} in {where}: use 'step' or 'epoch'.")
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise RateError(f"frequency={frequency!r} in {where}: use a whole number from 1 on.")
    return Optimization(optimizer, scheduler, interval, frequency)


def _check_keys(given: Dict[str, Any], known: Any, where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigurationError(f"{where} has the unknown keys {unknown}: known: {sorted(known)}.")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
