"""The mend of OneFlow's launch race: its machine code, and what it leaves in memory."""

from __future__ import annotations

import ctypes
import mmap
import queue
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Set, Type

import pytest
from helpers import run_python
from oneflow import _oneflow_internal as oneflow_internal

from ofengine._oneflow import launch_race as _launch_race
from ofengine._oneflow.launch_race import mend_launch_race
from ofengine._oneflow.library import address_of

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
        return ctypes.c_uint64.from_address(self.at + _launch_race.PAGE).value

    @property
    def in_flight(self) -> int:
        return ctypes.c_int32.from_address(self.at + _launch_race.PAGE + 8).value

    @property
    def someone_sleeps(self) -> bool:
        return ctypes.c_int32.from_address(self.at + _launch_race.PAGE + 12).value == 1


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


def _holds(area: str, address: int) -> bool:
    low, high = (int(each, 16) for each in area.split("-"))
    return low <= address < high


def _permissions(address: int) -> str:
    for area, permissions, *_ in _mappings():
        if _holds(area, address):
            return permissions
    return "none"


def test_the_code_is_not_writable_and_nothing_is_shared_with_forked_processes(
    runs: _Queue,
) -> None:
    assert _permissions(runs.at) == "r-xp"
    assert _permissions(runs.at + _launch_race.PAGE) == "rw-p"


def test_what_was_mended_is_not_writable() -> None:
    library = ctypes.CDLL(oneflow_internal.__file__)
    for name in (_launch_race._WAIT, _launch_race._ENQUEUE, _launch_race._DEQUEUE):
        assert _permissions(address_of(library, name)) == "r-xp"


# ---------------------------------------------------------------------- which binary it is


def test_the_build_id_is_that_of_the_file_in_memory() -> None:
    at = address_of(ctypes.CDLL(None), "strlen")
    (path,) = {line[5] for line in _mappings() if len(line) > 5 and _holds(line[0], at)}
    found = bytes.fromhex(_launch_race._build_id(at))
    note = b"\x04\0\0\0" + bytes([len(found), 0, 0, 0]) + b"\x03\0\0\0GNU\0" + found
    assert len(found) == 20
    assert Path(path).read_bytes().count(note) == 1


def test_what_is_no_library_has_no_build_id() -> None:
    memory = ctypes.create_string_buffer(64)
    assert _launch_race._build_id(ctypes.addressof(memory)) == ""


def test_another_build_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has functions of these names, as a build from the sources of 0.9.0 would."""

    def overwrite(codes: Dict[int, bytes]) -> None:
        raise AssertionError("it was changed")

    monkeypatch.setattr(_launch_race, "_overwrite", overwrite)
    monkeypatch.setattr(_launch_race, "_BUILD_ID", "0" * 40)
    assert _launch_race._mend_launch_race() == (
        "not possible here: liboneflow is not the one this was written for"
    )


# ---------------------------------------------------------------------- all or nothing


class _Library:
    """Functions that return 1, in executable pages: one in the first, one in the second."""

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        memory = mmap.mmap(-1, 4 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # its pages are replaced by others
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
        self.at = (self.base + 32, self.base + page + 4)
        memory[:] = b"\xcc" * len(memory)
        for at in self.at:
            ctypes.memmove(at, self.returning(1), 6)
        _launch_race.protect(self.base, 2 * page, mmap.PROT_READ | mmap.PROT_EXEC)

    @staticmethod
    def returning(number: int) -> bytes:
        return b"\xb8" + number.to_bytes(4, "little") + b"\xc3"  # mov eax, number; ret

    def change(self) -> None:
        _launch_race._overwrite({at: self.returning(2 + n) for n, at in enumerate(self.at)})

    @property
    def returned(self) -> List[int]:
        return [ctypes.CFUNCTYPE(ctypes.c_int)(at)() for at in self.at]

    @property
    def rest(self) -> Set[int]:
        """The bytes that belong to no function."""
        code = bytearray(ctypes.string_at(self.base, 2 * mmap.PAGESIZE))
        for at in self.at:
            code[at - self.base : at - self.base + 6] = b"\xcc" * 6
        return set(code)

    @property
    def permissions(self) -> List[str]:
        return [_permissions(at) for at in self.at]


def test_functions_in_two_pages_are_replaced_and_nothing_else_is() -> None:
    library = _Library()
    assert library.returned == [1, 1]
    library.change()
    assert library.returned == [2, 3]
    assert library.rest == {0xCC}
    assert library.permissions == ["r-xp", "r-xp"]


@pytest.mark.parametrize("step", ["_map_new", "protect", "_move"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_where_a_part_of_it_fails_nothing_is_changed_or_left(
    monkeypatch: pytest.MonkeyPatch, step: str, kind: Type[BaseException]
) -> None:
    library = _Library()
    copies: List[int] = []
    map_new = _launch_race._map_new

    def noting(length: int) -> int:
        copies.append(map_new(length))
        return copies[-1]

    def fails(*_: object) -> None:
        assert library.permissions == ["r-xp", "r-xp"]
        raise kind

    monkeypatch.setattr(_launch_race, "_map_new", noting)
    monkeypatch.setattr(_launch_race, step, fails)
    with pytest.raises(kind):
        library.change()
    assert library.returned == [1, 1]
    assert library.rest == {0xCC}
    assert library.permissions == ["r-xp", "r-xp"]
    assert len(copies) == (step != "_map_new")
    assert [_permissions(copy) for copy in copies] == ["none"] * len(copies)


def test_what_the_kernel_refuses_is_an_error() -> None:
    with pytest.raises(OSError, match="memory cannot be had"):
        _launch_race._map_new(1 << 60)
    with pytest.raises(OSError, match="memory protection cannot be changed"):
        _launch_race.protect(0x1000, mmap.PAGESIZE, mmap.PROT_READ)
    copy = _launch_race._map_new(mmap.PAGESIZE)
    with pytest.raises(OSError, match="in the place of other code"):
        _launch_race._move(copy, copy + 1, mmap.PAGESIZE)
    assert _permissions(copy) == "rw-p"
    _launch_race._libc.munmap(ctypes.c_void_p(copy), ctypes.c_size_t(mmap.PAGESIZE))


def test_where_it_cannot_be_done_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(start: int, length: int, protection: int) -> None:
        raise OSError(13, "memory protection cannot be changed")

    monkeypatch.setattr(_launch_race, "protect", refuse)
    monkeypatch.setattr(_launch_race, "_launch_race", None)
    found = mend_launch_race()
    assert found.startswith("not possible here: ")
    assert found.endswith("memory protection cannot be changed")


# ---------------------------------------------------------------------- once a process


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
