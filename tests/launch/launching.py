"""Programs that are run as ranks, plain Python for the most part, and what became of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterable, List, Sequence

import ofengine

PRELUDE = """
import os, signal, socket, subprocess, sys, time
from ofengine.launch import environment, heartbeat

world = environment.read()
rank, folder = world.rank, os.environ["FOLDER"]

def write(name, text=""):
    with open(os.path.join(folder, f"{name}-{rank}"), "w") as file:
        file.write(str(text))

def meet():
    # As OneFlow does: rank 0 listens until all have come.
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", at[1]))
            server.listen()
            others = []
            while len(others) < world.world_size - 1:
                other = server.accept()[0]
                if other.recv(1):  # else it was a launcher that looks for this
                    others.append(other)
            for each in others:
                each.sendall(b"x")
    else:
        connection = socket.create_connection(at)
        connection.sendall(b"x")
        connection.recv(1)

def forever():
    while True:
        time.sleep(1000)

write("pid", os.getpid())
"""
MEET = PRELUDE + "meet()\n"

DEADLINE = 120.0
"""Seconds after which a test gives up waiting: a bound, no measure."""


def program(folder: Path, text: str, prelude: str = MEET) -> Path:
    """A file with ``text`` after ``prelude``."""
    path = folder / "program.py"
    path.write_text(prelude + text)
    return path


def start(folder: Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Begin ``ofengine launch`` with these arguments, behind the command ``within``."""
    command = [*options.pop("within", []), sys.executable, "-m", "ofengine", "launch"]
    command = [*command, *map(str, arguments)]
    root = str(Path(ofengine.__file__).parent.parent)  # the ofengine that is tested
    given = {"FOLDER": str(folder), "PYTHONPATH": root, **options.pop("env", {})}
    environment = {**os.environ, **given}
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, **{**pipes, **options}
    )


def end(process: subprocess.Popen[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Wait for the launcher's end, and see that no rank is left."""
    return end_all([process], folder)[0]


def end_all(
    processes: Sequence[subprocess.Popen[str]], folder: Path
) -> List[subprocess.CompletedProcess[str]]:
    """Wait for the launchers' ends, and see that no rank of any of them is left."""
    done = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    assert [pid for pid in pids(folder) if is_alive(pid)] == []
    return done


def launch(folder: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """``ofengine launch`` with these arguments, from start to end."""
    return end(start(folder, *arguments, **options), folder)


def pids(folder: Path) -> List[int]:
    """The process ids that the ranks have written down."""
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return state(pid) not in ("Z", "X", "")


def state(pid: int) -> str:
    """One letter of Linux: R, S, T (stopped), Z ..., or nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` holds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < DEADLINE, "it never came to this"
        time.sleep(0.02)


def wait_for_files(folder: Path, names: Iterable[str]) -> None:
    """Wait until the ranks have written these files."""
    for name in names:
        wait_for((folder / name).exists)
