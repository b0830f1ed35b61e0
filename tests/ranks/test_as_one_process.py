"""N ranks are one process that accumulates the same N batches, bit for bit."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from rank_cases import CASES, Place, run_case

ROOT = Path(__file__).resolve().parents[2]


def start_rank(rank: int, size: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    script = Path(__file__).with_name("rank_cases.py")
    command = [sys.executable, str(script), str(folder), "--rank"]
    with (folder / f"output_{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, *CASES], env={**os.environ, **world}, stdout=output,
            stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip


def wait_until_listening(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)


def run_ranks(size: int, folder: Path) -> List[Dict[str, Any]]:
    """What each rank got for each case; all cases in one start of the ranks."""
    alone = Place(size, True, folder / "alone" / "saved", folder)
    run_case("saved_for_the_other", alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start_rank(0, size, port, folder)]
    wait_until_listening(port)
    ranks += [start_rank(rank, size, port, folder) for rank in range(1, size)]
    try:
        until = time.monotonic() + 400
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = "\n".join((folder / f"output_{rank}.txt").read_text() for rank in range(size))
    assert all((folder / f"results_{rank}.pickle").exists() for rank in range(size)), said
    results = [
        pickle.loads((folder / f"results_{rank}.pickle").read_bytes()) for rank in range(size)
    ]
    assert all(set(each) == set(CASES) for each in results), said
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    return request.param, folder, run_ranks(request.param, folder)


def assert_equal(one: Any, other: Any, at: str = "") -> None:
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for place, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{at}[{place}]")
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other), at
    else:
        assert one == other, at


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(ranks: Any, name: str) -> None:
    size, folder, results = ranks
    alone = run_case(name, Place(size, True, folder / "alone" / name, folder))
    for rank, result in enumerate(results):
        assert_equal(result[name], alone, f"rank {rank}")


@pytest.mark.parametrize("name", ["resumed_from_the_same", "resumed_from_the_other"])
def test_a_run_that_goes_on_is_one_that_never_stopped(ranks: Any, name: str) -> None:
    _, _, results = ranks
    assert_equal(results[0][name], results[0]["whole"])
