"""OneFlow's table of the names that tensors have in the graph being traced.

It is emptied where a graph is compiled. Where a trace ends otherwise, by an error or because it was
only a look, a tensor that is no parameter keeps its name in a graph that is gone, and the next
trace that reads it ends the process ("'blob_desc' Must be non NULL").
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
from typing import Callable, Optional

import oneflow as flow

_TABLE = "_ZN7oneflow3one15TensorNameScope"


@functools.lru_cache(maxsize=None)
def _clear() -> Optional[Callable[[], None]]:
    folder = os.path.join(os.path.dirname(flow.__file__), os.pardir, "oneflow.libs")
    paths = glob.glob(os.path.join(glob.escape(folder), "liboneflow-*.so"))
    if len(paths) != 1:
        return None
    try:
        library = ctypes.CDLL(paths[0])
        table, clear = getattr(library, f"{_TABLE}6GlobalEv"), getattr(library, f"{_TABLE}5ClearEv")
    except (OSError, AttributeError):
        return None
    table.restype, table.argtypes = ctypes.c_void_p, []
    clear.restype, clear.argtypes = None, [ctypes.c_void_p]
    return lambda: clear(table())


def forget_lazy_names() -> None:
    """Empty the table. To be called before a trace; does nothing where it is not found."""
    clear = _clear()
    if clear is not None:
        clear()
