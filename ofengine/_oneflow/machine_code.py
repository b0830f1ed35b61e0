"""Machine code of ours in memory, for what can be mended in OneFlow's binaries alone."""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def load_code(code: bytes) -> int:
    """Put ``code``, at most a page of it, into memory, to be run from there; its address.

    The page after it can be written. Both are kept for ever: OneFlow's threads may run the code
    when Python has already cleared its modules. A forked process has them as its own.

    Raises:
        OSError: the system lets no code be loaded.
    """
    pages = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    pages[: len(code)] = code
    protect(address, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pages))
    return address


def protect(start: int, length: int, protection: int) -> None:
    """Let so many bytes at ``start``, whole pages, be read, written or run as mmap(2) names it.

    Raises:
        OSError: the system does not.
    """
    if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "memory protection cannot be changed")
