"""Products of matrices that leave the processor slow for what comes after them.

The kernels for AVX in OneFlow 0.9's OpenBLAS, ``sgemm_kernel_HASWELL`` and its like, return with
the upper halves of the vector registers in use. Code that was compiled for SSE, as most of
OneFlow's kernels are, then runs several times slower, until something clears them (Intel's and
AMD's optimization manuals: ``vzeroupper`` after AVX code). A step of Adam on an MLP took 3.3 times
as long. Here the kernels are called through a few instructions that clear them afterwards.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Set

from ofengine._oneflow.library import address_of
from ofengine._oneflow.machine_code import load_code

_OF_AVX = {
    "Sandybridge", "Bulldozer", "Piledriver", "Steamroller", "Excavator", "Haswell", "Zen",
}  # fmt: skip
"""The processors whose kernels use AVX, by OpenBLAS's names."""
_KERNELS = ("sgemm_kernel_", "dgemm_kernel_")
_MOST_FUNCTIONS = 480
"""So many functions at most are looked through in OpenBLAS's table, which has about 500."""


def clear_upper_halves(library: ctypes.PyDLL, core: str, flags: Set[str]) -> bool:
    """Let no product of OpenBLAS leave the upper halves in use; False where none would.

    What products and other kernels compute stays the same. The table of OpenBLAS is changed by one
    pointer for each kernel, so that another thread may be computing.

    Args:
        library: the one that has OneFlow's OpenBLAS.
        core: the processor whose kernels it uses.
        flags: what this processor can do, by Linux's names.

    Raises:
        OSError, AttributeError, ValueError: it cannot be done here.
    """
    if core not in _OF_AVX or "avx" not in flags:
        return False
    functions = ctypes.POINTER(ctypes.c_uint64).in_dll(library, "gotoblas")
    kernels = [address_of(library, f"{kind}{core.upper()}") for kind in _KERNELS]
    table = functions[:_MOST_FUNCTIONS]
    places = [table.index(kernel) for kernel in kernels]  # both, or none is changed
    codes = [_calling(kernel) for kernel in kernels]
    start = load_code(b"".join(codes))
    for place, code in zip(places, codes):
        functions[place] = start
        start += len(code)
    return True


def _calling(kernel: int) -> bytes:
    """x86-64 code that calls a gemm kernel with its own arguments, and clears the upper halves.

    ``kernel(m, n, k, alpha, a, b, c, ldc)``: all but the last are in registers.
    """
    code = b"\xff\x74\x24\x08"  # push [rsp+8]       ldc; the stack is aligned again
    code += b"\x48\xb8" + struct.pack("<Q", kernel)  # mov rax, kernel
    code += b"\xff\xd0"  # call rax
    code += b"\x48\x83\xc4\x08"  # add rsp, 8
    code += b"\xc5\xf8\x77"  # vzeroupper
    code += b"\xc3"  # ret
    return code.ljust(32, b"\xcc")
