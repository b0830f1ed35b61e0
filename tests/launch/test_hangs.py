"""A rank that shows no sign of work ends all, after a limit, and is named with its stack."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, program

STEPS = """
def stay_here():
    forever()

def hang(how):
    if how == "sleep":
        stay_here()
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "left":
        raise RuntimeError

try:
    with heartbeat.verb:
        for step in range(3):
            heartbeat.beat()
            with heartbeat.exchange:
                time.sleep(0.1)
        if rank == 1:
            hang(sys.argv[1])
        with heartbeat.exchange:
            forever()
except RuntimeError:
    forever()
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sleep", "hung for more than 1 s"),
        pytest.param("stopped", "hung for more than 1 s", marks=pytest.mark.slow),
        pytest.param("left", "did not come, and the others waited 1 s", marks=pytest.mark.slow),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(tmp_path: Path, how: str, said: str) -> None:
    done = launch(tmp_path, "--nproc", 3, "--hang-timeout", 1, program(tmp_path, STEPS), how)
    assert done.returncode == 1
    assert "rank 1 of 3" in done.stderr.splitlines()[-1]
    assert said in done.stderr.splitlines()[-1]
    assert ("in stay_here" in done.stderr) == (how == "sleep")


def test_one_that_never_comes_is_named(tmp_path: Path) -> None:
    text = """
if rank == 1:
    forever()
with heartbeat.verb:
    with heartbeat.exchange:
        forever()
"""
    done = launch(tmp_path, "--nproc", 2, "--hang-timeout", 1, program(tmp_path, text))
    assert "rank 1 of 2" in done.stderr
    assert "did not come, and the others waited 1 s" in done.stderr


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_work_that_shows_is_no_hang(tmp_path: Path, limit: float) -> None:
    text = """
with heartbeat.verb:
    for step in range(20):
        heartbeat.beat()
        time.sleep(0.1)
"""
    done = launch(tmp_path, "--nproc", 2, "--hang-timeout", limit, program(tmp_path, text))
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_done_before_and_after_a_verb_has_no_limit(tmp_path: Path) -> None:
    text = """
time.sleep(1.0)
with heartbeat.verb:
    pass
time.sleep(1.0)
"""
    done = launch(tmp_path, "--nproc", 2, "--hang-timeout", 0.3, program(tmp_path, text))
    assert (done.returncode, done.stderr) == (0, "")
