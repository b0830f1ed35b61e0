"""Hyper-parameters: kept in a checkpoint exactly, as data, and made again from it.

In a file None, booleans, numbers and texts are themselves, and a list is a list. Anything else is a
dict with one key, which says what it is, so that it comes back as that: ``{"tuple": [1, 2]}``,
``{"dict": [[key, value], ...]}``, ``{"numpy": ["float32", 0.5]}``, ``{"path": "data/x"}``. What
cannot be kept is named: ``{"left out": "the function f", "is default": False}``.

An object of an attrs class or a dataclass, and a member of an Enum, is kept with the name of its
class and its attributes. :mod:`.hparams_restored` makes the values again.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.checkpoint.header import MOST_DIGITS

_LEVELS = 20
"""How deep values are nested at most; each level is up to four of the file's."""
_PLAIN = (type(None), bool, float, str)
NUMBERS: Dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
        np.float16, np.float32, np.float64, np.complex64, np.complex128,
    )
}  # fmt: skip
MORE_THAN_FIELDS = (
    dict, list, tuple, set, frozenset, str, bytes, int, float, complex, BaseException, type,
    np.ndarray, flow.Tensor, nn.Module,
)  # fmt: skip
"""An object of a class that is one of these, too, holds more than its attributes."""


class HyperParameters(Dict[str, Any]):
    """What ``save_hyperparameters`` was told: a dict whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        """As ``self[name]``."""
        try:
            return self[name]
        except KeyError:
            known = ", ".join(map(repr, self)) or "none: call save_hyperparameters() in __init__"
        raise AttributeError(f"there is no hyper-parameter {name!r}; there are {known}")

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``self[name] = value``."""
        self[name] = value

    def __delattr__(self, name: str) -> None:
        """As ``del self[name]``."""
        if name not in self:
            raise AttributeError(f"there is no hyper-parameter {name!r}")
        del self[name]


class Left(Exception):
    """A value cannot be kept, or not be made again; the message says what it is."""


def own_copy(value: Any) -> Any:
    """A copy of a value that can be kept, so that what is kept stays as it is; else the value."""
    try:
        encode(value)
    except Left:
        return value
    return copy.deepcopy(value)


# ---------------------------------------------------------------------- into a file


def kept_hparams(hparams: Mapping[str, Any], defaults: Mapping[str, Any]) -> Dict[str, Any]:
    """``hparams`` as a checkpoint keeps them, see the module.

    ``defaults``: those of the task's ``__init__``, by name. That a value is one of these is noted
    where it cannot be kept: the code has it anyway.
    """
    kept: Dict[str, Any] = {}
    for name, value in hparams.items():
        try:
            kept[name] = encode(value)
        except Left as what:
            is_default = name in defaults and defaults[name] is value
            kept[name] = {"left out": str(what), "is default": is_default}
    return kept


def encode(value: Any, levels: int = _LEVELS) -> Any:
    kind = type(value)
    if kind in _PLAIN or (kind is int and value.bit_length() <= 3 * MOST_DIGITS):
        return value
    if levels == 0:
        raise Left(f"a {kind.__name__} nested deeper than {_LEVELS} levels")

    def inner(each: Any) -> Any:
        return encode(each, levels - 1)

    if kind is list:
        return [inner(each) for each in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [inner(each) for each in value]}
    if kind is dict:
        return {"dict": [[inner(key), inner(each)] for key, each in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is type(Path()):
        return {"path": str(value)}
    if NUMBERS.get(kind.__name__) is kind:
        return {"numpy": [kind.__name__, inner(value.item())]}
    is_array = kind is np.ndarray and value.dtype.isnative and value.dtype.itemsize <= 8
    if is_array and value.dtype.kind in "biuf":
        return {"array": value}
    if kind is flow.Tensor and not value.requires_grad and value.is_local:
        return {"tensor": value}
    if isinstance(value, enum.Enum) and kind.__members__.get(value.name) is value:
        return {"member": [kind.__qualname__, value.name]}
    if fields_of(kind) is not None and not isinstance(value, MORE_THAN_FIELDS):
        attributes = {name: inner(each) for name, each in _attributes(value).items()}
        return {"object": [kind.__qualname__, attributes]}
    raise Left(_in_words(value))


def _in_words(value: Any) -> str:
    for kind, word in ((type, "class"), (types.FunctionType, "function")):
        if isinstance(value, kind):
            return f"the {word} {value.__module__}.{value.__qualname__}"
    kind = type(value)
    return (
        f"a {kind.__name__}"
        if kind.__module__ == "builtins"
        else f"a {kind.__module__}." + (kind.__qualname__)
    )


def fields_of(kind: type) -> Optional[Dict[str, bool]]:
    """The fields of an attrs class or dataclass, and whether its ``__init__`` takes them."""
    if attrs.has(kind):
        return {field.name: field.init for field in attrs.fields(kind)}
    if dataclasses.is_dataclass(kind):
        return {field.name: field.init for field in dataclasses.fields(kind)}
    return None


def _attributes(value: Any) -> Dict[str, Any]:
    """All that is kept in ``value``, in its ``__dict__`` and in slots."""
    slots: List[str] = []
    for each in type(value).__mro__:
        names = vars(each).get("__slots__", ())
        hidden = f"_{each.__name__.lstrip('_')}"
        for name in [names] if isinstance(names, str) else names:
            is_hidden = name.startswith("__") and not name.endswith("__")
            slots.append(hidden + name if is_hidden else name)
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found = {**found, **getattr(value, "__dict__", {})}
    return {name: each for name, each in found.items() if name not in ("__weakref__", "__dict__")}


# ---------------------------------------------------------------------- for people


def described(value: Any) -> str:
    """What a checkpoint keeps of a hyper-parameter, in words for people; nothing is made of it."""
    if isinstance(value, list):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    if not isinstance(value, dict) or not value:
        return repr(value)
    if "left out" in value:
        return f"({value['left out']}, not kept)"
    ((mark, inside),) = list(value.items())[:1]
    if mark == "dict" and isinstance(inside, list):
        pairs = [each for each in inside if isinstance(each, list) and len(each) == 2]
        return "{" + ", ".join(f"{described(k)}: {described(v)}" for k, v in pairs) + "}"
    if mark in ("object", "member", "numpy") and isinstance(inside, list) and len(inside) == 2:
        name, of = inside
        if mark == "object" and isinstance(of, dict):
            return f"{name}({', '.join(f'{k}={described(v)}' for k, v in of.items())})"
        return f"{name}.{of}" if mark == "member" else f"{name}({described(of)})"
    if mark == "tuple" and isinstance(inside, list):
        return f"({', '.join(map(described, inside))}{',' * (len(inside) == 1)})"
    return f"{mark}({described(inside)})"
