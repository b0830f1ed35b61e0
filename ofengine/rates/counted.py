"""Schedulers that are told which step it is: timm's form, which flowvision's have."""

from __future__ import annotations

from typing import Any, Dict, List

from ofengine.rates.schedule import Schedule, twin_of, write_values

_METHODS = ("step", "step_update", "get_epoch_values", "get_update_values")


def is_counted(scheduler: Any) -> bool:
    """True for a scheduler in timm's form, of flowvision or a user's own.

    Its ``step(epoch)`` and ``step_update(number)`` write the rates of that epoch or step.
    """
    its = all(callable(getattr(scheduler, name, None)) for name in _METHODS)
    return its and not isinstance(scheduler, type) and hasattr(scheduler, "optimizer")


def interval_of(scheduler: Any) -> str:
    """What such a scheduler counts, ``"epoch"`` or ``"step"``: its ``t_in_epochs``."""
    return "epoch" if getattr(scheduler, "t_in_epochs", True) else "step"


class CountedSchedule(Schedule):
    """The rates that a scheduler in timm's form writes when it is told a position.

    The first position has the rates that it wrote when it was made: its warm-up's first, or the
    groups' own.

    Args:
        scheduler: see :func:`is_counted`; it is copied and left as it is.
    """

    def __init__(self, scheduler: Any) -> None:
        self._twin = twin_of(scheduler)
        self._tell = self._twin.step
        if interval_of(scheduler) == "step":
            self._tell = self._twin.step_update
        self._first = [float(group["lr"]) for group in self._groups]

    @property
    def _groups(self) -> List[Dict[str, Any]]:
        groups: List[Dict[str, Any]] = self._twin.optimizer.param_groups
        return groups

    def lrs(self, position: int) -> List[float]:
        """See :class:`Schedule`."""
        if position == 0:
            return list(self._first)
        self._tell(position)
        return [float(group["lr"]) for group in self._groups]

    def rebase(self, group: int, lr: float, position: int) -> None:
        """See :class:`Schedule`."""
        twin = self._twin
        before, twin.base_values[group] = twin.base_values[group], lr
        length = getattr(twin, "warmup_t", 0)
        if not length:
            self._first[group] = lr
            return
        start = twin.warmup_lr_init
        # The warm-up leads to the base rate, or to what the schedule is at its end.
        to_base = twin.warmup_steps[group] == (before - start) / length
        end = lr if to_base else self.lrs(length)[group]
        twin.warmup_steps[group] = (end - start) / length

    def adopt(self, kept: Any) -> None:
        """See :class:`Schedule`."""
        write_values(self._twin, kept)
        warms_up = getattr(self._twin, "warmup_t", 0)
        self._first = [
            float(self._twin.warmup_lr_init if warms_up else lr) for lr in self._twin.base_values
        ]
