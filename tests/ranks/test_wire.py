"""Messages from host to host: who gets what, and what happens where one is cut off."""

from __future__ import annotations

import threading
from typing import Any, Dict, List, Optional, Tuple

import pytest

from ofengine.errors import RankError
from ofengine.launch.environment import World
from ofengine.ranks import wire
from ofengine.ranks.wire import Wire


class Hosts:
    """OneFlow's broadcast, between threads of this process that are the ranks."""

    def __init__(self) -> None:
        self._sent: Dict[Tuple[int, int], bytes] = {}
        self._new = threading.Condition()
        self._counts = threading.local()

    def broadcast(self, own: Optional[bytes], of: int) -> bytes:
        """The n-th of a rank is the n-th of that rank for each."""
        counts = self._counts.__dict__.setdefault("of", {})
        key = of, counts.setdefault(of, 0)
        counts[of] += 1
        with self._new:
            if own is not None:
                self._sent[key] = own
                self._new.notify_all()
            assert self._new.wait_for(lambda: key in self._sent, 30)
            return self._sent[key]


def message(rank: int, turn: int) -> bytes:
    return bytes([rank, turn]) * [1, 7, 300_000][(rank + turn) % 3]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_get_what_each_gives_in_the_order_of_ranks(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "broadcast", Hosts().broadcast)
    found: Dict[int, List[Any]] = {}
    called: List[int] = []

    def talk(rank: int) -> None:
        own = Wire(World(rank, size, rank, size, 0, 1))
        found[rank] = [
            own.exchange(message(rank, turn), lambda: called.append(rank)) for turn in range(6)
        ]

    threads = [threading.Thread(target=talk, args=(rank,), daemon=True) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    expected = [[message(rank, turn) for rank in range(size)] for turn in range(6)]
    assert [found[rank] for rank in range(size)] == [expected] * size
    assert sorted(called) == sorted([*range(size)] * 6)


def test_an_exchange_that_is_cut_off_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank would take what belongs to one exchange for that of another."""

    def interrupted(own: Optional[bytes], of: int) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(wire, "broadcast", interrupted)
    own = Wire(World(0, 2, 0, 2, 0, 1))
    with pytest.raises(KeyboardInterrupt):
        own.exchange(b"a")
    monkeypatch.setattr(wire, "broadcast", lambda own, of: b"b")
    with pytest.raises(RankError, match="start them again"):
        own.exchange(b"a")
