"""Where in the run an optimizer step lies: its epoch, and the decay events before it."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Dict, List, Optional, Tuple, Union

from ofengine.run.windows import Accumulation, Windows


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for a >= 0 and b > 0."""
    return -(-a // b)


class Calendar:
    """Maps optimizer steps, counted from 0 over the whole run, to epochs and batches.

    Args:
        batches_per_epoch: batches in an epoch, or None where that is not known.
        accumulate: batches in an accumulation window; the last of an epoch may be shorter. From
            which epoch on how many, where that changes.

    An epoch of B batches has ``ceil(B / accumulate)`` steps. Epochs that turned out to have
    another length are told by :meth:`epoch_ended`; the ones to come are taken to have
    ``batches_per_epoch``, or to go on for ever where it is None.
    """

    def __init__(
        self, batches_per_epoch: Optional[int], accumulate: Union[Accumulation, Windows] = 1
    ) -> None:
        self.batches_per_epoch = batches_per_epoch
        self.windows = accumulate if isinstance(accumulate, Windows) else Windows.of(accumulate)
        # Only where an epoch differed: the first step and the first batch of each epoch that
        # ended and of the one after them, and their lengths.
        self._starts: List[Tuple[int, int]] = [(0, 0)]
        self._lengths: List[int] = []
        self._events: Dict[int, List[int]] = {}

    def state(self, step: int) -> Dict[str, Any]:
        """How long epochs were before ``step`` and are expected to be, for a checkpoint."""
        lengths = list(self._lengths)
        if self.batches_per_epoch is not None:
            lengths += [self.batches_per_epoch] * (self.epoch_of(step) - len(lengths))
        return {"batches_per_epoch": self.batches_per_epoch, "lengths": lengths}

    def load_state(self, state: Dict[str, Any], step: int) -> None:
        """Take over from :meth:`state` at ``step`` how long the past epochs were.

        What is expected of the epochs to come is what the data says now. Where the data does not
        say, or where the epoch going on is known to be longer, it is what was expected before.
        """
        for length in state["lengths"]:
            self._record(length)
        kept = state["batches_per_epoch"]
        if self.batches_per_epoch is None:
            self.batches_per_epoch = kept
        elif kept is None and self.epoch_of(step) > len(state["lengths"]):
            self.batches_per_epoch = None

    def outgrown(self, epoch: int) -> None:
        """``epoch``, going on, has more batches than was expected: expect nothing any more."""
        self._record_regular(epoch)
        self.batches_per_epoch = None

    def epoch_ended(self, epoch: int, batches: int) -> bool:
        """Record how long ``epoch`` was; True where that was not expected.

        Where no length was known, this one is expected of the epochs to come.
        """
        expected = self.batches_per_epoch
        if batches == expected and not self._lengths:
            return False
        self._record_regular(epoch)
        self._record(batches)
        if expected is None:
            self.batches_per_epoch = batches
        return batches != expected

    def in_whole_windows(self, epoch: int, batches: int) -> int:
        """How many of the first ``batches`` of ``epoch`` are in windows that are full."""
        return batches - batches % self.windows.at(epoch)

    def _record_regular(self, epoch: int) -> None:
        """Write down the epochs before ``epoch`` that were as long as expected, and no others."""
        while len(self._lengths) < epoch and self.batches_per_epoch is not None:
            self._record(self.batches_per_epoch)
        if len(self._lengths) > epoch:  # a checkpoint of the last batch took it for over
            del self._lengths[epoch:], self._starts[epoch + 1 :]
            self._events.clear()

    def _record(self, batches: int) -> None:
        step, batch = self._starts[-1]
        steps = ceil_div(batches, self.windows.at(len(self._lengths)))
        self._lengths.append(batches)
        self._starts.append((step + steps, batch + batches))

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that ``step`` belongs to."""
        epoch, _, _ = self._locate(step)
        return epoch

    def place(self, step: int) -> Tuple[int, int]:
        """(epoch, the step's index in it)."""
        epoch, _, within = self._locate(step)
        return epoch, within

    def steps_before(self, epoch: int, batches: int) -> int:
        """The steps of all epochs before ``epoch``, and of the first ``batches`` of that one."""
        ended = min(epoch, len(self._lengths))
        steps = self._starts[ended][0]
        if epoch > ended and self.batches_per_epoch is not None:
            expected = self.batches_per_epoch
            steps += self.windows.steps(expected, epoch) - self.windows.steps(expected, ended)
        return steps + ceil_div(batches, self.windows.at(epoch))

    def next_epoch(self, step: int) -> Optional[int]:
        """The first step of the epoch after that of ``step``; None where that never comes."""
        epoch, _, within = self._locate(step)
        length = self._length(epoch)
        return None if length is None else step - within + ceil_div(length, self.windows.at(epoch))

    def next_event(self, step: int, every_n_batches: int, per_epoch: bool, stop: int) -> int:
        """The first step after ``step`` with more events before it; ``stop`` if none is earlier."""
        now = self.events_before(step, every_n_batches, per_epoch)
        low, reach = step, 1
        while self.events_before(min(low + reach, stop), every_n_batches, per_epoch) == now:
            if low + reach >= stop:
                return stop
            low, reach = low + reach, 2 * reach
        high = min(low + reach, stop)
        while high - low > 1:
            middle = (low + high) // 2
            if self.events_before(middle, every_n_batches, per_epoch) == now:
                low = middle
            else:
                high = middle
        return high

    def events_before(self, step: int, every_n_batches: int, per_epoch: bool) -> int:
        """The decay events that happened before ``step``.

        An event follows the step of the window of every batch whose index (in its epoch, or
        in the run where ``per_epoch`` is False) is divisible by ``every_n_batches``.
        """
        epoch, first_batch, step_in_epoch = self._locate(step)
        length = self._length(epoch)
        done = step_in_epoch * self.windows.at(epoch)
        if length is not None:
            done = min(done, length)
        if not per_epoch:
            return ceil_div(first_batch + done, every_n_batches)
        ended = len(self._lengths)
        events = self._events_of_ended(every_n_batches)[min(epoch, ended)]
        if epoch > ended and self.batches_per_epoch is not None:
            events += (epoch - ended) * ceil_div(self.batches_per_epoch, every_n_batches)
        return events + ceil_div(done, every_n_batches)

    def _events_of_ended(self, every_n_batches: int) -> List[int]:
        """The events before each of the epochs that ended, and after them all."""
        sums = self._events.setdefault(every_n_batches, [0])
        while len(sums) <= len(self._lengths):
            sums.append(sums[-1] + ceil_div(self._lengths[len(sums) - 1], every_n_batches))
        return sums

    def _length(self, epoch: int) -> Optional[int]:
        return self._lengths[epoch] if epoch < len(self._lengths) else self.batches_per_epoch

    def _locate(self, step: int) -> Tuple[int, int, int]:
        """(epoch, its first batch in the run, the step's index in it)."""
        last_step, last_batch = self._starts[-1]
        if step >= last_step:
            ended = len(self._lengths)
            if self.batches_per_epoch is None:
                return ended, last_batch, step - last_step
            epoch, within = self.windows.locate(step - last_step, self.batches_per_epoch, ended)
            return epoch, last_batch + (epoch - ended) * self.batches_per_epoch, within
        epoch = bisect_right(self._starts, (step, self._starts[-1][1])) - 1
        return epoch, self._starts[epoch][1], step - self._starts[epoch][0]
