"""A photograph of a plain value: equal to another where a traced step would compute the same."""

from __future__ import annotations

import enum
import functools
import itertools
import types
from collections import deque
from typing import Any, Dict, Iterator, List, Set, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.metrics.base import Metric
from ofengine.modes.users import is_users

_DEPTH = 5
_MOST = 1_000
"""So many entries of a container are looked at."""
_FOREIGN = ("ofengine", "oneflow", "flowvision", "numpy", "builtins", "logging", "threading")
"""Packages whose objects are known by which they are, not by what they hold."""
_BY_IDENTITY = (
    flow.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
    enum.Enum,
)  # fmt: skip
_PLAIN = frozenset({type(None), bool, int, str, bytes})


@attrs.define
class Film:
    """What photographs were taken of."""

    changeable: List[Any] = attrs.Factory(list)
    """Containers that can change in place."""
    held: List[Any] = attrs.Factory(list)
    """Objects known by their ``id``, which no other one may get meanwhile."""
    functions: List[types.FunctionType] = attrs.Factory(list)
    """The user's functions that were met."""
    classes: Dict[int, type] = attrs.Factory(dict)
    """The user's classes, and those of objects, by their ``id``."""
    modules: Dict[int, types.ModuleType] = attrs.Factory(dict)
    """The user's modules, in the sense of Python, by their ``id``."""

    _foreign: Set[int] = attrs.Factory(set)

    def meet(self, value: Any) -> None:
        """Note a function, a class or a module of the user's; of any other object its class."""
        if isinstance(value, types.FunctionType):
            if is_users(value):
                self.functions.append(value)
        elif isinstance(value, types.ModuleType):
            if is_users(value):
                self.modules[id(value)] = value
        else:
            cls = value if isinstance(value, type) else type(value)
            if id(cls) not in self._foreign and id(cls) not in self.classes:
                if any(map(is_users, cls.__mro__)):
                    self.classes[id(cls)] = cls
                else:
                    self._foreign.add(id(cls))


def photo(value: Any, film: Film, depth: int = _DEPTH) -> Any:
    """What ``value`` is and holds.

    A number is told from another by its bits (``0.0`` from ``-0.0``), a tensor or a module by
    which it is, a list, a dict, an array or an object of the user's by what is in it.
    """
    if type(value) in _PLAIN:
        return type(value), value
    if isinstance(value, types.MethodType):
        own = value.__self__
        value = value.__func__
        if not isinstance(own, (nn.Module, type)) and is_users(type(own)):
            return "method", photo(value, film, depth), photo(own, film, depth)
    if isinstance(value, _BY_IDENTITY) or depth == 0:
        film.held.append(value)
        film.meet(value)
        return "is", id(value)
    if isinstance(value, (int, str, bytes)):
        return type(value), value, _of_object(value, film, depth)
    if isinstance(value, (float, complex)):
        return type(value), repr(value), _of_object(value, film, depth)
    if isinstance(value, np.ndarray):
        film.changeable.append(value)
        small = value.size <= _MOST and value.dtype != object
        return "array", id(value), value.shape, value.tobytes() if small else b""
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, functools.partial):
        film.changeable.append(value.keywords)
        parts = value.func, value.args, value.keywords
        return "partial", tuple(photo(each, film, depth) for each in parts)
    if isinstance(value, (list, tuple, set, frozenset, deque, dict)):
        return _of_container(value, film, depth)
    is_foreign = type(value).__module__.partition(".")[0] in _FOREIGN
    # What a metric counts is in an object of its own; its options are looked at.
    film.held.append(value)
    if not has_attributes(value) or (is_foreign and not isinstance(value, Metric)):
        return "is", id(value)
    return type(value), id(value), _of_object(value, film, depth)


def _of_container(value: Any, film: Film, depth: int) -> Tuple[Any, ...]:
    own = (_of_object(value, film, depth),) if is_users(type(value)) else ()
    if not isinstance(value, (tuple, frozenset)):
        film.changeable.append(value)
    if isinstance(value, dict):
        return (type(value), *own, _entries(value, film, depth))
    inside = [photo(each, film, depth - 1) for each in itertools.islice(value, _MOST)]
    if isinstance(value, (set, frozenset)):
        inside.sort(key=repr)
    return (type(value), *own, len(value), tuple(inside))


def _of_object(value: Any, film: Film, depth: int) -> Tuple[Any, ...]:
    """The attributes of an object of the user's, in its ``__dict__`` and beside it."""
    found: Tuple[Any, ...] = ()
    if type(value) in (float, complex):
        return found
    film.meet(value)
    holds = getattr(value, "__dict__", None)
    if isinstance(holds, dict):
        film.changeable.append(holds)
        found = _entries(holds, film, depth)
    slots = Slots(value)
    if slots.names:
        film.changeable.append(slots)
        found += _entries(dict(slots.items()), film, depth)
    return found


def has_attributes(value: Any) -> bool:
    """True for an object whose attributes can be looked at."""
    return isinstance(getattr(value, "__dict__", None), dict) or bool(Slots(value).names)


class Slots:
    """The attributes that an object of the user's keeps in ``__slots__``, as if in a dict."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.names = [name for cls in type(of).__mro__ for name in _slots_of(cls)]

    def items(self) -> Iterator[Tuple[str, Any]]:
        """(name, value) of those that are set."""
        found = ((name, getattr(self.of, name, _NONE)) for name in self.names)
        return ((name, value) for name, value in found if value is not _NONE)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, where it is set."""
        return getattr(self.of, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.of, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.of, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.of, name)


_NONE: Any = object()


@functools.lru_cache(maxsize=4_096)
def _slots_of(cls: type) -> Tuple[str, ...]:
    if "__slots__" not in vars(cls) or not is_users(cls):
        return ()
    members = {k for k, each in vars(cls).items() if isinstance(each, types.MemberDescriptorType)}
    return tuple(name for name in sorted(members))


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
