"""What a traced step leaves behind in Python: told, and undone.

A trace runs the user's Python once, over tensors without values. What it puts into a list, a dict
or an object, to be looked at after the step, is of no use there; and a layer that it makes is
forgotten with the trace, so that it would never train.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
from collections import deque
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.assignments import telling_assignments
from ofengine._oneflow.tracing import replaces_buffer
from ofengine.errors import GraphModeError, warn
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


@contextlib.contextmanager
def nothing_left_behind(task: TaskModule, what: str) -> Iterator[None]:
    """Trace the step that is called ``what`` in the block.

    Afterwards each list, dict, set and object that the task, or a function of it, can reach holds
    what it held before where the trace has put tensors into it, and a warning tells so: an entry
    or attribute may be a table that is made once and kept.

    Another warning tells of numbers that it changes there, which stay as the trace has left them.

    Raises :class:`GraphModeError` where tensors are collected in a list, set or deque, and where a
    layer is set on a module.
    """
    names = {id(module): name for name, module in task.named_modules()}
    tensors_set: List[str] = []
    numbers_set: List[str] = []

    def assigned(module: nn.Module, name: str, value: Any) -> None:
        path = ".".join(filter(None, ["self", names.get(id(module), "?"), name]))
        if _is_layer(value):
            raise GraphModeError(
                f"{path} is a layer that is made, or set, in a compiled step, where it would never "
                "train: make it in __init__ or in setup()"
            )
        if replaces_buffer(module, name, value):
            return  # it is written back
        # Of the task's own another warning tells; of OneFlow's own layers nobody needs to know.
        if module is not task and _is_users(type(module)):
            (tensors_set if _holds_lazy(value) else numbers_set).append(path)

    holders = _Holders(task)
    try:
        with telling_assignments(assigned):
            yield
    except BaseException:
        holders.undo()
        raise
    found = holders.undo()
    collected = sorted({place for place, holder in found if not isinstance(holder, dict)})
    kept = sorted({*tensors_set, *(place for place, holder in found if isinstance(holder, dict))})
    if collected:
        raise GraphModeError(
            f"{what} collects tensors in {', '.join(collected)} in a compiled step, which is "
            "traced once, over tensors without values: return them and collect them in "
            "on_train_batch_end (on_validation_batch_end, ...), which is given what the step "
            "returns, or log them; a list of what the step itself needs can be a local variable"
        )
    if kept:
        warn(
            f"{what} puts tensors into {', '.join(kept)} in a compiled step, which is traced once, "
            "over tensors without values: they are taken out again. Return or log what is to be "
            "looked at after the step."
        )
    changed = sorted({*numbers_set, *holders.changed()})
    if changed:
        warn(
            f"{what} changes {', '.join(changed[:5])} in a compiled step, whose Python runs once, "
            "at the trace, and not for each batch: do it in on_train_batch_end "
            "(on_validation_batch_end, ...), or make it a buffer, which a compiled step may change."
        )


def _is_layer(value: Any) -> bool:
    """True for a parameter, or for a module that has some; not for one that stands in a trace."""
    if issubclass(type(value), nn.Module):
        return next(value.parameters(), None) is not None
    return isinstance(value, nn.Parameter)


def _holds_lazy(value: Any, depth: int = _DEEPEST) -> bool:
    if isinstance(value, flow.Tensor):
        return bool(value.is_lazy)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, deque)):
        return False
    return depth > 0 and any(_holds_lazy(each, depth - 1) for each in value)


class _Holders:
    """What Python values a task can reach are held by, and what they held."""

    def __init__(self, task: TaskModule) -> None:
        self._held: List[Tuple[str, Any, Any]] = []
        self._arrays: List[Tuple[str, np.ndarray, np.ndarray]] = []
        self._attributes: Set[int] = set()
        """The ``id`` of each dict that holds the attributes of an object."""
        self._seen: Set[int] = set()
        for path, module in task.named_modules():
            own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
            place = f"self.{path}" if path else "self"
            if path:  # a property of a submodule may keep something there
                self._held.append((place, vars(module), own))
                self._attributes.add(id(vars(module)))
            for name, value in own.items():
                self._walk(f"{place}.{name}", value, _DEEPEST)
        for name, value in _free_values(task):
            self._walk(name, value, _DEEPEST)

    def _walk(self, place: str, value: Any, depth: int) -> None:
        if id(value) in self._seen or len(self._held) > _MOST_HOLDERS:
            return
        self._seen.add(id(value))
        children: Iterable[Tuple[str, Any]]
        if isinstance(value, dict):
            children = ((f"{place}[{key!r}]", each) for key, each in value.items())
        elif isinstance(value, (list, tuple, set, deque)):
            children = ((place, each) for each in value)
        elif (
            not isinstance(value, _PASSED_BY)
            and _is_users(type(value))
            and _attributes(value) is not None
        ):
            value = _attributes(value)
            self._attributes.add(id(value))
            children = ((f"{place}.{name}", each) for name, each in value.items())
        elif isinstance(value, np.ndarray) and value.size <= _MOST_ENTRIES:
            self._arrays.append((place, value, value.copy()))
            return
        else:
            return
        if not isinstance(value, tuple):
            kind = next(each for each in (dict, list, set, deque) if isinstance(value, each))
            self._held.append((place, value, kind(value)))
        for name, each in list(itertools.islice(children, _MOST_ENTRIES)) if depth else ():
            self._walk(name, each, depth - 1)

    def changed(self) -> List[str]:
        """Where numbers are others than before, or entries of a list, a set or a deque."""
        found = [place for place, now, before in self._arrays if not np.array_equal(now, before)]
        for place, holder, before in self._held:
            if not isinstance(holder, dict):
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
        return found

    def undo(self) -> List[Tuple[str, Any]]:
        """Take tensors of the trace out again; what they were found in, and how it is called."""
        found: List[Tuple[str, Any]] = []
        for place, holder, before in self._held:
            if isinstance(holder, dict):
                new = [k for k, v in holder.items() if before.get(k, before) is not v]
                for key in (key for key in new if _holds_lazy(holder[key])):
                    if key in before:
                        holder[key] = before[key]
                    else:
                        del holder[key]
                    found.append((place, holder))
            elif any(map(_holds_lazy, _new_entries(holder, before))):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(before)
                found.append((place, holder))
        return found


def _new_entries(holder: Any, before: Any) -> List[Any]:
    """What a list, set or deque holds that it did not hold, or not there."""
    if isinstance(holder, set):
        known = set(map(id, before))
        return [each for each in holder if id(each) not in known]
    pairs = itertools.zip_longest(holder, before)
    return [each for each, old in pairs if each is not old]


def _attributes(value: Any) -> Optional[Dict[str, Any]]:
    """The attributes of an object, where it has some."""
    own = getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else None


def _is_users(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _PACKAGES


def _free_values(task: TaskModule) -> Iterator[Tuple[str, Any]]:
    """(name, value) of the containers and objects that the task's functions read from outside."""
    for function in _functions(task):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # an empty cell
                yield name, cell.cell_contents
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]


def _functions(task: TaskModule) -> Iterator[types.FunctionType]:
    """The user's own functions on the task and on its modules."""
    for module in task.modules():
        for value in vars(module).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield function
    for cls in {kind: None for module in task.modules() for kind in type(module).__mro__}:
        if _is_users(cls):
            yield from (each for each in vars(cls).values() if inspect.isfunction(each))
