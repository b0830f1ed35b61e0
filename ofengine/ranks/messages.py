"""Plain values as bytes, for what ranks tell each other: nothing in them is ever executed."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import oneflow as flow

from ofengine.errors import RankError

_ARRAY, _TENSOR, _TUPLE, _DICT = "__array__", "__tensor__", "__tuple__", "__dict__"

_KINDS = "biufcSU"
"""Arrays of booleans, numbers and texts, as numpy calls them."""


def encode(value: Any) -> bytes:
    """None, booleans, numbers, texts, arrays, and lists and dicts (with texts as keys) of these."""
    return json.dumps(value, default=_as_text).encode()


def decode(message: bytes) -> Any:
    """What :func:`encode` was given; a tuple comes back as a list. Floats keep all their bits."""
    return json.loads(message.decode(), object_hook=_from_text)


def _as_text(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        kept = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: kept, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain")


def _from_text(value: Any) -> Any:
    if _ARRAY not in value:
        return value
    raw = base64.b64decode(value[_ARRAY])
    return np.frombuffer(raw, np.dtype(value["dtype"])).reshape(value["shape"]).copy()


def pack(value: Any) -> Any:
    """A tensor, or what else a step returns, as a plain value that :func:`encode` takes.

    Raises :class:`RankError` for what is neither a tensor, an array, a number, a text or None, nor
    a list, tuple or dict of these.
    """
    kind = type(value)
    if kind in (type(None), bool, int, float, str):
        return value
    if kind is list:
        return [pack(each) for each in value]
    if kind is tuple:
        return {_TUPLE: [pack(each) for each in value]}
    if kind is dict:
        return {_DICT: [[pack(key), pack(each)] for key, each in value.items()]}
    if isinstance(value, flow.Tensor):
        return {_TENSOR: value.numpy()}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _KINDS:
        return value
    raise RankError(
        f"several ranks exchange tensors, arrays, numbers, texts, and lists, tuples and dicts of "
        f"these, and this is a {kind.__name__}: return one of those."
    )


def unpack(value: Any, device: flow.device) -> Any:
    """What :func:`pack` was given, with tensors on ``device``."""
    if isinstance(value, list):
        return [unpack(each, device) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return flow.tensor(value[_TENSOR], device=device)
    if _TUPLE in value:
        return tuple(unpack(each, device) for each in value[_TUPLE])
    return {unpack(key, device): unpack(each, device) for key, each in value[_DICT]}
