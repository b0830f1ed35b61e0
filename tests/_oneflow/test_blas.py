"""OneFlow's OpenBLAS takes the kernels that fit the processor, and no other library's does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
from numpy.core._multiarray_umath import __cpu_features__
from openblas import FLAGS, found_by, needs_avx2

from ofengine._oneflow import blas

needs_numpy_s_own = pytest.mark.skipif(
    not list(Path(np.__file__).parent.parent.glob("numpy.libs/libopenblas*.so")),
    reason="this numpy brings no OpenBLAS",
)

BEGIN = """
import ctypes, json, os, subprocess, sys, threading, time
import numpy as np

libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
# As on a processor that OneFlow does not know. Python's os.environ does not have it.
libc.setenv(b"OPENBLAS_CORETYPE", b"Prescott", 1)

def numbers(rows, columns):
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype("float32")

def product():
    import oneflow as flow
    return (flow.tensor(numbers(65, 300)) @ flow.tensor(numbers(300, 33))).numpy().tobytes().hex()

def take():
    from ofengine._oneflow.blas import kernels
    return kernels
"""


def run(code: str, **environment: str) -> Dict[str, Any]:
    """What ``code`` left in ``found``, run in a process whose OneFlow took Prescott's kernels."""
    return found_by(BEGIN, code, **environment)


def test_what_the_processor_can_is_what_numpy_finds_by_itself() -> None:
    """Or tests that need AVX would be skipped on processors that have it."""
    for flag, of_numpy in (("avx", "AVX"), ("avx2", "AVX2"), ("fma", "FMA3")):
        assert (flag in FLAGS) == __cpu_features__[of_numpy], flag


@needs_avx2
@needs_numpy_s_own
def test_oneflow_takes_newer_kernels_and_nothing_else_changes() -> None:
    found = run(
        """
        import glob, multiprocessing
        (path,) = glob.glob(os.path.dirname(np.__file__) + "/../numpy.libs/libopenblas*.so")
        of_numpy = ctypes.CDLL(path)
        names = ("openblas_get_corename64_", "openblas_get_corename")
        name = next(getattr(of_numpy, n) for n in names if hasattr(of_numpy, n))
        name.restype = ctypes.c_char_p

        def numpy_s():
            return [name().decode(), (numbers(65, 300) @ numbers(300, 33)).tobytes().hex()]

        found["numpy before"] = numpy_s()
        kernels = take()
        found["numpy after"] = numpy_s()
        found["kernels"] = kernels()._asdict()
        found["in C"] = str(libc.getenv(b"OPENBLAS_CORETYPE"))
        found["product"] = product()

        import oneflow as flow
        worst = 0.0
        for m, n, k in [(1, 1, 1), (1, 7, 300), (7, 1, 33), (3, 5, 8), (17, 16, 31), (33, 70, 129),
                        (64, 64, 64), (129, 65, 257), (200, 300, 500), (4, 1100, 700)]:
            for kind in ("float32", "float64"):
                a, b = numbers(m, k).astype(kind), numbers(k, n).astype(kind)
                wide = a.astype("float64"), b.astype("float64")
                size = np.abs(wide[0]) @ np.abs(wide[1])
                for made in (
                    flow.tensor(a) @ flow.tensor(b),
                    flow.matmul(flow.tensor(a.T.copy()), flow.tensor(b), transpose_a=True),
                    flow.matmul(flow.tensor(a), flow.tensor(b.T.copy()), transpose_b=True),
                ):
                    off = np.abs(made.numpy() - wide[0] @ wide[1]) / size
                    worst = max(worst, float(off.max() / np.finfo(kind).eps))
        found["worst"] = worst

        child = os.fork()
        if not child:
            os._exit(kernels().core == "Haswell" and product() == found["product"])
        found["forked"] = os.WEXITSTATUS(os.waitpid(child, 0)[1])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["spawned"] = pool.apply(kernels).core
        """
    )
    assert found["kernels"]["core"] == "Haswell"
    assert found["kernels"]["by_oneflow"] == "Prescott"
    assert found["in C"] == "None"  # no process started later inherits it
    assert found["numpy after"] == found["numpy before"]
    # Sums of up to 700 products: far less than 700 roundings, in units of float's last bit.
    assert 0 < found["worst"] < 8
    assert found["forked"] == 1
    assert found["spawned"] not in blas._OLDER


@needs_avx2
def test_a_process_that_has_computed_waits_and_goes_on_with_the_newer() -> None:
    found = run(
        """
        import oneflow as flow
        many = [flow.ones(400, 400) @ flow.ones(400, 400) for _ in range(30)]  # not waited for
        kernels = take()
        found["core"], found["product"] = kernels().core, product()
        found["sums"] = sorted({float(each.numpy().min()) for each in many})
        """
    )
    assert found["core"] == "Haswell"
    assert found["sums"] == [400.0]
    assert found["product"] == run("take(); found['product'] = product()")["product"]
    assert found["said"] == "" or "BLAS" not in found["said"]


def test_where_other_threads_may_compute_it_is_left_and_told() -> None:
    found = run(
        """
        import oneflow as flow
        found["before"] = product()
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        kernels = take()
        found["core"], found["after"] = kernels().core, product()
        """
    )
    assert found["core"] == "Prescott"
    assert found["after"] == found["before"]
    if not blas._NEEDED - blas._processor_flags():
        assert found["said"].count("import ofengine before OneFlow is used") == 1


@pytest.mark.parametrize("choice", ["OFENGINE_BLAS=as-is", "OPENBLAS_CORETYPE=Nehalem"])
def test_what_the_user_chose_is_left(choice: str) -> None:
    variable, _, value = choice.partition("=")
    found = run("found['core'] = take()().core", **{variable: value})
    assert found["core"] == "Prescott"  # it was chosen in C, for this test
    assert "BLAS" not in found["said"]


@needs_numpy_s_own
def test_another_library_s_openblas_that_stands_before_is_left() -> None:
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    (path,) = folder.glob("libopenblas*.so")
    environment = {"LD_PRELOAD": str(path), "LD_LIBRARY_PATH": str(folder)}
    found = run("found['kernels'] = take()()._asdict()", **environment)
    assert found["kernels"] == {
        "core": "",
        "by_oneflow": "",
        "why": "not known here: another library's OpenBLAS stands before OneFlow's",
        "mended": False,
    }


@pytest.fixture
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.delenv("OFENGINE_BLAS", raising=False)
    monkeypatch.setattr(blas, "_processor_flags", lambda: {"fpu", "avx2", "fma"})


@pytest.mark.usefixtures("_undecided")
def test_only_older_kernels_are_replaced_and_only_where_the_processor_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for core in ("Prescott", "Barcelona", "Sandybridge"):
        assert blas._reason_to_leave(core) == ""
    for core in ("Haswell", "Zen", "Excavator", "SkylakeX"):
        assert blas._reason_to_leave(core) == "OneFlow's own choice"
    for flags in ({"avx2"}, {"fma"}, {"fpu", "avx"}):
        monkeypatch.setattr(blas, "_processor_flags", lambda: flags)  # noqa: B023
        assert "has no AVX2 and FMA" in blas._reason_to_leave("Prescott")


@pytest.mark.usefixtures("_undecided")
def test_a_misspelt_choice_is_told(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("OFENGINE_BLAS", "asis")
    with caplog.at_level(logging.WARNING, logger="ofengine"):
        assert blas._reason_to_leave("Prescott") == ""
    assert caplog.messages == ["OFENGINE_BLAS=asis is not known and does nothing: there is as-is."]
