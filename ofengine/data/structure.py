"""What a batch is made of: tensors in containers; moved, measured, taken apart, described."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import numpy as np
import oneflow as flow

from ofengine.errors import DataError


def describe(value: Any) -> str:
    """``value`` in an error: "None", "the class X" or "a X"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


def describe_returned(value: Any) -> str:
    """As :func:`describe`, of what a user's method returned: None is "nothing"."""
    return "nothing" if value is None else describe(value)


def copied(value: Any) -> Any:
    """``value`` of now: a copy of all that may be changed in place, in containers of its kinds.

    What can have no copy is itself; so is what holds itself, which no checkpoint can keep either.
    """
    try:
        return _copied(value)
    except RecursionError:
        return value


def _copied(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, flow.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        made = copy.copy(value) if isinstance(value, dict) else {}
        made.update((key, _copied(each)) for key, each in value.items())
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def to_device(batch: Any, device: flow.device) -> Any:
    """``batch`` with every tensor in it, however nested, on ``device``."""
    if isinstance(batch, flow.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        moved = copy.copy(batch)  # a defaultdict keeps its factory
        moved.update((key, to_device(value, device)) for key, value in batch.items())
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batch_size_of(batch: Any) -> int:
    """The first dimension of the first tensor in ``batch`` that has one; 1 where none has."""
    return _first_dimension(batch) or 1


def _first_dimension(batch: Any) -> int:
    if isinstance(batch, flow.Tensor):
        return int(batch.shape[0]) if batch.ndim else 0
    if isinstance(batch, dict):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return 0
    return next((size for size in map(_first_dimension, batch) if size), 0)


_SHAPE = operator.attrgetter("shape")
KIND = operator.attrgetter("shape", "dtype")
"""``KIND(tensor)`` is what the graphs for a batch depend on: (shape, dtype)."""


def shapes_of(batch: Any) -> Any:
    """The shapes of the tensors and arrays in ``batch``, nested. Asked at each step, so quick."""
    if type(batch) is tuple or type(batch) is list:
        try:
            return [*map(_SHAPE, batch)]
        except AttributeError:
            pass
    if isinstance(batch, (list, tuple)):
        return [shapes_of(each) for each in batch]
    if isinstance(batch, dict):
        return [shapes_of(each) for each in batch.values()]
    return batch.shape if isinstance(batch, (flow.Tensor, np.ndarray)) else None


def is_empty(batch: Any) -> bool:
    """True where all tensors and arrays in ``batch`` are empty, and there are some."""
    shapes = [shape for _, shape, _ in leaves(batch) if shape]
    return bool(shapes) and all(0 in shape for shape in shapes)


def size_of(batch: Any) -> int:
    """How many numbers the tensors and arrays in ``batch`` hold."""
    return sum(math.prod(shape) for _, shape, _ in leaves(batch))


def describe_shapes(batch: Any) -> str:
    """The tensors and arrays in ``batch`` as "[8, 3, 32, 32] float32, [8] int64"."""
    texts = [f"{name} {list(shape)} {dtype}".lstrip() for name, shape, dtype in leaves(batch)]
    some = ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if texts[8:] else "")
    return some or describe(batch)


def leaves(batch: Any, name: str = "") -> Iterator[Tuple[str, Tuple[int, ...], str]]:
    """(name in a dict, shape, dtype) of the tensors and arrays in ``batch``."""
    if isinstance(batch, (flow.Tensor, np.ndarray)):
        yield name, tuple(batch.shape), str(batch.dtype).replace("oneflow.", "")
    elif isinstance(batch, dict):
        for key, value in batch.items():
            yield from leaves(value, str(key))
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from leaves(value, name)


class Structure(NamedTuple):
    """How the tensors of a batch are nested; two batches of one structure share a graph."""

    kind: Any
    """A container's type, ``flow.Tensor`` for a leaf, float or None for a constant."""
    keys: Tuple[Any, ...]
    children: Tuple[Any, ...]


_LEAF = Structure(flow.Tensor, (), ())
_ONLY_TENSORS = {flow.Tensor}
_FLAT: Dict[Tuple[type, int], Structure] = {}
"""The structures of most batches, tuples and lists of so many tensors; made at every step."""


def flatten(batch: Any, tensors: List[Any], what: str = "a batch holds") -> Structure:
    """Append the tensors in ``batch`` to ``tensors``, depth first; return their structure."""
    kind = type(batch)
    if (kind is tuple or kind is list) and {*map(type, batch)} == _ONLY_TENSORS:
        tensors += batch
        flat = _FLAT.get((kind, len(batch)))
        if flat is None:
            flat = _FLAT[(kind, len(batch))] = Structure(kind, (), (_LEAF,) * len(batch))
        return flat
    if isinstance(batch, flow.Tensor):
        tensors.append(batch)
        return _LEAF
    if isinstance(batch, dict):
        children = tuple(flatten(value, tensors, what) for value in batch.values())
        return Structure(type(batch), tuple(batch), children)
    if isinstance(batch, (list, tuple)):
        return Structure(type(batch), (), tuple(flatten(value, tensors, what) for value in batch))
    if type(batch) is float:  # 0.0 == -0.0, but they trace differently
        return Structure(float, (batch.hex(),), ())
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return Structure(None, (batch, type(batch)), ())  # 1 == True, but they trace differently
    if isinstance(batch, (np.ndarray, np.generic)):
        raise DataError(
            f"{what} a numpy array, which a static graph cannot take: turn it into a tensor "
            "with oneflow.from_numpy in the dataset or in collate_fn."
        )
    raise DataError(
        f"{what} {describe(batch)}, which a static graph cannot take: use tensors, "
        "numbers, strings and None in tuples, lists and dicts."
    )


def unflatten(structure: Structure, tensors: Iterator[Any]) -> Any:
    """The inverse of :func:`flatten`."""
    kind, keys, children = structure
    if kind is flow.Tensor:
        return next(tensors)
    if kind is None:
        return keys[0]
    if kind is float:
        return float.fromhex(keys[0])
    values = [unflatten(child, tensors) for child in children]
    if issubclass(kind, dict):
        filled = kind()
        filled.update(zip(keys, values))
        return filled
    if hasattr(kind, "_fields"):
        return kind(*values)
    return kind(values)
