"""Meetings: the points at which all ranks of a run exchange something.

OneFlow's collectives hang, or mix numbers up, where one rank calls another one than the rest. So
there is one kind of call: every rank sends a buffer of the same size, whose first numbers say what
it has come for. Where they differ, the ranks see it, and either serve the one that asks for
something or raise, all of them.

A rank may ask to see the metrics of all (:meth:`Meetings.peek`) at any moment, alone too: the
others serve it at their next meeting.
"""

from __future__ import annotations

import enum
from typing import Any, Callable, List, Optional, Sequence, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import comm

from ofengine.errors import RankError
from ofengine.launch.environment import World
from ofengine.launch.heartbeat import exchange
from ofengine.ranks.messages import decode, encode

_CONTROL = 10
_LEAST = 4
"""So many numbers a meeting carries at least."""
_MOST_IN_MEETING = 512 * 1024
"""So many numbers a meeting carries at most; more are gathered apart."""
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
        self._room = _LEAST

    def make_room(self, numbers: int, needed: int = 0) -> int:
        """Let meetings carry so many numbers, or as many as there is room for; all ranks at once.

        Returns how many, ``needed`` at least.
        """
        self._room = max(_LEAST, needed, min(numbers, _MOST_IN_MEETING, self.most_numbers))
        return max(needed, min(numbers, self._room))

    @property
    def most_numbers(self) -> int:
        """So many numbers at most are to be gathered from each rank at once."""
        return _MOST_NUMBERS // self.size

    # ------------------------------------------------------------------ what a rank calls

    def step(self, body: np.ndarray, check: int, note: int) -> Tuple[np.ndarray, int]:
        """Exchange ``body``, of the size that there is room for; one row for each rank.

        ``check`` is a number below 2**24 that must be the same on all ranks; of the ``note`` of
        all, the largest is returned too.
        """
        rows = self._meet(Purpose.STEP, body, check, note=note)
        return rows[:, _CONTROL : _CONTROL + body.size], int(rows[:, 7].max())

    def statistics(self, own: np.ndarray, of: int) -> np.ndarray:
        """``own`` of each rank in a step, in float64; zeros of a rank that has no batch.

        ``of`` is a number from 1 on that tells what it is, the same on all ranks.
        """
        rows = self._meet(Purpose.STATISTICS, own.view(np.float32), of)
        return _statistics_in(rows)[:, : own.size]

    def line_up(self, numbers: Sequence[int], train: bool, check: int = 0) -> np.ndarray:
        """Up to four ``numbers`` below 2**24 of each rank, before a compiled step; a row for each.

        ``check`` must be the same on all ranks.
        """
        purpose = Purpose.STEP if train else Purpose.LINE_UP
        rows = self._meet(purpose, np.array(numbers, np.float32), check)
        return rows[:, _CONTROL : _CONTROL + len(numbers)].astype(np.int64)

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
        return self._gather_messages(encode(message), None)

    def talk(self, message: Any, purpose: Purpose = Purpose.TALK) -> List[Any]:
        """What each rank says, in the order of ranks: plain values, see :mod:`.messages`."""
        said = encode(message)
        rows = self._meet(purpose, message=said)
        return self._gather_messages(said, rows)

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
        sent = flow.tensor(own, device=self.device)
        shape = (self.size * own.size,)
        all_of_them = flow.empty(shape, dtype=sent.dtype, device=self.device)
        with exchange:
            comm.all_gather_into_tensor(all_of_them, sent)
            gathered: np.ndarray = all_of_them.numpy()
        return gathered.reshape(self.size, own.size)

    def gather_large(self, own: np.ndarray) -> np.ndarray:
        """The same of any number of bytes."""
        most = _MOST_BYTES // self.size
        starts = range(0, own.size, most)
        parts = [self.gather(own[start : start + most]) for start in starts]
        return np.concatenate(parts, axis=1) if parts else np.empty((self.size, 0), own.dtype)

    # ------------------------------------------------------------------ how it is done

    def _meet(
        self,
        purpose: Purpose,
        body: Optional[np.ndarray] = None,
        check: int = 0,
        note: int = 0,
        message: bytes = b"",
        mixed: bool = False,
    ) -> Any:
        """The buffers of all ranks, who came for the same; None for ``mixed`` where they did not.

        Raises :class:`RankError` where they came for different things.
        """
        while True:
            wishes = self.wishes()
            metrics = encode(self.give_metrics()) if purpose in _OF_METRICS else message
            buffer = np.zeros(_CONTROL + self._room, np.float32)
            buffer[:_CONTROL] = (
                purpose, wishes.stop, wishes.signal, wishes.out_of_time, check,
                *divmod(len(metrics), 2**20), note, self.absent, wishes.order,
            )  # fmt: skip
            if body is not None:
                buffer[_CONTROL : _CONTROL + body.size] = body
            rows = self.gather(buffer)
            purposes = [Purpose(int(each)) for each in rows[:, 0]]
            if not _ALONE & set(purposes):  # or some ranks would know before others
                self._agree(rows)
            if Purpose.PEEK in purposes or purposes == [Purpose.METRICS] * self.size:
                told = metrics if purpose in _OF_METRICS else encode(self.give_metrics())
                lengths = rows if purposes == [purpose] * self.size else None
                messages = self._gather_messages(told, lengths)
                if Purpose.PEEK not in purposes:
                    self.take_metrics(messages)
                    return rows
                if purpose is Purpose.PEEK:
                    self.show_metrics(messages)
                    return rows
                continue
            if Purpose.STATES in purposes:
                self.serve_states(purpose is Purpose.STATES)
                if purpose is Purpose.STATES:
                    return rows
                continue
            of = self._norm_that_is_served(purposes, rows)
            if of:
                if Purpose.STOP not in purposes:
                    if purpose is Purpose.STATISTICS:
                        return rows
                    self.serve_statistics(of, _statistics_in(rows))
                elif mixed:
                    return None
                continue
            if purposes == [purpose] * self.size:
                self._check_same(rows[:, 4], purpose)
                return rows
            if Purpose.STOP in purposes and set(purposes) <= _AFTER_A_STOP:
                if mixed:
                    return None
                continue  # the batch of this rank is trained on; then all stop
            if Purpose.SKIP in purposes and set(purposes) <= _IN_A_ROUND:
                self._leave_out(purposes, rows)
                return rows
            self.over = True
            raise _at_odds(purposes)

    def _leave_out(self, purposes: List[Purpose], rows: np.ndarray) -> None:
        """Some leave a round out: raise where others do not, and where this rank has no batch."""
        if any(each is not Purpose.SKIP and not row[8] for each, row in zip(purposes, rows)):
            self.over = True
            raise RankError(
                "on_train_batch_start returned -1 on some ranks alone, and all end an epoch "
                "together: let it depend on the epoch, batch_idx or metrics, and not on the rank "
                "or its batch."
            )
        if self.absent:
            raise RestLeftOut

    def _norm_that_is_served(self, purposes: List[Purpose], rows: np.ndarray) -> int:
        """Of what some bring statistics, where the others have no batch or will have one; or 0."""
        which = {int(row[4]) for row, each in zip(rows, purposes) if each is Purpose.STATISTICS}
        over = [row[7] for row, each in zip(rows, purposes) if each is Purpose.STEP]
        others = set(purposes) - {Purpose.STATISTICS, Purpose.STEP, Purpose.STOP}
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

    def _agree(self, rows: np.ndarray) -> None:
        stop, order = bool(rows[:, 1].any()), bool(rows[:, 9].any())
        self.agreed = Wishes(stop, int(rows[:, 2].max()), bool(rows[:, 3].any()), order)
        self.told(self.agreed)

    def _check_same(self, checks: np.ndarray, purpose: Purpose) -> None:
        if purpose is Purpose.STEP and len(set(checks.tolist())) > 1:
            self.over = True
            raise RankError(
                "the ranks of this run draw their batches in different orders, so that samples "
                "would be repeated and others left out: let the sampler draw from a generator "
                "with a fixed seed, or from none of its own (Trainer(seed=...) sets the others)."
            )

    def _gather_messages(self, own: bytes, rows: Optional[np.ndarray]) -> List[Any]:
        """The messages of all ranks; ``rows`` tell their lengths, where they do."""
        if rows is None:
            lengths = self.gather(np.array([len(own)], np.int64))[:, 0]
        else:
            lengths = rows[:, 5].astype(np.int64) * 2**20 + rows[:, 6].astype(np.int64)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(own)] = np.frombuffer(own, np.uint8)
        gathered = self.gather(padded)
        return [decode(row[:length].tobytes()) for row, length in zip(gathered, lengths)]


def _statistics_in(rows: np.ndarray) -> np.ndarray:
    """What each rank has brought, zeros where it came for something else."""
    brought: np.ndarray = np.ascontiguousarray(rows[:, _CONTROL:]).view(np.float64)
    brought[rows[:, 0] != Purpose.STATISTICS] = 0.0
    return brought


_ALONE = {Purpose.PEEK, Purpose.STATES}
"""What one rank may come for while the others do not."""
_OF_METRICS = (Purpose.PEEK, Purpose.METRICS)
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


def _at_odds(purposes: Sequence[Purpose]) -> RankError:
    return RankError(
        "the ranks of this run do different things: "
        + ", ".join(f"rank {i} {_WORDS[each]}" for i, each in enumerate(purposes))
        + ". What a hook or a step does must not depend on the rank, unless it is about files and "
        "printing alone."
    )


def same_everywhere(messages: Sequence[Any]) -> bool:
    """True where all ranks said the same."""
    return all(each == messages[0] for each in messages[1:])
