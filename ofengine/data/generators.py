"""The random generators of a run: where they are, and how all of them are put back there.

Found are those that a dataloader, a callback or a module of the task holds: as attributes of
their own, of their classes and of what they hold in turn, in lists and dicts, in the closures of
functions, and as global names of the user's own modules.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import types
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer
from oneflow.utils.data import DataLoader

from ofengine.data.combined import CombinedLoader, each_loader
from ofengine.data.generator_state import (
    RandomState,
    check_state_anywhere,
    check_state_of,
    is_generator,
    numpy_state,
    numpy_tuple,
    same_state,
    set_state_of,
    state_of,
)
from ofengine.data.structure import copied
from ofengine.errors import CheckpointError, said_by

__all__ = [
    "RandomState",
    "check_global_states",
    "check_state_anywhere",
    "check_states_in",
    "data_parts",
    "find_generators",
    "global_states",
    "has_state",
    "is_generator",
    "same_state",
    "set_global_states",
    "set_state_of",
    "set_states_in",
    "state_of",
    "states_in",
]

_DEPTH = 4
"""How far down attributes are looked at: sampler, dataset, transforms, ..."""
_MOST_CHILDREN = 100
"""So many entries of a list or dict are looked at."""
_PASSED_BY = (
    flow.Tensor, np.ndarray, Optimizer, type, types.ModuleType, str, bytes, int, float,
)  # fmt: skip
_OF_THE_RUN = ("ofengine.run", "ofengine.trainer", "ofengine.metrics", "ofengine.rates")
"""A callback or task may hold the trainer, which leads to everything."""
_CALLED = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_OF_MODULES = ("_parameters", "_buffers", "_modules")
_PYTHONS: Any = getattr(random, "_inst", None)
_NUMPYS: Any = np.random.mtrand._rand


# ---------------------------------------------------------------------- all of a run


def global_states() -> RandomState:
    """The states of Python's, numpy's and OneFlow's global generators."""
    python = random.getstate()
    return {
        "python": {"words": np.array(python[1], dtype=np.uint32), "gauss": python[2]},
        "numpy": numpy_state(np.random.get_state()),
        "oneflow": state_of(flow.default_generator),
    }


def set_global_states(states: RandomState) -> None:
    """Put the global generators where ``states`` says."""
    python = states["python"]
    words = tuple(int(word) for word in python["words"])
    random.setstate((3, words, python["gauss"]))
    np.random.set_state(numpy_tuple(states["numpy"]))
    set_state_of(flow.default_generator, states["oneflow"])


def check_global_states(states: RandomState) -> None:
    """Raise :class:`CheckpointError` where :func:`set_global_states` could not; set nothing."""
    wanted = {"python", "numpy", "oneflow"}
    if set(states) != wanted:
        raise CheckpointError(f"the states of global generators are not {sorted(wanted)}.")
    check_state_of(random.Random(0), states["python"])
    check_state_of(np.random.RandomState(0), {"numpy": states["numpy"]})
    check_state_of(flow.default_generator, states["oneflow"])


def states_in(task: Optional[nn.Module], source: Any, callback: Any = None) -> RandomState:
    """The states of all generators that are held by these, by place.

    Samplers, datasets and sources that have ``state_dict`` and ``load_state_dict`` count too.

    Args:
        task: whose modules are looked at; None for none.
        source: a dataloader.
        callback: a callback.
    """
    return {place: _state_of(each) for place, each in find_generators(task, source, callback)}


def set_states_in(
    task: Optional[nn.Module], source: Any, states: RandomState, callback: Any = None
) -> List[str]:
    """Put these generators where ``states`` says; return the places that are not there now."""
    found = dict(_all_places(task, source, callback))
    for place, state in states.items():
        if place in found:
            _set_state_of(found[place], state)
    return [place for place in states if place not in found]


def check_states_in(
    task: Optional[nn.Module], source: Any, states: RandomState, callback: Any = None
) -> None:
    """Raise :class:`CheckpointError` where :func:`set_states_in` could not; set nothing."""
    found = dict(_all_places(task, source, callback))
    for place, state in states.items():
        if place in found:
            try:
                _check_state_of(found[place], state)
            except CheckpointError as error:
                raise CheckpointError(f"{place}: {error}") from error


def find_generators(
    task: Optional[nn.Module], source: Any, callback: Any = None
) -> Iterator[Tuple[str, Any]]:
    """(place, generator) for each generator that is held, once, global ones left out."""
    seen: Set[int] = set()
    for place, each in _all_places(task, source, callback):
        if id(each) not in seen:
            seen.add(id(each))
            yield place, each


# ---------------------------------------------------------------------- those with a state_dict


def data_parts(source: Any) -> Iterator[Tuple[str, Any]]:
    """(place, object) of the samplers and the dataset of a DataLoader, or of any other source."""
    if isinstance(source, CombinedLoader):
        for name, loader in zip(source.names, source.loaders):
            yield from ((f"{name}.{place}", part) for place, part in data_parts(loader))
        return
    if not isinstance(source, DataLoader):
        if hasattr(source, "__dict__"):
            yield "source", source
        return
    parts = [("dataset", source.dataset)]
    for name in ("batch_sampler", "sampler"):
        place, each = name, getattr(source, name)
        while each is not None and len(parts) < _MOST_CHILDREN:  # samplers within samplers
            parts.append((place, each))
            place, each = f"{place}.sampler", getattr(each, "sampler", None)
    known: Set[int] = set()
    for place, part in parts:
        if id(part) not in known and hasattr(part, "__dict__"):
            known.add(id(part))
            yield place, part


def has_state(part: Any) -> bool:
    """True for a part of the data that can say where it stands, and be put there."""
    methods = (getattr(part, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(part, nn.Module) and all(map(callable, methods))


# Copies go out and in: what such a part says, and is given, may be what it changes as it goes on.


def _state_of(each: Any) -> RandomState:
    return state_of(each) if is_generator(each) else {"state": copied(each.state_dict())}


def _set_state_of(each: Any, state: RandomState) -> None:
    if is_generator(each):
        set_state_of(each, state)
    else:
        each.load_state_dict(copied(state["state"]))


def _check_state_of(each: Any, state: RandomState) -> None:
    if is_generator(each):
        check_state_of(each, state)
        return
    own = _state_of(each)
    try:
        _set_state_of(each, state)
    except Exception as error:
        raise CheckpointError(
            f"{type(each).__name__}.load_state_dict raised {said_by(error)}."
        ) from error
    finally:
        _set_state_of(each, own)


# ---------------------------------------------------------------------- where they are


def _all_places(task: Optional[nn.Module], source: Any, callback: Any) -> Iterator[Tuple[str, Any]]:
    """(place, generator), a generator at two places twice."""
    walk = _Walk()
    for name, module in task.named_modules() if task is not None else ():
        yield from walk.module(f"task.{name}" if name else "task", module)
    for name, loader in each_loader(source):
        yield from walk.value(f"data{name}", loader, _DEPTH)
    for name, part in data_parts(source):
        if has_state(part):
            yield f"data.{name}", part
    yield from walk.value("callback", callback, _DEPTH)


class _Walk:
    """One walk through objects, each of which is gone into once."""

    def __init__(self) -> None:
        self._seen: Set[int] = set()
        self._classes: Set[type] = set()
        self._globals = {id(flow.default_generator), id(_PYTHONS), id(_NUMPYS)}

    def module(self, place: str, module: nn.Module) -> Iterator[Tuple[str, Any]]:
        """A module of the task, without those inside it, which come by themselves."""
        self._seen.add(id(module))
        for name, value in list(vars(module).items()):
            if name not in _OF_MODULES and not isinstance(value, nn.Module):
                yield from self.value(f"{place}.{name}", value, _DEPTH - 1)
        yield from self._class(type(module))

    def value(self, place: str, value: Any, depth: int) -> Iterator[Tuple[str, Any]]:
        """Whatever is held at ``place``."""
        if is_generator(value):
            if id(value) not in self._globals:
                yield place, value
            return
        if isinstance(value, _PASSED_BY) or value is None or id(value) in self._seen:
            return
        if type(value).__module__.startswith(_OF_THE_RUN):
            return
        self._seen.add(id(value))
        for name, child in _inside(value):
            if depth or is_generator(child):
                yield from self.value(f"{place}{name}", child, depth - 1)
        if not isinstance(value, _CALLED):
            yield from self._class(type(value))

    def _class(self, cls: type) -> Iterator[Tuple[str, Any]]:
        """Those that a user's class and its module hold."""
        for each in cls.__mro__:
            if each in self._classes or _is_library(each.__module__):
                continue
            self._classes.add(each)
            module = sys.modules.get(each.__module__)
            yield from self._held(each.__qualname__, vars(each))
            yield from self._held(_name_of(module), vars(module) if module else {})

    def _held(self, place: str, names: Mapping[str, Any]) -> Iterator[Tuple[str, Any]]:
        for name, value in list(names.items()):
            if is_generator(value) and id(value) not in self._globals:
                yield f"{place}.{name}", value


def _inside(value: Any) -> Iterator[Tuple[str, Any]]:
    """What ``value`` holds, with how its place goes on."""
    if isinstance(value, (list, tuple)):
        for index, each in zip(range(_MOST_CHILDREN), value):
            yield f"[{index}]", each
    elif isinstance(value, Mapping):
        for (key, each), _ in zip(list(value.items()), range(_MOST_CHILDREN)):
            yield f"[{key!r}]", each
    elif isinstance(value, functools.partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _inside_function(value)
    else:
        slots: Iterable[str] = getattr(type(value), "__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        held: Dict[str, Any] = {n: getattr(value, n) for n in names if hasattr(value, n)}
        held.update(getattr(value, "__dict__", {}))
        for name, child in held.items():
            yield f".{name}", child


def _inside_function(function: types.FunctionType) -> Iterator[Tuple[str, Any]]:
    """What a user's function has in its closure, its defaults, and among the names it uses."""
    if _is_library(function.__module__):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for index, default in enumerate(function.__defaults__ or ()):
        yield f".default[{index}]", default
    for name in code.co_names:
        value = function.__globals__.get(name)
        if is_generator(value):
            yield f".{name}", value


@functools.lru_cache(maxsize=None)
def _is_library(module: Optional[str]) -> bool:
    """True for the modules of Python, of installed packages, and of the engine."""
    top = (module or "builtins").partition(".")[0]
    if top in ("builtins", "ofengine", "oneflow"):
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    folders = {os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(np.__file__))}
    in_python = any(file.startswith(folder + os.sep) for folder in folders)
    return in_python or "site-packages" in file.split(os.sep)


def _name_of(module: Any) -> str:
    """The name of a module, which is the same where it is run as a script."""
    file = getattr(module, "__file__", None)
    return os.path.splitext(os.path.basename(file))[0] if file else "__main__"
