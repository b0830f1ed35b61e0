"""N ranks are one process that accumulates the same N batches, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from launched import results_of
from rank_basics import CASES, CLOSE, SLOW, Place
from rank_cases import run_case

SCRIPT = Path(__file__).with_name("rank_cases.py")
QUICK = [name for name in CASES if name not in SLOW]
OTHERS = [name for name in CASES if name in SLOW or name == "whole"]
STARTS = [
    pytest.param((2, QUICK), id="2 ranks"),
    pytest.param((2, OTHERS), id="2 ranks, the other cases", marks=pytest.mark.slow),
    pytest.param((3, QUICK), id="3 ranks", marks=pytest.mark.slow),
]


def run_ranks(size: int, names: List[str], folder: Path) -> List[Dict[str, Any]]:
    """What each rank got for each of the cases, in one start of the ranks."""
    if "resumed_from_the_other" in names:
        run_case("saved_for_the_other", Place(size, True, folder / "alone" / "saved", folder))
    return results_of(size, SCRIPT, names, folder)


@pytest.fixture(scope="module", params=STARTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    size, names = request.param
    folder = tmp_path_factory.mktemp("ranks")
    return size, folder, run_ranks(size, names, folder)


def assert_equal(one: Any, other: Any, at: str = "", most: float = 0.0) -> None:
    """Equal to the bit, or, with ``most``, numbers of floating point so close to each other."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], f"{at}/{key}", most)
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for place, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{at}[{place}]", most)
    elif most and isinstance(one, (float, np.ndarray)):
        assert np.abs(one - other).max() <= most, at
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other), at
    else:
        assert one == other, at


def test_ranks_compute_what_one_process_does(ranks: Any) -> None:
    size, folder, results = ranks
    for name in results[0]:
        alone = run_case(name, Place(size, True, folder / "alone" / name, folder))
        for rank, result in enumerate(results):
            assert_equal(result[name], alone, f"{name}, rank {rank}", CLOSE.get(name, 0.0))
            assert_equal(result[name], results[0][name], f"{name}, rank {rank} and rank 0")


def test_a_run_that_goes_on_is_one_that_never_stopped(ranks: Any) -> None:
    _, _, results = ranks
    for name, result in results[0].items():
        if name.startswith("resumed_from"):
            assert_equal(result, results[0]["whole"], name)
