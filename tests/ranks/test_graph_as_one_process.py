"""Graph mode on N ranks is one process that takes the batches of all of them as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from graph_cases import CASES, Place, run_case
from launched import results_of

SCRIPT = Path(__file__).with_name("graph_cases.py")
CLOSE = {
    "five_steps_of_sgd": 3e-8,
    "batch_norms_and_dropout": 0.0,
    "batch_norms_of_all_ranks": 3e-6,
    "batch_norms_of_all_ranks_resumed_in_a_window": 3e-6,
    "batch_norms_in_eager_mode_and_graphs_that_evaluate": 3e-6,
}
"""By how much weights may differ; 1e-6 where nothing is said."""
BITS_OF_A_MEAN = 1e-6
STARTS = [
    pytest.param((2, list(CASES)), id="2 ranks", marks=pytest.mark.slow),
    pytest.param((3, list(CASES)), id="3 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=STARTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How many there are, a folder, and what each rank got for each case, in one start of all."""
    (size, names), folder = request.param, tmp_path_factory.mktemp("ranks")
    run_case("saved_for_others", Place(size, True, folder / "alone" / "saved", folder))
    return size, folder, results_of(size, SCRIPT, names, folder, "--hang-timeout", "60")


def assert_close(one: Any, other: Any, atol: float, at: str) -> None:
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            near = atol if at.count("/") or key != "metrics" else max(atol, BITS_OF_A_MEAN)
            assert_close(one[key], other[key], near, f"{at}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for place, (a, b) in enumerate(zip(one, other)):
            assert_close(a, b, atol, f"{at}[{place}]")
    elif isinstance(one, (np.ndarray, float)):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=at)
    else:
        assert one == other, at


def test_ranks_compute_what_one_process_does(ranks: Any) -> None:
    size, folder, results = ranks
    for name in results[0]:
        alone = run_case(name, Place(size, True, folder / "alone" / name, folder))
        assert_close(results[0][name], alone, CLOSE.get(name, 1e-6), name)


def test_all_ranks_are_equal_bit_for_bit(ranks: Any) -> None:
    _, _, results = ranks
    first: Dict[str, Any] = results[0]
    others: List[Dict[str, Any]] = results[1:]
    for each in others:
        assert_close(each, first, 0.0, "")


def test_a_run_that_goes_on_is_one_that_never_stopped(ranks: Any) -> None:
    _, _, results = ranks
    runs = results[0]["resumed_here_and_there"]
    assert_close(runs["graph from ranks"], runs["whole"], 0.0, "from ranks")
    assert_close(runs["graph from alone"], runs["whole"], 1e-6, "from alone")
    assert_close(runs["eager from ranks"], runs["whole"], 1e-6, "in eager mode")
