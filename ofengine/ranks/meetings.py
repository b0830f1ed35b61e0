"""Meetings: the points at which all ranks of a run exchange something.

OneFlow's collectives hang, or mix numbers up, where one rank calls another one than the rest. So
there is one kind of call: every rank sends a message that begins with what it has come for. Where
that differs, the ranks see it, and either serve the one that asks for something or raise, all of
them. Messages go from host to host (:mod:`.wire`), so that no meeting waits for a device; what a
device computes is gathered apart, once all have said that they will.

A rank may ask to see the metrics of all (:meth:`Meetings.peek`) at any moment, alone too: the
others serve it at their next meeting.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import attrs
import numpy as np
import oneflow as flow
from oneflow import comm

from ofengine.errors import RankError
from ofengine.launch.environment import World
from ofengine.launch.heartbeat import exchange
from ofengine.ranks.messages import decode, encode
from ofengine.ranks.wire import Wire

_MOST_NUMBERS = 4 * 1024 * 1024
"""So many numbers all ranks together send at once, so that memory does not grow with them."""
_MOST_BYTES = 64 * 1024 * 1024


class Purpose(enum.IntEnum):
    """What a rank has come to a meeting for."""

    STEP = 1
    """The gradients of a batch."""
    STOP = 2
    """It was told to end training after this batch."""
    PEEK = 3
    """The metrics of all, now, whatever the others do."""
    METRICS = 4
    """The metrics of all, which are due."""
    TALK = 5
    """A message of each."""
    STATISTICS = 6
    """Those of a batch norm, in a step."""
    LINE_UP = 7
    """The round of a compiled step."""
    SKIP = 8
    """It was told to leave out the rest of the epoch."""
    GATHER = 9
    """What each has to say in a hook of the user's."""
    STATES = 10
    """What all keep of the optimizer's state, now, whatever the others do."""


class Said(NamedTuple):
    """What one rank says at a meeting."""

    purpose: int
    stop: bool
    signal: int
    out_of_time: bool
    order: bool
    absent: bool
    """It has no batch in this round."""
    check: int
    done: bool
    """Its step is over, and needs no statistics of others."""
    body: bytes


_BEGINNING = struct.Struct("!B?i???q?")


class RestLeftOut(Exception):
    """Raised where this rank has no batch in a round that all others leave out."""


@attrs.define
class Wishes:
    """What a rank would have all do; after a meeting, what any of them would."""

    stop: bool = False
    signal: int = 0
    out_of_time: bool = False
    order: bool = False
    """Rank 0 has been asked from outside for something."""


class Meetings:
    """This rank's end of all exchanges.

    Args:
        world: which rank it is, of how many.
    """

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.world_size
        self.device = flow.device("cpu", world.local_rank)
        self.over = False
        """True once this rank has met an error: whatever needs the others is left alone."""
        self.absent = False
        """True in a round in which this rank has no batch."""
        self.wishes: Callable[[], Wishes] = Wishes
        """What this rank would have all do, asked at each meeting."""
        self.agreed = Wishes()
        """What any rank wished for at the last meeting to which all came for the same."""
        self.told: Callable[[Wishes], None] = lambda agreed: None
        """Told of what was agreed."""
        self.give_metrics: Callable[[], Any] = list
        """This rank's metrics that were not taken yet, as a plain value."""
        self.take_metrics: Callable[[List[Any]], None] = lambda messages: None
        """Takes what each rank gave, in the order of ranks, once and for all."""
        self.show_metrics: Callable[[List[Any]], None] = lambda messages: None
        """Looks at it only: it is given again."""
        self.serve_statistics: Callable[[int, np.ndarray], None] = lambda of, rows: None
        """Takes what the batch norms of others have sent while this rank has no batch."""
        self.serve_states: Callable[[bool], None] = lambda takes: None
        """Tells what this rank keeps of the optimizer's state, by :meth:`trade`."""
        self._wire = Wire(world)

    @property
    def most_numbers(self) -> int:
        """So many numbers at most are to be gathered from each rank at once."""
        return _MOST_NUMBERS // self.size

    # ------------------------------------------------------------------ what a rank calls

    def step(
        self, body: bytes, check: int, done: bool, meanwhile: Callable[[], None]
    ) -> List[bytes]:
        """What each rank has to say of its batch's step: ``body``, of one size.

        ``check`` must be the same on all ranks; ``done`` tells that this rank's step is
        over, and needs no statistics of others. ``meanwhile`` is called while others say theirs,
        once or more often.
        """
        return [
            each.body for each in self._meet(Purpose.STEP, body, check, done, meanwhile=meanwhile)
        ]

    def statistics(self, own: np.ndarray, of: int) -> np.ndarray:
        """``own`` of each rank in a step, in float64; zeros of a rank that has no batch.

        ``of`` is a number from 1 on that tells what it is, the same on all ranks.
        """
        return _statistics_in(self._meet(Purpose.STATISTICS, own.tobytes(), of))

    def line_up(self, numbers: Sequence[int], train: bool, check: int = 0) -> np.ndarray:
        """Some whole ``numbers`` of each rank, before a compiled step; a row for each.

        ``check`` must be the same on all ranks.
        """
        purpose = Purpose.STEP if train else Purpose.LINE_UP
        said = self._meet(purpose, np.array(numbers, np.int64).tobytes(), check)
        return np.array([np.frombuffer(each.body, np.int64) for each in said])

    def skip(self) -> None:
        """Leave out this round and the rest of the epoch, as all do that have a batch.

        Those that have none raise :class:`RestLeftOut`.
        """
        self._meet(Purpose.SKIP)

    def all_stop(self) -> bool:
        """True where all ranks were told to end training after this batch.

        Where only some were, all end after the next one.
        """
        return self._meet(Purpose.STOP, mixed=True) is not None

    def peek(self) -> None:
        """See the metrics of all ranks now; the others may be anywhere."""
        if not self.over:
            self._meet(Purpose.PEEK)

    def metrics(self) -> None:
        """See the metrics of all ranks, who all come for that."""
        if not self.over:
            self._meet(Purpose.METRICS)

    def states(self) -> None:
        """See what all ranks keep of the optimizer's state; the others may be anywhere.

        Raises :class:`RankError` where this rank has met an error, and may wait for no other.
        """
        if self.over:
            raise RankError(
                "an error has ended this rank, and the others' parts of the optimizer's state "
                '(strategy="zero") are out of its reach: go on from a checkpoint of before it.'
            )
        self._meet(Purpose.STATES)

    def trade(self, message: Any) -> List[Any]:
        """What each rank says while all of them serve one that asked for it."""
        return [decode(each) for each in self._exchange(encode(message))]

    def talk(self, message: Any, purpose: Purpose = Purpose.TALK) -> List[Any]:
        """What each rank says, in the order of ranks: plain values, see :mod:`.messages`."""
        return [decode(each.body) for each in self._meet(purpose, encode(message))]

    def broadcast(self, data: bytes) -> bytes:
        """What rank 0 gave; the others need to give nothing."""
        length = int(self.talk(len(data))[0])
        parts = []
        for start in range(0, length, _MOST_BYTES):
            stop = min(start + _MOST_BYTES, length)
            own = np.frombuffer(data[start:stop], np.uint8) if self.rank == 0 else None
            part = np.zeros(stop - start, np.uint8) if own is None else own.copy()
            tensor = flow.tensor(part, device=self.device)
            with exchange:
                comm.broadcast(tensor, 0)
                parts.append(tensor.numpy().tobytes())
        return b"".join(parts)

    def gather(self, own: np.ndarray) -> np.ndarray:
        """``own`` of each rank, of one size: one row for each."""
        rows = [np.frombuffer(each, own.dtype) for each in self._exchange(own.tobytes())]
        return np.stack(rows)

    def gather_into(self, rows: Any, own: Any) -> None:
        """Have the devices put ``own`` of each rank, a flat tensor, into ``rows``, one by one.

        Nothing waits for it.
        """
        comm.all_gather_into_tensor(rows, own)

    def add_other(self, own: Any) -> None:
        """Of two ranks: have the devices add the other's to ``own``, in its place; as above."""
        comm.all_reduce(own)

    def gather_large(self, own: np.ndarray) -> np.ndarray:
        """The same of any number of bytes."""
        most = _MOST_BYTES // self.size
        starts = range(0, own.size, most)
        parts = [self.gather(own[start : start + most]) for start in starts]
        return np.concatenate(parts, axis=1) if parts else np.empty((self.size, 0), own.dtype)

    # ------------------------------------------------------------------ how it is done

    def _exchange(self, own: bytes, meanwhile: Optional[Callable[[], None]] = None) -> List[bytes]:
        return self._wire.exchange(own, meanwhile)

    def _meet(
        self,
        purpose: Purpose,
        body: bytes = b"",
        check: int = 0,
        done: bool = False,
        mixed: bool = False,
        meanwhile: Optional[Callable[[], None]] = None,
    ) -> Any:
        """What all ranks say, who came for the same; None for ``mixed`` where they did not.

        Raises :class:`RankError` where they came for different things.
        """
        while True:
            wishes = self.wishes()
            beginning = _BEGINNING.pack(
                purpose, wishes.stop, wishes.signal, wishes.out_of_time, wishes.order,
                self.absent, check, done,
            )  # fmt: skip
            said = [_said(each) for each in self._exchange(beginning + body, meanwhile)]
            purposes = [each.purpose for each in said]
            if not _ALONE & set(purposes):  # or some ranks would know before others
                self._agree(said)
            if Purpose.PEEK in purposes or purposes == [Purpose.METRICS] * self.size:
                metrics = self._exchange(encode(self.give_metrics()))
                messages = [decode(each) for each in metrics]
                if Purpose.PEEK not in purposes:
                    self.take_metrics(messages)
                    return said
                if purpose is Purpose.PEEK:
                    self.show_metrics(messages)
                    return said
                continue
            if Purpose.STATES in purposes:
                self.serve_states(purpose is Purpose.STATES)
                if purpose is Purpose.STATES:
                    return said
                continue
            of = self._norm_that_is_served(said)
            if of:
                if Purpose.STOP not in purposes:
                    if purpose is Purpose.STATISTICS:
                        return said
                    self.serve_statistics(of, _statistics_in(said))
                elif mixed:
                    return None
                continue
            if purposes == [purpose] * self.size:
                self._check_same(said)
                return said
            if Purpose.STOP in purposes and set(purposes) <= _AFTER_A_STOP:
                if mixed:
                    return None
                continue  # the batch of this rank is trained on; then all stop
            if Purpose.SKIP in purposes and set(purposes) <= _IN_A_ROUND:
                self._leave_out(said)
                return said
            self.over = True
            raise _at_odds(purposes)

    def _leave_out(self, said: List[Said]) -> None:
        """Some leave a round out: raise where others do not, and where this rank has no batch."""
        if any(each.purpose != Purpose.SKIP and not each.absent for each in said):
            self.over = True
            raise RankError(
                "on_train_batch_start returned -1 on some ranks alone, and all end an epoch "
                "together: let it depend on the epoch, batch_idx or metrics, and not on the rank "
                "or its batch."
            )
        if self.absent:
            raise RestLeftOut

    def _norm_that_is_served(self, said: List[Said]) -> int:
        """Of what some bring statistics, where the others have no batch or will have one; or 0."""
        which = {each.check for each in said if each.purpose == Purpose.STATISTICS}
        over = [each.done for each in said if each.purpose == Purpose.STEP]
        others = {each.purpose for each in said} - _BESIDE_STATISTICS
        if not which or others:
            return 0
        if len(which) > 1 or any(over):
            self.over = True
            raise RankError(
                "the steps of the ranks differ in their batch norms, and sync_batchnorm takes the "
                "statistics of all: each rank's step has to call the same ones in the same order, "
                "and its loss to depend on the same ones."
            )
        return which.pop()

    def _agree(self, said: List[Said]) -> None:
        self.agreed = Wishes(
            any(each.stop for each in said),
            max(each.signal for each in said),
            any(each.out_of_time for each in said),
            any(each.order for each in said),
        )
        self.told(self.agreed)

    def _check_same(self, said: List[Said]) -> None:
        first = said[0]
        if first.purpose == Purpose.STEP and any(each.check != first.check for each in said):
            self.over = True
            raise RankError(
                "the ranks of this run draw their batches in different orders, so that samples "
                "would be repeated and others left out: let the sampler draw from a generator "
                "with a fixed seed, or from none of its own (Trainer(seed=...) sets the others)."
            )


def _said(message: bytes) -> Said:
    return Said._make((*_BEGINNING.unpack_from(message), message[_BEGINNING.size :]))


def _statistics_in(said: List[Said]) -> np.ndarray:
    """What each rank has brought, zeros where it came for something else."""
    brought = [
        np.frombuffer(each.body) if each.purpose == Purpose.STATISTICS else None for each in said
    ]
    size = max(each.size for each in brought if each is not None)
    return np.array([np.zeros(size) if each is None else each for each in brought])


_ALONE = {Purpose.PEEK, Purpose.STATES}
"""What one rank may come for while the others do not."""
_BESIDE_STATISTICS = {Purpose.STATISTICS, Purpose.STEP, Purpose.STOP}
_AFTER_A_STOP = {Purpose.STOP, Purpose.STEP, Purpose.SKIP, Purpose.GATHER}
_IN_A_ROUND = {Purpose.STEP, Purpose.SKIP, Purpose.STATISTICS}
_WORDS = {
    Purpose.STEP: "trains on a batch",
    Purpose.STOP: "ends training",
    Purpose.PEEK: "reads the metrics",
    Purpose.METRICS: "is at the end of its batches, or logs",
    Purpose.STATISTICS: "normalizes a batch by those of all",
    Purpose.TALK: "is between two parts of the run",
    Purpose.STATES: "reads the optimizer's state",
    Purpose.GATHER: "calls trainer.gather()",
    Purpose.SKIP: "leaves out the rest of the epoch",
    Purpose.LINE_UP: "goes through a batch without training",
}


def _at_odds(purposes: Sequence[int]) -> RankError:
    return RankError(
        "the ranks of this run do different things: "
        + ", ".join(f"rank {i} {_WORDS[Purpose(each)]}" for i, each in enumerate(purposes))
        + ". What a hook or a step does must not depend on the rank, unless it is about files and "
        "printing alone."
    )


def same_everywhere(messages: Sequence[Any]) -> bool:
    """True where all ranks said the same."""
    return all(each == messages[0] for each in messages[1:])
