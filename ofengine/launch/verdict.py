"""Which rank is at fault: pure functions of what the launcher sees of all ranks at one moment."""

from __future__ import annotations

import signal
from typing import Iterator, List, NamedTuple, Optional, Tuple

from ofengine.launch import slot
from ofengine.processes.supervisor import CRASHES, duration

_ORDER = {"crash": 0, "exception": 1, "exit": 2, "early": 3}
"""What is told first of what is seen at the same moment."""
_STUCK, _STUCK_WHILE_ALL_LIVE = 1.0, 5.0
"""Seconds for which a rank is waiting for another that is done with what it is waiting in."""


class Seen(NamedTuple):
    """What is seen of one rank."""

    rank: int
    code: Optional[int] = None
    """Its exit code, below 0 for the signal that it died of; None while it lives."""
    connected: bool = False
    begun: int = 0
    """How many verbs it has begun."""
    ended: int = 0
    """The last verb that it has ended without an exception."""
    leaving: int = 0
    """1 while an exception makes it leave its verb, 2 after that."""
    over: bool = False
    """Its script is at an end."""
    failed_at: int = 0
    """When its script ended with an exception, in nanoseconds, or 0."""
    silent: float = 0.0
    """Seconds since it last showed that it is at work."""
    waits: float = 0.0
    """Seconds for which it has been waiting for the other ranks."""
    gone: float = 0.0
    """Seconds since its script was at an end."""
    exit: int = 0
    """The exit code with which it has left a verb by ``sys.exit``, or 0."""

    @property
    def inside(self) -> Optional[int]:
        """The number of the verb that it is in, its last hooks included; None outside of any."""
        lives = self.code is None and not self.over and self.leaving < 2
        return self.begun if lives and self.begun > self.ended else None

    @property
    def verb(self) -> Optional[int]:
        """The number of the verb that it is in, all being well; else None."""
        return self.inside if self.leaving == 0 else None

    @property
    def is_gone(self) -> bool:
        """Its script is at an end, or its process."""
        return self.over or self.code is not None


class Fault(NamedTuple):
    """What was wrong first."""

    rank: int
    what: str
    """Goes on from "rank 1 ..."."""
    code: int
    """The exit code of it all."""
    kind: str
    """"exception", "crash", "exit", "early" or "hang"."""


def death(ranks: List[Seen], stopping: bool) -> Optional[Fault]:
    """The rank that ended first in a way that is a fault.

    A rank that OneFlow aborts because it has lost another is seen at the same moment where the
    launcher was kept from looking: an abort comes last.

    Args:
        ranks: all ranks of this node.
        stopping: they were asked to stop, so any end will do that is no crash.
    """
    found: List[Tuple[int, int, int, Fault]] = []
    for each in ranks:
        fault = _own_fault(each, stopping)
        if fault is not None:
            order = _ORDER[fault.kind] if each.code != -signal.SIGABRT else len(_ORDER)
            found.append((order, each.failed_at, each.rank, fault))
    return min(found)[3] if found else None


def _own_fault(each: Seen, stopping: bool) -> Optional[Fault]:
    code = each.code or 0
    if each.failed_at:
        return Fault(each.rank, "ended with the error above", 1, "exception")
    if stopping and (code >= 0 or -code not in CRASHES or each.over):
        return None
    if code < 0:
        words = CRASHES.get(-code)
        what = f"died of {signal.Signals(-code).name}" + (f" ({words})" if words else "")
        return Fault(each.rank, what, 128 - code, "crash" if words else "exit")
    if code > 0:
        return Fault(each.rank, f"ended with exit code {code}", code, "exit")
    if each.code == 0 and each.begun > each.ended and each.leaving == 0 and not stopping:
        return Fault(each.rank, "ended amid its work, with exit code 0", 1, "early")
    return None


def early(ranks: List[Seen], patience: float) -> Optional[Fault]:
    """A rank that has ended, or left a verb, in which another waits for it.

    Args:
        ranks: all ranks of this node.
        patience: seconds in which the other may come to the same end.
    """
    for waiting, verb in _in_a_verb(ranks):
        for each in ranks:
            if each.is_gone and each.gone >= patience and each.ended < verb:
                code = f" by sys.exit({each.exit})" if each.exit else ""
                what = f"was at its end{code} while rank {waiting.rank} was still at work"
                return Fault(each.rank, what, each.exit or 1, "early")
            left = each.ended >= verb or (each.leaving == 2 and each.begun == verb)
            since = each.gone if each.is_gone else each.silent
            enough = max(patience, _STUCK if each.is_gone else _STUCK_WHILE_ALL_LIVE)
            if left and min(since, waiting.waits) >= enough:
                what = f"did not go on while rank {waiting.rank} was waiting for it"
                return Fault(each.rank, what, 1, "early")
    return None


def hang(ranks: List[Seen], limit: float) -> Optional[Fault]:
    """The rank that keeps the others waiting, once one has been silent for ``limit`` seconds.

    One that waits for the others may do so for as long as any of them is at work.
    """
    inside = [each for each in ranks if each.inside]
    silent = [each for each in inside if each.silent > limit]
    verbs = [each.inside for each in silent if not each.waits or len(silent) == len(inside)]
    if not verbs:
        return None
    verb = max(filter(None, verbs))
    away = [each for each in ranks if each.inside != verb]
    if away:
        each = away[0]
        what = "has ended" if each.is_gone else "did not come"
        return Fault(each.rank, f"{what}, and the others waited {duration(limit)}", 1, "hang")
    each = max(ranks, key=lambda one: (one.waits == 0 and one.silent > limit / 2, one.silent))
    where = ", waiting for a rank on another host," if each.waits else ""
    return Fault(each.rank, f"hung{where} for more than {duration(limit)}", 1, "hang")


def _in_a_verb(ranks: List[Seen]) -> Iterator[Tuple[Seen, int]]:
    for each in ranks:
        if each.verb is not None:
            yield each, each.verb


def seen(rank: int, code: Optional[int], of: slot.Slot, silent: float, waits: float,
         gone: float) -> Seen:  # fmt: skip
    """What is seen of ``rank`` by its slot."""
    return Seen(
        rank=rank,
        code=code,
        connected=bool(of[slot.CONNECTED]),
        begun=of[slot.BEGUN],
        ended=of[slot.ENDED],
        leaving=of[slot.LEAVING],
        over=bool(of[slot.OVER]),
        failed_at=of[slot.FAILED_AT],
        silent=silent,
        waits=waits,
        gone=gone,
        exit=of[slot.EXIT],
    )
