"""Hyper-parameters made again from what a checkpoint keeps of them, see :mod:`.hparams`.

Nothing in a file is imported or called. The class of an object is looked for by its name among the
classes that the task's own code has: those in the module that the task's class is written in, and
in the annotations and defaults of its ``__init__``. Attributes are put into a new object as they
were; no ``__init__`` runs.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterator, List, Mapping, Set

import numpy as np
import oneflow as flow

from ofengine.checkpoint.header import shown
from ofengine.checkpoint.hparams import MORE_THAN_FIELDS, NUMBERS, Left, encode, fields_of
from ofengine.errors import CheckpointError


def restored_hparams(
    kept: Mapping[str, Any], task_class: type, given: Container[str], where: str
) -> Dict[str, Any]:
    """The arguments of ``task_class`` that a checkpoint keeps, those that are ``given`` left out.

    ``where``: what an error calls the file. Raises :class:`CheckpointError` that names the argument
    whose value the file does not hold, or cannot be made of it.
    """
    known, defaults = _known_classes(task_class), defaults_of(task_class)
    arguments: Dict[str, Any] = {}
    for name, value in kept.items():
        if name in given:
            continue
        if _is_default(value, name, defaults):
            continue
        call = f"{task_class.__name__}.load_from_checkpoint(path, {shown(name)}=...)"
        if not takes(task_class, name):
            raise CheckpointError(
                f"{where} was saved with the hyper-parameter {shown(name)!r}, which "
                f"{task_class.__name__}.__init__ does not take: use the class that it was saved "
                "with, or make the task yourself and call ofengine.load_weights(task, path)."
            )
        try:
            arguments[name] = _decode(value, known)
        except Left as what:
            raise CheckpointError(
                f"{where} does not hold the hyper-parameter {shown(name)!r}: {what}. Give it, as "
                f"in {call}."
            ) from None
    return arguments


def _is_default(value: Any, name: str, defaults: Mapping[str, Any]) -> bool:
    """True where what was left out is what the code has anyway."""
    if not isinstance(value, dict) or value.get("is default") is not True or name not in defaults:
        return False
    try:
        encode(defaults[name])
    except Left as what:
        return bool(value.get("left out") == str(what))
    return False


def _decode(value: Any, known: Mapping[str, List[type]]) -> Any:
    if isinstance(value, list):
        return [_decode(each, known) for each in value]
    if not isinstance(value, dict):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise _damaged()
    if "left out" in value:
        raise Left(f"it was {shown(str(value['left out']))}, which no checkpoint can keep")
    if len(value) != 1:
        raise _damaged()
    ((mark, inside),) = value.items()
    make = _MAKERS.get(mark)
    if make is None:
        raise _damaged()
    try:
        return make(inside, known)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError, RecursionError):
        raise _damaged() from None


def _damaged() -> Left:
    return Left("what is there of it is damaged")


def _make_complex(inside: Any, known: Mapping[str, List[type]]) -> complex:
    real, imaginary = map(float, inside)
    return complex(real, imaginary)


def _make_number(inside: Any, known: Mapping[str, List[type]]) -> Any:
    name, number = inside
    made = NUMBERS[name](_decode(number, known))
    if made.shape != ():
        raise _damaged()
    return made


def _make_array(inside: Any, known: Mapping[str, List[type]]) -> np.ndarray:
    if not isinstance(inside, np.ndarray):
        raise _damaged()
    return inside.copy()


def _make_member(inside: Any, known: Mapping[str, List[type]]) -> Any:
    name, member = inside
    kind = _class_of(name, known, lambda each: issubclass(each, enum.Enum))
    if member not in kind.__members__:
        raise Left(f"it was {shown(str(member))}, which {shown(name)} has not")
    return kind.__members__[member]


def _make_object(inside: Any, known: Mapping[str, List[type]]) -> Any:
    name, attributes = inside
    kind = _class_of(name, known, lambda each: fields_of(each) is not None)
    if issubclass(kind, MORE_THAN_FIELDS):
        raise _damaged()
    fields = fields_of(kind) or {}
    now = {field for field, in_init in fields.items() if in_init}
    if not now <= set(attributes):
        lacking = ", ".join(sorted(now - set(attributes)))
        raise Left(f"it was a {name} without {lacking}, which the class has now")
    made = object.__new__(kind)
    for attribute, each in attributes.items():
        if attribute not in fields and hasattr(kind, attribute):
            raise Left(f"it was a {name} with another {shown(attribute)}")
        object.__setattr__(made, attribute, _decode(each, known))
    return made


def _class_of(name: Any, known: Mapping[str, List[type]], fits: Callable[[type], bool]) -> Any:
    if not isinstance(name, str):
        raise _damaged()
    found = [each for each in known.get(name, []) if fits(each)]
    if len(found) != 1:
        raise Left(
            f"it was a {shown(name)}, and {'several classes have' if found else 'no class has'} "
            "that name in the module of the task's class"
        )
    return found[0]


_MAKERS: Dict[Any, Callable[[Any, Mapping[str, List[type]]], Any]] = {
    "tuple": lambda inside, known: tuple(_items(inside, known)),
    "set": lambda inside, known: set(_items(inside, known)),
    "frozenset": lambda inside, known: frozenset(_items(inside, known)),
    "dict": lambda inside, known: {_decode(k, known): _decode(v, known) for k, v in inside},
    "complex": _make_complex,
    "bytes": lambda inside, known: bytes.fromhex(inside),
    "path": lambda inside, known: Path(inside),
    "numpy": _make_number,
    "array": _make_array,
    "tensor": lambda inside, known: flow.tensor(_make_array(inside, known)),
    "member": _make_member,
    "object": _make_object,
}


def _items(inside: Any, known: Mapping[str, List[type]]) -> List[Any]:
    if not isinstance(inside, list):
        raise _damaged()
    return [_decode(each, known) for each in inside]


# ---------------------------------------------------------------------- what the code has


def _inits(task_class: type) -> Iterator[types.FunctionType]:
    """The ``__init__`` of the class and those of its bases, the engine's and OneFlow's left out."""
    for each in task_class.__mro__:
        init = vars(each).get("__init__")
        package = each.__module__.partition(".")[0]
        if isinstance(init, types.FunctionType) and package not in ("ofengine", "oneflow"):
            yield init


def defaults_of(task_class: type) -> Dict[str, Any]:
    """The defaults of a task's ``__init__``, and of those of its bases, by name."""
    found: Dict[str, Any] = {}
    for init in _inits(task_class):
        for name, parameter in inspect.signature(init).parameters.items():
            if parameter.default is not parameter.empty:
                found.setdefault(name, parameter.default)
    return found


def takes(task_class: type, name: str) -> bool:
    """True where the ``__init__`` of a task takes an argument called ``name``, or of any name."""
    parameters = inspect.signature(task_class.__init__).parameters  # type: ignore[misc]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return True
    return name in list(parameters)[1:] and parameters[name].kind in kinds


def takes_by_name(task_class: type, name: str) -> bool:
    """True where it, or the ``__init__`` of a base, says that it has an argument of that name."""
    return any(name in inspect.signature(init).parameters for init in _inits(task_class))


def _known_classes(task_class: type) -> Dict[str, List[type]]:
    """The classes that a file may name, by their name: those that the task's own code has."""
    waiting: List[Any] = []
    for each in task_class.__mro__:
        if each.__module__.partition(".")[0] not in ("ofengine", "oneflow", "builtins"):
            waiting += _names_around(each).values()
    for init in _inits(task_class):
        around = _closure_of(init)
        waiting += around.values()
        waiting += _annotated(init.__annotations__, {**init.__globals__, **around})
    waiting += map(type, defaults_of(task_class).values())
    known: Dict[str, List[type]] = {}
    seen: Set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        waiting += typing.get_args(each)
        if isinstance(each, type) and (issubclass(each, enum.Enum) or fields_of(each) is not None):
            known.setdefault(each.__qualname__, []).append(each)
            waiting += _annotated(getattr(each, "__annotations__", {}), _names_around(each))
    return known


def _names_around(kind: type) -> Dict[str, Any]:
    """The names in the module that a class is written in."""
    module = sys.modules.get(kind.__module__)
    return {} if module is None else vars(module)


def _closure_of(function: types.FunctionType) -> Dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # nothing is in it yet
            found[name] = cell.cell_contents
    return found


def _annotated(annotations: Mapping[str, Any], names: Dict[str, Any]) -> Iterator[Any]:
    """What annotations stand for; those that cannot be told are left out."""
    for name, annotation in dict(annotations).items():
        holder = type("_", (), {"__annotations__": {name: annotation}})
        try:
            yield from typing.get_type_hints(holder, names).values()
        except Exception:  # a name for type checkers only, or syntax of a later Python
            continue
