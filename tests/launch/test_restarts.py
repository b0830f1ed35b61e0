"""``restart_on_crash``: after a crash of one rank, all ranks start again."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest
from launching import launch, program

TRIES = """
from ofengine.processes import supervisor

number = supervisor.tries()
heartbeat.ask_for_restarts(2)
write(f"try-{number}", supervisor.supervised_by())

def crash(how):
    if how == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("no crash")
    if how == "hang":
        with heartbeat.verb:
            forever()

if rank == 1:
    crash(sys.argv[number])
elif sys.argv[number] != "well":
    forever()
print("through at try", number)
"""


def tries(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.glob("try-*"))


def test_all_ranks_start_again_until_it_is_well(tmp_path: Path) -> None:
    script = program(tmp_path, TRIES)
    done = launch(tmp_path, "--nproc", 2, script, "crash", "crash", "well")
    assert (done.returncode, done.stdout) == (0, "through at try 3\n")
    assert tries(tmp_path) == [f"try-{number}-{rank}" for number in (1, 2, 3) for rank in (0, 1)]
    assert len({path.read_text() for path in tmp_path.glob("try-*")}) == 1  # one supervisor
    first, second = [line for line in done.stderr.splitlines() if line.startswith("ofengine")]
    assert "rank 1 of 2" in first
    assert first.endswith("start again from the last checkpoint; restarts left after that: 1.")
    assert second.endswith("restarts left after that: 0.")


def test_when_the_restarts_are_used_up_it_gives_up(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, TRIES), "crash", "crash", "crash")
    assert done.returncode == 137
    assert len(tries(tmp_path)) == 6
    assert done.stderr.endswith("No restart is left of 2. Giving up.\n")


def test_an_error_is_no_crash(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, TRIES), "raise")
    assert done.returncode == 1
    assert len(tries(tmp_path)) == 2


@pytest.mark.slow
def test_ranks_that_ask_for_nothing_are_not_started_again(tmp_path: Path) -> None:
    script = program(tmp_path, TRIES.replace("heartbeat.ask_for_restarts(2)", ""))
    assert launch(tmp_path, "--nproc", 2, script, "crash").returncode == 137
    assert len(tries(tmp_path)) == 2
