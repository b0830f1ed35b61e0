"""Weight decay and momentum by schedule: options of the optimizer that move with the step."""

from __future__ import annotations

import math
import numbers
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import attrs
import numpy as np
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_state import default_options
from ofengine._oneflow.watched_options import set_quietly
from ofengine.data.structure import describe_returned
from ofengine.errors import ConfigurationError, RateError, quoted, warn
from ofengine.rates.calendar import Calendar

OPTION_OF_KEY = {"weight_decay_schedule": "weight_decay", "momentum_schedule": "momentum"}
"""The keys of what ``configure_optimizers`` returns, and what each moves."""
_DICT_KEYS = {"scheduler", "interval", "frequency"}
_LOOKED_AT = 2048
"""So many steps of a run are looked at before it begins; all, where it has no more."""

Values = Union[Tuple[float, ...], Callable[[int], float]]
"""The values by position, of which the last one goes on for ever; or a function that gives them."""


@attrs.frozen
class OptionSchedule:
    """A schedule of one option, as ``configure_optimizers`` declares it.

    Its values are the option's own, no factors.
    """

    key: str
    given: Any
    """What was returned under the key."""
    for_all: Optional[Values]
    """What all groups have; None where they are named."""
    by_name: Dict[str, Values]
    interval: str = "step"
    frequency: int = 1

    @property
    def option(self) -> str:
        """What it moves: "weight_decay" or "momentum"."""
        return OPTION_OF_KEY[self.key]


def read_option_schedules(
    returned: Dict[str, Any], optimizer: Optimizer, where: str
) -> Tuple[OptionSchedule, ...]:
    """The schedules of options in what ``configure_optimizers`` returned, called ``where``.

    Raises :class:`ConfigurationError` or :class:`RateError` for what is wrong with one.
    """
    found = []
    for key, option in OPTION_OF_KEY.items():
        given = returned.get(key)
        if given is None:
            continue
        if not _place(default_options(optimizer), option):
            raise ConfigurationError(
                f"{where} has a {key}, and {type(optimizer).__name__} has no {option}: leave it "
                "out."
            )
        found.append(_read_one(key, given, f"{key} of {where}"))
    return tuple(found)


def _read_one(key: str, given: Any, where: str) -> OptionSchedule:
    values, moves_on = given, {}
    if isinstance(given, dict) and "scheduler" in given:
        moves_on, values = given, given["scheduler"]
        unknown = sorted(set(given) - _DICT_KEYS)
        if unknown:
            raise ConfigurationError(
                f"{where} has the unknown keys {unknown}: known: {sorted(_DICT_KEYS)}."
            )
    interval, frequency = moves_on.get("interval", "step"), moves_on.get("frequency", 1)
    if interval not in ("step", "epoch"):
        raise RateError(f"interval={interval!r} in {where}: use 'step' or 'epoch'.")
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise RateError(f"frequency={frequency!r} in {where}: use a whole number from 1 on.")
    if not isinstance(values, dict):
        return OptionSchedule(key, given, _read_values(values, key, where), {}, interval, frequency)
    if not values:
        raise ConfigurationError(f"{where} is an empty dict: name a group in it, or leave it out.")
    read = {name: _read_values(each, key, where) for name, each in values.items()}
    return OptionSchedule(key, given, None, read, interval, frequency)


def _read_values(values: Any, key: str, where: str) -> Values:
    option = OPTION_OF_KEY[key].replace("_", " ")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (list, tuple)):
        if not values or not all(map(_is_number, values)):
            raise RateError(f"the table in {where} must hold finite numbers, one for each step.")
        return tuple(map(float, values))
    if not callable(values) or isinstance(values, type):
        raise ConfigurationError(
            f"{where} is {describe_returned(values)}: give a function of the step that returns "
            f"the {option} itself, a list of its values, or a dict of these by group name."
        )
    return values


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    return is_real and math.isfinite(value)


def _place(options: Dict[str, Any], option: str) -> str:
    """Under which key a group has ``option``, "" for none; the momentum of Adam is a beta."""
    if option == "momentum" and option not in options and "betas" in options:
        return "betas"
    return option if option in options else ""


def standing(options: Dict[str, Any], option: str) -> Optional[float]:
    """What ``option`` is in the ``options`` of a group now; None where it has none."""
    place = _place(options, option)
    if not place:
        return None
    value = options[place]
    return float(value[0] if place == "betas" else value)


def in_short(values: Sequence[Optional[float]]) -> str:
    """The ``values`` of a group over a run: from where to where, and what lies beyond."""
    known = [each for each in values if each is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    text = f"{known[0]:.3g} to {known[-1]:.3g}"
    is_within = {low, high} <= {known[0], known[-1]}
    return text if is_within else f"{text}, {low:.3g}..{high:.3g}"


class ScheduledOptions:
    """The options of all groups that move, at every step of a run.

    Args:
        schedules: of each option at most one.
        names: the groups' names, in the optimizer's order.
        optimizer: whose groups they are; a weight decay that is not said to be of some groups is
            of those that have one.
        calendar: where the steps lie.

    Raises:
        RateError: a schedule is of a group that is not there, or of none.
    """

    def __init__(
        self,
        schedules: Sequence[OptionSchedule],
        names: Sequence[str],
        optimizer: Optimizer,
        calendar: Calendar,
    ) -> None:
        self._schedules, self._names, self._calendar = tuple(schedules), list(names), calendar
        groups = [group.options for group in optimizer.param_groups]
        self._values = [_by_group(each, self._names, groups) for each in self._schedules]
        self._places = [_place(groups[0], each.option) for each in self._schedules]
        self._written: Optional[Dict[str, List[Optional[float]]]] = None

    @property
    def depends_on_epochs(self) -> bool:
        """True where the length of epochs matters to a value."""
        return any(each.interval == "epoch" for each in self._schedules)

    def at(self, step: int) -> Dict[str, List[Optional[float]]]:
        """For each option its values at ``step``, in the groups' order; None where it stays.

        Raises :class:`RateError` for a value that the option cannot have.
        """
        found = {}
        for schedule, values, place in zip(self._schedules, self._values, self._places):
            position = self._position(schedule, step)
            found[schedule.option] = [
                None if each is None else self._value(each, position, schedule, place, name, step)
                for each, name in zip(values, self._names)
            ]
        return found

    def _position(self, schedule: OptionSchedule, step: int) -> int:
        counted = self._calendar.epoch_of(step) if schedule.interval == "epoch" else step
        return counted // schedule.frequency

    def _value(
        self,
        values: Values,
        position: int,
        schedule: OptionSchedule,
        place: str,
        name: str,
        step: int,
    ) -> float:
        value: Any = values[min(position, len(values) - 1)] if isinstance(values, tuple) else None
        if value is None:
            value = values(position)  # type: ignore[operator]
        if _is_number(value) and _may_be(float(value), place):
            return float(value)
        raise RateError(
            f"{schedule.key} gives group {name!r} {value!r} at step {step}: {_BOUNDS[place]}."
        )

    def check(self, begin: int, stop: Optional[int]) -> None:
        """Look at the values from step ``begin`` to ``stop``, before the run; see :meth:`at`."""
        last = begin if stop is None else max(begin, stop - 1)
        every = max(1, (last - begin) // _LOOKED_AT)
        for step in (*range(begin, last, every), last):
            self.at(step)
        for schedule, by_group in zip(self._schedules, self._values):
            lengths = [len(each) for each in by_group if isinstance(each, tuple)]
            positions = self._position(schedule, last) + 1
            if stop is not None and lengths and min(lengths) < positions - 1:
                n, interval = schedule.frequency, schedule.interval
                unit = f"{interval}s" if n == 1 else f"times {n} {interval}s"
                warn(
                    f"the table of {min(lengths)} values in {schedule.key} is over after as many "
                    f"{unit}, but the run has {positions}: its last value goes on from there. "
                    "Lengthen it, or train shorter."
                )

    def write(self, groups: Sequence[Dict[str, Any]], step: int) -> None:
        """Write the values of ``step`` into the ``groups`` of the optimizer.

        Raises :class:`RateError` where somebody has changed one by hand since the last time.
        """
        for option, values in (self._written or {}).items():
            for name, group, value in zip(self._names, groups, values):
                now = standing(group, option)
                if value is not None and now != value:
                    raise RateError(
                        f"the {option} of group {name!r} was changed by hand from {value:g} to "
                        f"{now} during training, and {option}_schedule decides it: leave out one "
                        "of the two."
                    )
        self.put(groups, step)

    def put(self, groups: Sequence[Dict[str, Any]], step: int) -> None:
        """As :meth:`write`, over whatever stands there."""
        values = self.at(step)
        if values == self._written:
            return
        for by_group, place in zip(values.values(), self._places):
            for group, value in zip(groups, by_group):
                if value is not None:
                    both = (value, group[place][1]) if place == "betas" else value
                    set_quietly(group, place, both)
        self._written = values

    def masked(self, index: int, options: Dict[str, Any]) -> Dict[str, Any]:
        """The plain ``options`` of group number ``index``, with no values of what moves."""
        masked = dict(options)
        for values, place in zip(self._values, self._places):
            if values[index] is not None and place in masked:
                beta = place == "betas"
                masked[place] = ["scheduled", masked[place][1]] if beta else "scheduled"
        return masked


_BOUNDS = {
    "weight_decay": "a weight decay is finite and not negative",
    "momentum": "a momentum is above 0 and below 1 (at 0 OneFlow's SGD keeps no memory)",
    "betas": "the beta that a momentum_schedule moves is from 0 on and below 1",
}
"""What a value of the option must be, by its key in a group."""


def _may_be(value: float, place: str) -> bool:
    if place == "weight_decay":
        return value >= 0
    return value < 1 and (value > 0 or (value == 0 and place == "betas"))


def _by_group(
    schedule: OptionSchedule, names: Sequence[str], groups: Sequence[Dict[str, Any]]
) -> List[Optional[Values]]:
    """For each group the values that it has, None where it keeps its own."""
    for_all = schedule.for_all
    if for_all is None:
        unknown = sorted(map(str, set(schedule.by_name) - set(names)))
        if unknown:
            raise RateError(
                f"{schedule.key} is given for the groups {unknown}, but the groups are "
                f"{list(names)}."
            )
        return [schedule.by_name.get(name) for name in names]
    if schedule.option != "weight_decay":
        return [for_all] * len(names)
    if not any(group["weight_decay"] for group in groups):
        raise RateError(
            f"all groups have weight_decay=0, and a {schedule.key} moves those that decay: give "
            "the optimizer a weight_decay, which the schedule takes the place of, or name the "
            f"groups, as in {{{names[0]!r}: ...}} (they are {quoted(names, most=8)})."
        )
    return [for_all if group["weight_decay"] else None for group in groups]
