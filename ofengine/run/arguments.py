"""Checks of arguments, the Trainer's and others'."""

from __future__ import annotations

import inspect
import math
import numbers
import re
from datetime import timedelta
from fractions import Fraction
from typing import Any, Dict, Optional, Sequence, Union

from ofengine.errors import ConfigurationError

MaxTime = Union[str, Dict[str, int], timedelta, None]
Limit = Union[int, float, None]


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """``value`` where it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name}={value!r}: use one of {sorted(choices)}.")
    return value


def refused_by(
    called: Any, given: Sequence[str], named: Sequence[str] = ()
) -> Optional[inspect.Signature]:
    """The signature of ``called`` where it takes other arguments; None where it takes these.

    ``given`` by position, ``named`` by name; None too where nobody knows what it takes.
    """
    is_bound = inspect.ismethod(called)
    try:
        of = called.__func__ if is_bound else called
        signature = inspect.signature(of, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*(("self",) if is_bound else ()), *given, **dict.fromkeys(named))
    except TypeError:
        return signature
    return None


def check_takes(owner: Any, method: str, *given: str) -> None:
    """Raise where ``owner``'s ``method`` cannot be called with what is ``given``, by position."""
    signature = refused_by(getattr(owner, method), given)
    if signature is not None:
        raise ConfigurationError(
            f"{type(owner).__name__}.{method}{signature} cannot be called as the engine calls it: "
            f"write `def {method}({', '.join(('self', *given))})`."
        )


def check_count(name: str, value: Any, least: int, what: str, most: float = math.inf) -> int:
    """``value`` where it is a whole number from ``least`` to ``most``."""
    if not is_whole(value) or not least <= value <= most:
        raise ConfigurationError(f"{name}={value!r}: give {what}.")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` where it is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r}: give True or False.")
    return value


def is_whole(value: Any) -> bool:
    """True for an int, numpy's included, and not for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_limit(name: str, limit: Any) -> Limit:
    """A limit of batches: None, a whole number, or a share between 0.0 and 1.0."""
    if limit is None:
        return None
    if is_whole(limit) and limit >= 0:
        return int(limit)
    if isinstance(limit, float) and 0.0 <= limit <= 1.0:
        return limit
    hint = ""
    if isinstance(limit, float) and math.isfinite(limit) and limit > 1.0:
        hint = f" (for {limit:g} batches write {int(limit)})"
    raise ConfigurationError(
        f"{name}={limit!r}: give a number of batches (an int), a share of them between 0.0 and 1.0 "
        f"(a float), or None for all{hint}."
    )


_SHARE_IS_MEANT_TO = Fraction(1, 2**50)
"""How far a share may be from what is meant: ``1 - 0.7`` and ``3 * 0.1`` are off by a rounding."""


def batches_in_share(share: float, batches: int) -> int:
    """The whole batches in a ``share``, from 0.0 to 1.0, of so many ``batches``.

    Exact: 0.29 of 100 are 29, and 1/49 of 49 is one, though ``0.29 * 100`` and ``1 / 49 * 49`` are
    less in floating point.
    """
    if share <= 0:
        return 0
    return min(batches, math.floor((Fraction(share) + _SHARE_IS_MEANT_TO) * batches))


def check_clip(value: Any) -> Optional[float]:
    """``gradient_clip_val`` as a float; None and 0 mean no clipping."""
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ConfigurationError(
            f"gradient_clip_val={value!r}: give a positive number, or None for no clipping."
        )
    return float(value) or None


def seconds_of(max_time: MaxTime, name: str = "max_time") -> Optional[float]:
    """``max_time`` in seconds: "DD:HH:MM:SS", a timedelta, or a dict of its arguments.

    ``name`` is the argument that errors speak of; default: ``max_time``.
    """
    if max_time is None:
        return None
    if isinstance(max_time, dict):
        try:
            max_time = timedelta(**max_time)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(
                f"{name}={max_time!r}: {error}: write the arguments of datetime.timedelta, such "
                "as {'hours': 2}."
            ) from None
    if isinstance(max_time, timedelta):
        if max_time < timedelta(0):
            raise ConfigurationError(f"{name}={max_time!r}: give a time that is not negative.")
        return max_time.total_seconds()
    match = isinstance(max_time, str) and re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time)
    if not match:
        raise ConfigurationError(
            f'{name}={max_time!r}: write it as "DD:HH:MM:SS" (days, hours, minutes, seconds), a '
            "datetime.timedelta, or a dict such as {'hours': 2}."
        )
    days, hours, minutes, seconds = map(int, match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def batches_between_validations(interval: Limit, batches: Optional[int]) -> Optional[int]:
    """``val_check_interval`` in batches; None stands for "at the end of the epoch"."""
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return None
    valid = is_whole(interval) or (isinstance(interval, float) and math.isfinite(interval))
    if not valid or interval <= 0:
        raise ConfigurationError(
            f"val_check_interval={interval!r}: give a number of batches (an int) or a share of the "
            "epoch between 0.0 and 1.0 (a float)."
        )
    if isinstance(interval, float):
        if interval > 1.0:
            raise ConfigurationError(
                f"val_check_interval={interval!r}: a float is a share of the epoch, at most 1.0; "
                f"for {interval:g} batches write {int(interval)}."
            )
        if batches is None:
            raise ConfigurationError(
                f"val_check_interval={interval!r} is a share of an epoch whose length is not "
                "known: give a number of batches (an int)."
            )
        return max(1, batches_in_share(interval, batches))
    if batches is not None and interval > batches:
        raise ConfigurationError(
            f"val_check_interval={interval} is more than the {batches} batches of an epoch: "
            "validation would never run. Give a smaller number, or use check_val_every_n_epoch."
        )
    return int(interval)
