"""What a state must look like: kinds, keys and ranges, in words that are checked.

A check is a function of a value and its place. It raises where the value is of another kind, and
changes nothing::

    shape = record({"epoch": whole(0), "loss": maybe(number())})
    check_fits({"epoch": 3, "loss": None}, shape, "last.safetensors")
"""

from __future__ import annotations

import math
from typing import Any, Callable, Collection, Dict, Mapping, Optional, Tuple

import numpy as np

from ofengine.errors import CheckpointError

Check = Callable[[Any, str], None]
"""Raises where a value, at a place, is not of one kind."""

MOST = 2**62
"""No count in a run is larger."""
_SHOWN = 40


class Misfit(Exception):
    """A value is not what a check wants; the message says which, in half a sentence."""


def misfit(place: str, value: Any, expected: str) -> Misfit:
    """What a check raises where the ``value`` at ``place`` is not what is ``expected``."""
    return Misfit(f"{place or 'the state'} is {shown(value)}, where {expected} is expected")


def check_fits(value: Any, check: Check, where: str) -> None:
    """Raise :class:`CheckpointError`, which begins with ``where``, unless ``check`` is content."""
    try:
        check(value, "")
    except Misfit as error:
        raise CheckpointError(f"{where}: {error}.") from None
    except RecursionError:
        raise CheckpointError(f"{where}: it is nested too deep.") from None


def shown(value: Any) -> str:
    """``value`` in a few words, whatever it is."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**_SHOWN else "a number of many digits"
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with the shape {value.shape}"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------- single values


def anything(value: Any, place: str) -> None:
    """Whatever a file can hold."""


def flag(value: Any, place: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise misfit(place, value, "True or False")


def text(value: Any, place: str) -> None:
    """A text that can be written anywhere: no NUL, nothing that UTF-8 cannot hold."""
    if not isinstance(value, str) or "\0" in value or not _is_unicode(value):
        raise misfit(place, value, "a text")


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_of(*choices: str) -> Check:
    """One of these texts."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or value not in choices:
            raise misfit(place, value, f"one of {', '.join(map(repr, choices))}")

    return check


def whole(least: int = 0, most: int = MOST) -> Check:
    """A whole number from ``least`` to ``most``."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            end = "on" if most == MOST else f"to {most}"
            raise misfit(place, value, f"a whole number from {least} {end}")

    return check


def number(least: Optional[float] = None, most: float = math.inf) -> Check:
    """A number, infinite or NaN too; with ``least`` a finite one from there to ``most``."""

    def check(value: Any, place: str) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if good and isinstance(value, int):
            good = abs(value) <= 2**1000  # beyond, it is no float
        if good and least is not None:
            good = math.isfinite(value) and least <= value <= most
        if not good:
            end = "on" if most == math.inf else f"to {most:g}"
            finite = "a number" if least is None else f"a finite number from {least:g} {end}"
            raise misfit(place, value, finite)

    return check


def plain(value: Any, place: str) -> None:
    """None, True, False, a number, a text, or lists of these."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            plain(each, _inside(place, str(index)))
    elif isinstance(value, str):
        text(value, place)
    elif isinstance(value, (dict, np.ndarray)):
        raise misfit(place, value, "a number, a text, or a list of these")


def array(
    kinds: str = "f", shape: Optional[Tuple[int, ...]] = None, dtype: Optional[Any] = None
) -> Check:
    """An array whose dtype is of ``kinds`` (numpy's letters), or just ``dtype``."""

    def check(value: Any, place: str) -> None:
        good = isinstance(value, np.ndarray) and value.dtype.kind in kinds
        good = good and (shape is None or value.shape == shape)
        good = good and (dtype is None or value.dtype == dtype)
        if not good:
            what = "an array" if dtype is None else f"an array of {np.dtype(dtype)}"
            raise misfit(place, value, what if shape is None else f"{what} of the shape {shape}")

    return check


def maybe(check: Check) -> Check:
    """None, or what ``check`` is content with."""

    def check_or_none(value: Any, place: str) -> None:
        if value is not None:
            check(value, place)

    return check_or_none


# ---------------------------------------------------------------------- what holds others


def listed(check: Check, length: Optional[int] = None) -> Check:
    """A list of such values, of the ``length`` where it is given."""

    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            count = "a list" if length is None else f"a list of {length}"
            raise misfit(place, value, count)
        for index, each in enumerate(value):
            check(each, _inside(place, str(index)))

    return check_all


def row(*checks: Check) -> Check:
    """A list of as many values, each as its own check says."""

    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise misfit(place, value, f"a list of {len(checks)}")
        for index, (each, check) in enumerate(zip(value, checks)):
            check(each, _inside(place, str(index)))

    return check_all


def by_name(check: Check, names: Optional[Collection[str]] = None) -> Check:
    """A dict of such values; any texts are its keys, or some of ``names``."""

    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise misfit(place, value, "a dict")
        for key, each in value.items():
            text(key, f"a key of {place or 'the state'}")
            if names is not None and key not in names:
                few = ", ".join(map(repr, sorted(names)[:4]))
                raise Misfit(
                    f"{place or 'the state'} has the key {shown(key)}, which is none of the "
                    f"{len(names)} known ones{f' ({few}, ...)' if names else ''}"
                )
            check(each, _inside(place, key))

    return check_all


def record(needed: Mapping[str, Check], others: Optional[Mapping[str, Check]] = None) -> Check:
    """A dict with all ``needed`` keys, and perhaps the ``others``, and no more."""
    known: Dict[str, Check] = {**needed, **(others or {})}

    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise misfit(place, value, "a dict")
        lacking = [repr(key) for key in needed if key not in value]
        if lacking:
            raise Misfit(f"{place or 'the state'} lacks {', '.join(lacking)}")
        for key, each in value.items():
            if key not in known:
                raise Misfit(f"{place or 'the state'} has the key {shown(key)}, which is not known")
            known[key](each, _inside(place, key))

    return check_all


def _inside(place: str, key: str) -> str:
    return f"{place}/{key}" if place else key
