"""A product leaves no half of a register in use, and computes the same."""

from __future__ import annotations

import ctypes
from typing import Any, Dict

import pytest
from openblas import FLAGS, found_by, needs_avx2

from ofengine._oneflow import blas, upper_halves
from ofengine._oneflow.machine_code import load_code
from ofengine._oneflow.upper_halves import clear_upper_halves

needs_avx = pytest.mark.skipif("avx" not in FLAGS, reason="this processor has no AVX")
tells_what_is_in_use = pytest.mark.skipif(
    not {"avx2", "fma", "xgetbv1"} <= FLAGS, reason="this processor does not tell"
)

BEGIN = """
import ctypes, json, os
import numpy as np

def products():
    import oneflow as flow
    random, made = np.random.default_rng(0), b""
    for kind in ("float32", "float64"):
        for m, n, k in [(1, 1, 1), (3, 5, 8), (16, 16, 16), (33, 70, 129), (129, 65, 257)]:
            a = flow.tensor(random.standard_normal((m, k)).astype(kind))
            b = flow.tensor(random.standard_normal((k, n)).astype(kind))
            made += (a @ b).numpy().tobytes()
            made += flow.matmul(b, a, transpose_a=True, transpose_b=True).numpy().tobytes()
    return made.hex()

def in_use():
    # The bit of the upper halves (2) in what XGETBV says of ECX = 1, before and after a product.
    from ofengine._oneflow.library import liboneflow
    from ofengine._oneflow.machine_code import load_code
    look = ctypes.CFUNCTYPE(ctypes.c_uint32)(load_code(bytes.fromhex("b9010000000f01d0c3")))
    clear = ctypes.CFUNCTYPE(None)(load_code(bytes.fromhex("c5f877c3")))
    library, found = ctypes.CDLL(liboneflow()), []
    for gemm, kind, number in (
        (library.cblas_sgemm, ctypes.c_float, "float32"),
        (library.cblas_dgemm, ctypes.c_double, "float64"),
    ):
        a, c = np.ones((64, 64), number), np.zeros((64, 64), number)
        at = lambda array: array.ctypes.data_as(ctypes.c_void_p)
        clear()
        before = look()
        gemm(101, 111, 111, 64, 64, 64, kind(1), at(a), 64, at(a), 64, kind(0), at(c), 64)
        found.append([before >> 2 & 1, look() >> 2 & 1, float(c.min()), float(c.max())])
    return found
"""


def run(code: str, **environment: str) -> Dict[str, Any]:
    """What ``code`` left in ``found``."""
    return found_by(BEGIN, code, **environment)


@pytest.fixture(scope="module")
def mended() -> Dict[str, Any]:
    return run(
        """
        from ofengine._oneflow.blas import kernels
        found["kernels"] = kernels()._asdict()
        found["products"] = products()
        found["in use"] = in_use()
        child = os.fork()
        if not child:
            os._exit(products() == found["products"])
        found["forked"] = os.WEXITSTATUS(os.waitpid(child, 0)[1])
        """,
        OPENBLAS_CORETYPE="Haswell",
    )


@needs_avx2
def test_the_numbers_are_those_of_the_kernels_called_directly(mended: Dict[str, Any]) -> None:
    as_is = run(
        """
        from ofengine._oneflow.blas import kernels
        found["kernels"] = kernels()._asdict()
        found["products"] = products()
        """,
        OPENBLAS_CORETYPE="Haswell",
        OFENGINE_BLAS="as-is",
    )
    assert (as_is["kernels"]["core"], as_is["kernels"]["mended"]) == ("Haswell", False)
    assert (mended["kernels"]["core"], mended["kernels"]["mended"]) == ("Haswell", True)
    assert mended["products"] == as_is["products"]
    assert mended["forked"] == 1


@tells_what_is_in_use
def test_nothing_is_in_use_after_a_product(mended: Dict[str, Any]) -> None:
    assert mended["in use"] == [[0, 0, 64.0, 64.0]] * 2
    as_is = run("import ofengine; found['in use'] = in_use()", OPENBLAS_CORETYPE="Haswell",
                OFENGINE_BLAS="as-is")  # fmt: skip
    # OneFlow by itself: what the mending is for.
    assert as_is["in use"][0] == [0, 1, 64.0, 64.0]


@needs_avx
def test_the_code_hands_on_all_arguments_and_what_comes_back() -> None:
    function = ctypes.CFUNCTYPE(
        ctypes.c_int, *[ctypes.c_long] * 3, ctypes.c_float, *[ctypes.c_void_p] * 3, ctypes.c_long
    )
    seen = []

    @function
    def kernel(*arguments: Any) -> int:
        seen.append(arguments)
        return 7

    at = ctypes.cast(kernel, ctypes.c_void_p).value
    assert at is not None
    called = function(load_code(upper_halves._calling(at)))
    assert called(1, 2, 3, 0.5, 4, 5, 6, -7) == 7
    assert seen == [(1, 2, 3, 0.5, 4, 5, 6, -7)]


@pytest.mark.parametrize("core", ["Barcelona", "Prescott", "Nehalem", "", "SkylakeX"])
def test_kernels_without_avx_and_unknown_ones_are_left(core: str) -> None:
    assert not clear_upper_halves(ctypes.PyDLL(None), core, {"avx", "avx2", "fma"})


def test_a_processor_without_avx_is_left() -> None:
    assert not clear_upper_halves(ctypes.PyDLL(None), "Haswell", {"sse2"})


@needs_avx2
def test_a_table_without_the_kernels_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    library = blas._openblas_of_oneflow()
    table = ctypes.c_void_p.in_dll(library, "gotoblas").value
    assert table is not None
    before = list((ctypes.c_uint64 * 480).from_address(table))
    # Its kernels are not in the table in use: they are looked for there before anything changes.
    with pytest.raises(ValueError):
        clear_upper_halves(library, "Bulldozer", {"avx"})
    assert list((ctypes.c_uint64 * 480).from_address(table)) == before

    def refused(code: bytes) -> int:
        raise OSError(13, "memory protection cannot be changed")

    monkeypatch.setattr(upper_halves, "load_code", refused)
    monkeypatch.setattr(upper_halves, "address_of", lambda library, name: before[28])
    with pytest.raises(OSError):
        clear_upper_halves(library, "Haswell", {"avx"})
    assert list((ctypes.c_uint64 * 480).from_address(table)) == before
    monkeypatch.delenv("OFENGINE_BLAS", raising=False)
    assert not blas._mend(library, "Haswell")
