"""Messages from host to host: who gets what, and what happens where somebody is gone."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from ofengine.errors import RankError
from ofengine.launch.environment import World
from ofengine.ranks.wire import Wire


class Ranks:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows = np.zeros((size, 0), np.uint8)
        self._all_there = threading.Barrier(size)

    def wire(self, rank: int) -> Wire:
        def gather(own: np.ndarray) -> np.ndarray:
            if rank == 0:
                self._rows = np.zeros((self.size, own.size), np.uint8)
            self._all_there.wait(30)
            self._rows[rank] = own
            self._all_there.wait(30)
            return self._rows.copy()

        return Wire(World(rank, self.size, rank, self.size, 0, 1), gather)

    def run(self, call: Callable[[int], Any]) -> List[Any]:
        """What ``call`` returns, or raises, on each rank."""
        found: Dict[int, Any] = {}

        def one(rank: int) -> None:
            try:
                found[rank] = call(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(self.size)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert len(found) == self.size, "some ranks wait for ever"
        return [found[rank] for rank in range(self.size)]


def message(rank: int, turn: int) -> bytes:
    """Of any size: none, some, and more than a connection holds."""
    return bytes([rank, turn]) * [0, 7, 3_000_000, 1, 40_000][(rank + turn) % 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_all_get_what_each_gives_in_the_order_of_ranks(size: int) -> None:
    ranks = Ranks(size)

    called: List[int] = []

    def talk(rank: int) -> List[List[bytes]]:
        wire = ranks.wire(rank)
        return [
            wire.exchange(message(rank, turn), lambda: called.append(rank)) for turn in range(6)
        ]

    expected = [[message(rank, turn) for rank in range(size)] for turn in range(6)]
    for found in ranks.run(talk):
        assert found == expected
    assert sorted(called) == sorted([*range(size)] * 6)


def test_a_rank_that_is_gone_ends_the_others_wait() -> None:
    ranks = Ranks(3)

    def talk(rank: int) -> None:
        wire = ranks.wire(rank)
        wire.exchange(b"")
        if rank == 1:
            wire._break()
            return
        with pytest.raises(RankError, match="gone"):
            while True:
                wire.exchange(b"")
        with pytest.raises(RankError, match="start them again"):
            wire.exchange(b"")

    assert ranks.run(talk) == [None] * 3


def test_a_stranger_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that connects before the others do, and says something else."""
    ranks, strangers = Ranks(2), []
    create = socket.create_server

    def watched(*arguments: Any, **options: Any) -> socket.socket:
        listener = create(*arguments, **options)
        for said in (b"GET / HTTP/1.0\r\n\r\n" * 3, b""):
            strangers.append(socket.create_connection(listener.getsockname()))
            strangers[-1].sendall(said)
            if not said:
                strangers[-1].shutdown(socket.SHUT_WR)
        return listener

    monkeypatch.setattr(socket, "create_server", watched)
    found = ranks.run(lambda rank: ranks.wire(rank).exchange(b"%d" % rank))
    assert found == [[b"0", b"1"]] * 2
    assert len(strangers) == 4
    for each in strangers:
        each.settimeout(10)
        with contextlib.suppress(ConnectionResetError):  # the other way of saying it
            assert each.recv(1) == b""
        each.close()
