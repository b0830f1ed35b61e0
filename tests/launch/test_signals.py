"""Ctrl-C, SIGTERM, Ctrl-Z: each rank gets a signal once, however it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import (
    PRELUDE,
    end,
    is_alive,
    pids,
    program,
    start,
    state,
    wait_for,
    wait_for_files,
)

CATCHING = """
counts = {}

def receive(number, frame):
    counts[number] = counts.get(number, 0) + 1

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, receive)
write("ready")
with heartbeat.verb:
    while signal.SIGINT not in counts and signal.SIGTERM not in counts:
        heartbeat.beat()
        time.sleep(0.02)
        if signal.SIGUSR1 in counts:
            write("told")
    # One that came twice would be here by now: as long as it takes to save.
    time.sleep(0.5)
    write("got", sorted(counts.items()))
    if "ends well" not in sys.argv:
        raise SystemExit(128 + max(counts))
"""


def ready(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Two ranks of the program above, in a process group of their launcher's own."""
    process = start(
        folder, "--nproc", 2, program(folder, CATCHING), *arguments, start_new_session=True
    )
    wait_for_files(folder, ["ready-0", "ready-1"])
    return process


@pytest.mark.parametrize(
    ("to", "number"),
    [
        ("launcher", signal.SIGTERM),
        ("group", signal.SIGINT),
        ("group and ranks", signal.SIGTERM),
        pytest.param("launcher", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("group", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("group and ranks", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_reaches_each_rank_once_and_all_save(
    tmp_path: Path, to: str, number: signal.Signals
) -> None:
    process = ready(tmp_path)
    if to == "launcher":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    if to == "group and ranks":  # as where a wrapper passes on what its group has had already
        process.send_signal(number)
    done = end(process, tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, "")
    for rank in (0, 1):
        assert (tmp_path / f"got-{rank}").read_text() == f"[({int(number)}, 1)]"


def test_ranks_that_end_well_after_a_signal_make_a_good_end(tmp_path: Path) -> None:
    process = ready(tmp_path, "ends well")
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path).returncode == 0


def test_other_signals_are_passed_on_and_end_nothing(tmp_path: Path) -> None:
    process = ready(tmp_path)
    process.send_signal(signal.SIGUSR1)
    wait_for_files(tmp_path, ["told-0", "told-1"])
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path).returncode == 143
    assert (tmp_path / "got-1").read_text() == f"[({signal.SIGUSR1:d}, 1), ({signal.SIGTERM:d}, 1)]"


def test_a_second_signal_kills(tmp_path: Path) -> None:
    text = """
signal.signal(signal.SIGINT, lambda *_: write("told"))
write("ready")
while True:
    time.sleep(0.01)
"""
    process = start(tmp_path, "--nproc", 2, program(tmp_path, text))
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    process.send_signal(signal.SIGINT)
    wait_for_files(tmp_path, ["told-0", "told-1"])
    time.sleep(1.0)  # one within half a second is taken for the first
    process.send_signal(signal.SIGINT)
    done = end(process, tmp_path)
    assert done.returncode == 130


def test_keyboard_interrupt_in_all_ranks_makes_no_noise(tmp_path: Path) -> None:
    text = """
write("ready")
with heartbeat.verb:
    while True:
        heartbeat.beat()
        time.sleep(0.01)
"""
    process = start(tmp_path, "--nproc", 2, program(tmp_path, text))
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    process.send_signal(signal.SIGINT)
    done = end(process, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_rank_that_crashes_while_all_stop_is_told(tmp_path: Path) -> None:
    text = """
def receive(*_):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

signal.signal(signal.SIGTERM, receive)
write("ready")
with heartbeat.verb:
    while True:
        heartbeat.beat()
        time.sleep(0.01)
"""
    process = start(tmp_path, "--nproc", 2, program(tmp_path, text))
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    process.send_signal(signal.SIGTERM)
    done = end(process, tmp_path)
    assert done.returncode == 137
    assert "rank 1 of 2" in done.stderr


def test_ranks_that_have_not_met_end_at_the_first_signal(tmp_path: Path) -> None:
    text = """
signal.signal(signal.SIGTERM, lambda *_: None)  # as in OneFlow's rendezvous, where no Python runs
if rank == 0:
    server = socket.socket()
    server.bind(("", int(os.environ["MASTER_PORT"])))
    server.listen()
write("ready")
while True:
    time.sleep(0.01)
"""
    process = start(tmp_path, "--nproc", 2, program(tmp_path, text, prelude=PRELUDE))
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path).returncode == 143


def test_ctrl_z_stops_all_and_they_go_on(tmp_path: Path) -> None:
    process = ready(tmp_path)
    every = [process.pid, *pids(tmp_path)]
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: [state(pid) for pid in every] == ["T", "T", "T"])
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: "T" not in [state(pid) for pid in every])
    assert all(map(is_alive, every))
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path).returncode == 143
