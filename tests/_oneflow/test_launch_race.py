"""The mend of OneFlow's launch race: its machine code, and what it leaves in memory."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from helpers import run_python

from ofengine._oneflow import launch_race as _launch_race
from ofengine._oneflow.launch_race import mend_launch_race

pytestmark = pytest.mark.skipif(
    mend_launch_race() != "mended", reason=f"not mended: {mend_launch_race()}"
)

A, B = 0x1000, 0x2000


class _Queue:
    """The two functions of the mend over data of their own, called as OneFlow calls them."""

    def __init__(self) -> None:
        self.at, dequeue = _launch_race._load_queue_code()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)  # releases the GIL
        self._wait, self._dequeue = kind(self.at), kind(dequeue)

    def launch(self, graph: int) -> None:
        shared_ptr = (ctypes.c_uint64 * 2)(graph, 0)
        self._wait(None, ctypes.addressof(shared_ptr))

    def end(self) -> None:
        self._dequeue(None, None)

    @property
    def last(self) -> int:
        return ctypes.c_uint64.from_address(self.at + _launch_race._PAGE).value

    @property
    def in_flight(self) -> int:
        return ctypes.c_int32.from_address(self.at + _launch_race._PAGE + 8).value

    @property
    def someone_sleeps(self) -> bool:
        return ctypes.c_int32.from_address(self.at + _launch_race._PAGE + 12).value == 1


@pytest.fixture
def runs() -> _Queue:
    """A queue of its own."""
    return _Queue()


def test_runs_of_one_graph_are_counted_and_never_wait(runs: _Queue) -> None:
    for expected in (1, 2, 3):
        runs.launch(A)
        assert (runs.last, runs.in_flight) == (A, expected)
    for expected in (2, 1, 0):
        runs.end()
        assert runs.in_flight == expected


def test_another_graph_starts_at_once_where_nothing_is_in_flight(runs: _Queue) -> None:
    for graph in (A, B, A):
        runs.launch(graph)
        runs.end()
        assert (runs.last, runs.in_flight) == (graph, 0)


def test_another_graph_waits_for_all_runs_of_the_last_one(runs: _Queue) -> None:
    runs.launch(A)
    runs.launch(A)
    other = threading.Thread(target=runs.launch, args=(B,), daemon=True)
    other.start()
    while not runs.someone_sleeps:
        time.sleep(0.001)
    runs.end()
    assert (runs.last, runs.in_flight) == (A, 1)
    assert other.is_alive()
    runs.end()
    other.join(60)
    assert not other.is_alive()
    assert (runs.last, runs.in_flight, runs.someone_sleeps) == (B, 1, False)


def test_no_waiting_graph_is_forgotten(runs: _Queue) -> None:
    launched: queue.Queue[int] = queue.Queue()
    seen: List[int] = []

    def end_runs() -> None:
        for graph in iter(launched.get, 0):
            seen.append(graph)
            runs.end()

    ending = threading.Thread(target=end_runs, daemon=True)
    ending.start()
    order = [A, B, B, A, A, A, B] * 500
    for graph in order:
        runs.launch(graph)  # would hang where a wake-up got lost
        launched.put(graph)
    launched.put(0)
    ending.join(60)
    assert seen == order
    assert runs.in_flight == 0


def _mappings() -> Iterator[List[str]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        yield line.split()


def _permissions(address: int) -> str:
    for area, permissions, *_ in _mappings():
        low, high = (int(each, 16) for each in area.split("-"))
        if low <= address < high:
            return permissions
    return "none"


def test_the_code_is_not_writable_and_nothing_is_shared_with_forked_processes(
    runs: _Queue,
) -> None:
    assert _permissions(runs.at) == "r-xp"
    assert _permissions(runs.at + _launch_race._PAGE) == "rw-p"


def test_where_memory_cannot_be_changed_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(start: int, length: int, protection: int) -> None:
        raise OSError(13, "memory protection cannot be changed")

    target = ctypes.create_string_buffer(b"abcdef")
    at = ctypes.addressof(target)
    monkeypatch.setattr(_launch_race, "_protect", refuse)
    with pytest.raises(OSError, match="memory protection"):
        _launch_race._overwrite({at: b"xx", at + 4: b"yy"})
    assert target.value == b"abcdef"


def test_many_threads_mend_once() -> None:
    found: List[str] = []
    threads = [threading.Thread(target=lambda: found.append(mend_launch_race())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["mended"] * 8


_CLEARED = """
import gc
import oneflow as flow
from ofengine._oneflow import launch_race as _launch_race

class Twice(flow.nn.Graph):
    def build(self, x):
        return x * 2

assert _launch_race.mend_launch_race() == "mended"
graph, x = Twice(), flow.ones(2)
graph(x).numpy()
_launch_race.__dict__.clear()  # as Python does while it ends
gc.collect()
print(graph(x).numpy().tolist())
"""


def test_the_code_outlives_python_modules() -> None:
    done = run_python("-c", _CLEARED)
    assert (done.returncode, done.stdout.strip()) == (0, "[2.0, 2.0]")


def test_where_it_is_not_mended_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_launch_race, "mend_launch_race", lambda: "not for this machine")
    monkeypatch.setattr(_launch_race, "_told", False)
    _launch_race.mend_or_tell()
    _launch_race.mend_or_tell()
    (record,) = caplog.records
    assert "is not mended (not for this machine)" in record.getMessage()
    assert "Trainer(restart_on_crash=3)" in record.getMessage()
