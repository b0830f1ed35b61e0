"""The kernels of OneFlow's own OpenBLAS, which knows no processor newer than about 2018."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import NamedTuple, Set

from ofengine._oneflow.library import liboneflow, loaded_from
from ofengine._oneflow.upper_halves import clear_upper_halves

log = logging.getLogger("ofengine")

# On a processor that it does not know, the OpenBLAS in liboneflow falls back to its oldest
# kernels: those for Barcelona (2007) on AMD's since Zen 3, those for Prescott (2004) on Intel's
# since about Ice Lake. Haswell's (2013) are the newest that it has, and need AVX2 and FMA.
_NEWER = "Haswell"
_OLDER = {
    "Katmai", "Coppermine", "Northwood", "Prescott", "Banias", "Atom", "Core2", "Penryn",
    "Dunnington", "Nehalem", "Sandybridge", "Athlon", "Opteron", "Opteron_SSE3", "Barcelona",
    "Bobcat", "Nano", "Bulldozer", "Piledriver",
}  # fmt: skip
_NEEDED = {"avx2", "fma"}


class Kernels(NamedTuple):
    """The kernels that OneFlow's OpenBLAS computes with."""

    core: str
    """The processor that they were written for, by OpenBLAS's name; "" where it is not known."""
    by_oneflow: str
    """The one that OneFlow took by itself."""
    why: str
    """Why these, for people."""
    mended: bool = False
    """Their products no longer leave the processor slow, see :mod:`.upper_halves`."""


_kernels = Kernels("", "", "not looked at yet")


def kernels() -> Kernels:
    """The kernels in use, as :func:`take_newer_kernels` left them."""
    return _kernels


def take_newer_kernels(oneflow_was_there: bool) -> None:
    """Let OneFlow's OpenBLAS compute with Haswell's kernels where the processor can run them.

    Only OneFlow's own OpenBLAS is touched, never that of numpy or another library. Nothing is
    changed where the user chose by ``OPENBLAS_CORETYPE`` or ``OFENGINE_BLAS=as-is``, or where
    OneFlow's own choice is as new.

    Args:
        oneflow_was_there: OneFlow had been imported by others, so that it may be computing.
    """
    global _kernels
    try:
        library = _openblas_of_oneflow()
    except (OSError, AttributeError, ValueError) as error:
        _kernels = Kernels("", "", f"not known here: {error}")
        return
    before = _core_of(library)
    why = _reason_to_leave(before)
    if not why and oneflow_was_there:
        why = _reason_to_wait()
        if why:
            log.warning(
                "OneFlow's BLAS goes on with kernels for %s (%s): import ofengine before OneFlow "
                "is used, and it takes faster ones.", before, why,
            )  # fmt: skip
    if not why:
        _switch(library)
        why = f"OneFlow by itself takes those for {before}"
    core = _core_of(library)
    _kernels = Kernels(core, before, why, _mend(library, core))


def _mend(library: ctypes.PyDLL, core: str) -> bool:
    if os.environ.get("OFENGINE_BLAS") == "as-is":
        return False
    try:
        return clear_upper_halves(library, core, _processor_flags())
    except (OSError, AttributeError, ValueError):
        return False  # another OpenBLAS, or no code may be loaded: it is slower, and as right


def _reason_to_leave(core: str) -> str:
    """Why the kernels for ``core`` are to stay; "" where faster ones can be taken."""
    wanted = os.environ.get("OFENGINE_BLAS", "")
    if wanted == "as-is":
        return "left so by OFENGINE_BLAS=as-is"
    if wanted:
        log.warning("OFENGINE_BLAS=%s is not known and does nothing: there is as-is.", wanted)
    if "OPENBLAS_CORETYPE" in os.environ:
        return "OPENBLAS_CORETYPE is set"
    if core not in _OLDER:
        return "OneFlow's own choice"
    if _NEEDED - _processor_flags():
        return "OneFlow's own choice, for this processor has no AVX2 and FMA"
    return ""


def _reason_to_wait() -> str:
    """Wait for OneFlow; why it may be computing all the same, "" where it cannot be.

    A product under way would go on with other kernels than it began with.
    """
    if len(sys._current_frames()) > 1:
        return "other threads of this process may be computing with it"
    from ofengine._oneflow.session import synchronize  # imports more of OneFlow than is here yet

    try:
        synchronize()
    except Exception as error:  # whatever the user's computation has raised is told to the user
        return f"a computation failed: {type(error).__name__}"
    return ""


def _processor_flags() -> Set[str]:
    """What the processor can do, and the system lets it do, by Linux's names."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        for line in lines:  # each of hundreds of cores has such a line
            if line.startswith("flags"):
                return set(line.split())
    return set()


# ---------------------------------------------------------------------- the library


def _openblas_of_oneflow() -> ctypes.PyDLL:
    """The OpenBLAS in liboneflow, which has been loaded.

    Raises:
        OSError, AttributeError, ValueError: there is none, or OneFlow computes with another.
    """
    path = liboneflow()
    library = ctypes.PyDLL(path, mode=os.RTLD_NOLOAD)  # holds the GIL: nobody else asks for work
    table = ctypes.c_void_p.in_dll(library, "gotoblas")
    # Found in a library that OneFlow only links to, it could be numpy's as well. One symbol is
    # looked up, and not each: it takes 2 ms, in a library of this size.
    if not os.path.samefile(loaded_from(ctypes.addressof(table))[0], path):
        raise OSError("OneFlow has no OpenBLAS of its own")
    # It has been set when liboneflow was loaded, unless liboneflow's code was bound to another
    # variable of this name: that of a library in LD_PRELOAD, for one.
    if table.value is None:
        raise OSError("another library's OpenBLAS stands before OneFlow's")
    library.gotoblas_corename.restype = ctypes.c_char_p
    library.gotoblas_dynamic_init.restype = library.gotoblas_dynamic_quit.restype = None
    return library


def _core_of(library: ctypes.PyDLL) -> str:
    return str(library.gotoblas_corename().decode())


def _switch(library: ctypes.PyDLL) -> None:
    """Let OpenBLAS choose once more, as if the user had named Haswell.

    The variable is set in C's environment alone and only meanwhile: OpenBLAS looks there, and
    processes that are started later inherit what is there.
    """
    libc = ctypes.PyDLL(None)
    libc.setenv(b"OPENBLAS_CORETYPE", _NEWER.encode(), 1)
    try:
        library.gotoblas_dynamic_quit()
        library.gotoblas_dynamic_init()
    finally:
        libc.unsetenv(b"OPENBLAS_CORETYPE")
