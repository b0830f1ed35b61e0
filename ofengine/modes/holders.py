"""What Python values a task, and the user's functions that a step can come to, reach and set."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections import deque
from typing import Any, Iterable, Iterator, List, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine.modes.own_draws import state_of
from ofengine.modes.photo import Film, Slots
from ofengine.modes.reach import names_of, own_classes, reached, value_at
from ofengine.modes.users import is_users
from ofengine.task import TaskModule

_DEEPEST = 4
_MOST_ENTRIES, _MOST_HOLDERS = 1_000, 10_000
_NUMBERS = (bool, int, float, complex, np.generic)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PASSED_BY = (
    flow.Tensor, np.ndarray, nn.Module, nn.Graph, Optimizer, type, str, bytes, types.ModuleType,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip
_PACKAGES = (
    "ofengine", "oneflow", "flowvision", "numpy", "builtins", "logging", "threading", "weakref",
)  # fmt: skip
_LEAVES = (bool, int, float, str, bytes, type(None), flow.Tensor)
_MISSING: Any = object()


class Holders:
    """What the values that a task can reach are held by, and what that held."""

    def __init__(self, task: TaskModule) -> None:
        self._held: List[Tuple[str, Any, Any]] = []
        self._arrays: List[Tuple[str, np.ndarray, np.ndarray]] = []
        self._attributes: Set[int] = set()
        """The ``id`` of each dict that holds the attributes of an object."""
        self._seen: Set[int] = set()
        self._drawn_from: List[Tuple[str, Any, Any]] = []
        self._film = Film()
        for path, module in task.named_modules():
            own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
            place = f"self.{path}" if path else "self"
            if path:  # a property of a submodule may keep something there
                self._held.append((place, vars(module), own))
                self._attributes.add(id(vars(module)))
            for name, value in own.items():
                self._walk(f"{place}.{name}", value, _DEEPEST)
        self._film.functions += _functions(task)
        for module in task.modules():
            self._film.meet(module)
        for name, _, _, value in reached(self._film):
            self._walk(name, value, _DEEPEST)
        self._set = [(*place, value_now(*place[1:])) for place in _places_set(self._film)]

    def _walk(self, place: str, value: Any, depth: int) -> None:
        if type(value) in _LEAVES or id(value) in self._seen or len(self._held) > _MOST_HOLDERS:
            return
        self._seen.add(id(value))
        self._film.meet(value)
        state = state_of(value)
        if state is not None:
            self._drawn_from.append((place, value, state))
            return
        if isinstance(value, np.ndarray) and value.size <= _MOST_ENTRIES:
            self._arrays.append((place, value, value.copy()))
        for within, each in _held_by(value) if depth else ():
            self._walk(place + within, each, depth - 1)
        for holder in _holders_in(value):
            kinds = (list, set, deque)
            kind = next((each for each in kinds if isinstance(holder, each)), dict)
            before: Any = kind(holder.items() if kind is dict else holder)
            self._held.append((place, holder, before))
            if holder is not value:
                self._attributes.add(id(holder))

    def changed(self) -> List[str]:
        """Where numbers are others than before, or entries of a list, a set or a deque."""
        found = [place for place, now, before in self._arrays if not np.array_equal(now, before)]
        for place, holder, before in self._held:
            if not isinstance(holder, (dict, Slots)):
                same = len(holder) == len(before) and not _new_entries(holder, before)
                found += [] if same else [place]
                continue
            of_object = id(holder) in self._attributes
            for key, value in holder.items():  # what is new and no number may be a table
                if of_object and key in _OF_EVERY_MODULE:
                    continue
                if isinstance(value, _NUMBERS) and value is not before.get(key, ...):
                    within = f".{key}" if of_object else f"[{key!r}]"
                    found.append(place + within)
        for place, holder, name, before in self._set:
            value = value_now(holder, name)
            same = value is before or (isinstance(before, _NUMBERS) and value == before)
            if isinstance(value, _NUMBERS) and not same:
                found.append(place)
        return found

    def moved_on(self) -> List[Tuple[str, Any]]:
        """The generators and iterators that are further than before, and how they are called."""
        return [(place, each) for place, each, state in self._drawn_from if state_of(each) != state]

    def undo(self) -> List[Tuple[str, Any]]:
        """Take tensors of the trace out again: (how it is called, what collects them or None)."""
        found: List[Tuple[str, Any]] = []
        for place, holder, before in self._held:
            if isinstance(holder, (dict, Slots)):
                new = [k for k, v in holder.items() if before.get(k, before) is not v]
                for key in (key for key in new if holds_lazy(holder[key])):
                    if key in before:
                        holder[key] = before[key]
                    else:
                        del holder[key]
                    found.append((place, None))
            elif any(map(holds_lazy, _new_entries(holder, before))):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(before)
                found.append((place, holder))
        for place, holder, name, before in self._set:
            value = value_now(holder, name)
            if value is not before and holds_lazy(value):
                _put(holder, name, before)
                found.append((place, None))
        return found


def _new_entries(holder: Any, before: Any) -> List[Any]:
    """What a list, set or deque holds that it did not hold, or not there."""
    if isinstance(holder, set):
        known = set(map(id, before))
        return [each for each in holder if id(each) not in known]
    pairs = itertools.zip_longest(holder, before)
    return [each for each, old in pairs if each is not old]


def holds_lazy(value: Any, depth: int = _DEEPEST) -> bool:
    """True for a tensor of a trace, and for a container of some."""
    if isinstance(value, flow.Tensor):
        return bool(value.is_lazy)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, deque)):
        return False
    return depth > 0 and any(holds_lazy(each, depth - 1) for each in value)


def _holders_in(value: Any) -> List[Any]:
    """What holds the values in ``value``: a container, the attributes of an object."""
    if isinstance(value, (dict, list, set, deque)):
        return [
            value,
            *([vars(value)] if is_users(type(value)) and hasattr(value, "__dict__") else []),
        ]
    if isinstance(value, (tuple, *_PASSED_BY)) or not is_watched(type(value)):
        return []
    own, slots = getattr(value, "__dict__", None), Slots(value)
    return [*([own] if isinstance(own, dict) else []), *([slots] if slots.names else [])]


def _held_by(value: Any) -> List[Tuple[str, Any]]:
    """(how it is called behind its holder, value) of what a value holds."""
    if isinstance(value, types.MethodType):
        return [("", value.__self__)]
    if isinstance(value, types.BuiltinFunctionType):
        return [] if isinstance(value.__self__, types.ModuleType) else [("", value.__self__)]
    if isinstance(value, functools.partial):
        return [("", value.func), ("", value.args), (".keywords", value.keywords)]
    found: List[Iterable[Tuple[str, Any]]] = []
    if isinstance(value, dict):
        found.append((f"[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, (list, tuple, set, deque)):
        found.append(("", each) for each in value)
    others = [each for each in _holders_in(value) if each is not value]
    found += [((f".{name}", each) for name, each in holder.items()) for holder in others]
    return list(itertools.islice(itertools.chain(*found), _MOST_ENTRIES))


def is_watched(cls: type) -> bool:
    """False for classes whose objects change as they like: OneFlow's, a logger's."""
    return cls.__module__.partition(".")[0] not in _PACKAGES


def _places_set(film: Film) -> Iterator[Tuple[str, Any, str]]:
    """What the functions set by name: (how it is called, who holds it, its name there)."""
    attributes: Set[str] = set()
    for function in {id(each): each for each in film.functions}.values():
        named = names_of(function.__code__)
        attributes |= named.set_attributes
        for name in named.set_globals:
            yield name, function.__globals__, name
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            if name in named.set_free:
                yield name, cell, name
    classes = {id(each): each for cls in film.classes.values() for each in own_classes(cls)}
    for cls in classes.values():
        for name in attributes:
            if not hasattr(type(vars(cls).get(name)), "__set__"):  # neither a property nor a slot
                yield f"{cls.__qualname__.rpartition('<locals>.')[2]}.{name}", cls, name
    for module in film.modules.values():
        for name in attributes & vars(module).keys():
            yield f"{module.__name__}.{name}", vars(module), name


def value_now(holder: Any, name: str) -> Any:
    """What is at such a place, and not at that of a base class."""
    if isinstance(holder, type):
        return vars(holder).get(name, _MISSING)
    return value_at(holder, name, _MISSING)


def _put(holder: Any, name: str, value: Any) -> None:
    """Set what is at such a place, or take it away."""
    gone = value is _MISSING
    if isinstance(holder, type):
        type.__delattr__(holder, name) if gone else type.__setattr__(holder, name, value)
    elif isinstance(holder, types.CellType):
        if gone:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif gone:
        del holder[name]
    else:
        holder[name] = value


def _functions(task: TaskModule) -> Iterator[types.FunctionType]:
    """The user's own functions on the task and on its modules."""
    for module in task.modules():
        for value in vars(module).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield function
    for cls in {kind: None for module in task.modules() for kind in type(module).__mro__}:
        if is_watched(cls):
            yield from (each for each in vars(cls).values() if inspect.isfunction(each))
