"""A photograph of a plain value: equal to another where a traced step would compute the same."""

from __future__ import annotations

import types
from typing import Any, Dict, List, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.metrics.base import Metric

_DEPTH = 5
_MOST = 1_000
"""So many entries of a container are looked at."""
_FOREIGN = ("ofengine", "oneflow", "flowvision", "numpy", "builtins", "logging", "threading")
"""Packages whose objects are known by which they are, not by what they hold."""
_BY_IDENTITY = (
    flow.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType
)  # fmt: skip


@attrs.define
class Film:
    """What photographs were taken of."""

    changeable: List[Any] = attrs.Factory(list)
    """Containers that can change in place."""
    held: List[Any] = attrs.Factory(list)
    """Objects known by their ``id``, which no other one may get meanwhile."""


def photo(value: Any, film: Film, depth: int = _DEPTH) -> Any:
    """What ``value`` is and holds.

    A number is told from another by its bits (``0.0`` from ``-0.0``), a tensor or a module by
    which it is, a list, a dict, an array or an object of the user's by what is in it.
    """
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return type(value), value
    if isinstance(value, (float, complex)):
        return type(value), repr(value)
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, _BY_IDENTITY) or depth == 0:
        film.held.append(value)
        return "is", id(value)
    if isinstance(value, np.ndarray):
        film.changeable.append(value)
        small = value.size <= _MOST and value.dtype != object
        return "array", id(value), value.shape, value.tobytes() if small else b""
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, (list, tuple, set, frozenset)):
        if not isinstance(value, (tuple, frozenset)):
            film.changeable.append(value)
        inside = [photo(each, film, depth - 1) for each in list(value)[:_MOST]]
        if isinstance(value, (set, frozenset)):
            inside.sort(key=repr)
        return type(value), len(value), tuple(inside)
    if isinstance(value, dict):
        film.changeable.append(value)
        return type(value), _entries(value, film, depth)
    holds = getattr(value, "__dict__", None)
    is_foreign = type(value).__module__.partition(".")[0] in _FOREIGN
    # What a metric counts is in an object of its own; its options are looked at.
    if not isinstance(holds, dict) or (is_foreign and not isinstance(value, Metric)):
        film.held.append(value)
        return "is", id(value)
    film.held.append(value)
    film.changeable.append(holds)
    return type(value), id(value), _entries(holds, film, depth)


def _entries(holds: Dict[Any, Any], film: Film, depth: int) -> Tuple[Any, ...]:
    return tuple((key, photo(each, film, depth - 1)) for key, each in list(holds.items())[:_MOST])


def difference(name: str, before: Any, after: Any) -> str:
    """Where two photographs of what is called ``name`` differ, as the user would write it."""
    pairs = (before, after)
    if all(isinstance(each, tuple) and isinstance(each[-1], tuple) for each in pairs):
        is_object = len(before) == 3 and isinstance(before[1], int) and before[0] not in (list, set)
        old, new = before[-1], after[-1]
        keyed = issubclass(before[0], dict) if isinstance(before[0], type) else False
        for was, now in zip(old, new):
            if was == now:
                continue
            if (keyed or is_object) and len(was) == 2 and was[0] == now[0]:
                inner = f"{name}[{was[0]!r}]" if keyed else f"{name}.{was[0]}"
                return difference(inner, was[1], now[1])
            return name
    return name
