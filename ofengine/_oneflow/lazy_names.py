"""OneFlow's table of the names that tensors have in the graph being traced.

An operator in place gives its tensor another name: what is read of it afterwards is the result.

The table is emptied where a graph is compiled. Where a trace ends otherwise, by an error or because
it was only a look, a tensor that is no parameter keeps its name in a graph that is gone, and the
next trace that reads it ends the process ("'blob_desc' Must be non NULL").
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Optional

import attrs

from ofengine._oneflow.library import liboneflow

_TABLE = "7oneflow3one15TensorNameScope"
_TENSOR_AT = 2 * ctypes.sizeof(ctypes.c_void_p)
"""Where a tensor of Python keeps that of C++: behind the reference count and the type."""


@attrs.frozen
class _Functions:
    table: Any
    clear: Any
    lookup: Any
    record: Any


@functools.lru_cache(maxsize=None)
def _functions() -> Optional[_Functions]:
    try:
        library = ctypes.CDLL(liboneflow())
        found = _Functions(
            getattr(library, f"_ZN{_TABLE}6GlobalEv"),
            getattr(library, f"_ZN{_TABLE}5ClearEv"),
            getattr(library, f"_ZNK{_TABLE}6LookupEPKNS0_6TensorE"),
            getattr(library, f"_ZN{_TABLE}6RecordEPKNS0_6TensorERKSs"),
        )
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    found.table.restype, found.table.argtypes = pointer, []
    found.clear.restype, found.clear.argtypes = None, [pointer]
    # A std::string is a pointer to its characters here (the ABI before C++11).
    found.lookup.restype = ctypes.POINTER(ctypes.c_char_p)
    found.lookup.argtypes = [pointer, pointer]
    found.record.restype, found.record.argtypes = None, [pointer, pointer, found.lookup.restype]
    return found


def forget_lazy_names() -> None:
    """Empty the table. To be called before a trace; does nothing where it is not found."""
    found = _functions()
    if found is not None:
        found.clear(found.table())


def name_of(tensor: Any) -> str:
    """The name of a tensor in the graph being traced; "" where it was not read there yet."""
    found = _functions()
    if found is None:
        return ""
    text: bytes = found.lookup(found.table(), _pointer(tensor))[0]
    return text.decode()


def rename(tensor: Any, like: Any) -> None:
    """Let ``tensor`` be what ``like``, a tensor of the same trace, is now."""
    found = _functions()
    if found is not None:
        name = found.lookup(found.table(), _pointer(like))
        found.record(found.table(), _pointer(tensor), name)


def _pointer(tensor: Any) -> int:
    return int(ctypes.c_void_p.from_address(id(tensor) + _TENSOR_AT).value or 0)
