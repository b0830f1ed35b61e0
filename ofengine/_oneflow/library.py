"""Where OneFlow's compiled core is, on disk and in memory."""

from __future__ import annotations

import ctypes
import glob
import os
from typing import Tuple

import oneflow as flow


def liboneflow() -> str:
    """The path of the library that holds OneFlow's compiled core.

    Raises:
        OSError: it is not where the wheels of OneFlow 0.9 have it.
    """
    folder = os.path.join(os.path.dirname(flow.__file__), os.pardir, "oneflow.libs")
    paths = glob.glob(os.path.join(glob.escape(folder), "liboneflow-*.so"))
    if len(paths) != 1:
        raise OSError("liboneflow was not found")
    return paths[0]


class _SymbolInfo(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where a function or variable of ``library`` is in memory.

    Raises:
        ValueError: it has none of this name.
    """
    return ctypes.addressof(ctypes.c_char.in_dll(library, name))


def loaded_from(address: int) -> Tuple[str, int]:
    """The file that has code or data at ``address`` in memory, and where the file begins there.

    Raises:
        OSError: it is in no file.
    """
    found = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found)):
        raise OSError("the address is in no file")
    return os.fsdecode(found.file), int(found.base)
