"""Windows: how many batches an optimizer step averages, by epoch."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import attrs

from ofengine.errors import ConfigurationError
from ofengine.run.arguments import check_count, is_whole

Accumulation = Union[int, Dict[int, int]]
"""So many batches, or from which epoch on so many."""


def check_accumulation(name: str, value: Any) -> Accumulation:
    """``accumulate_grad_batches``: a whole number, or a dict of them by the first epoch."""
    if not isinstance(value, dict):
        return check_count(
            name, value, 1, "a whole number from 1 on, or a dict such as {0: 1, 5: 4}"
        )
    epochs = all(is_whole(epoch) and epoch >= 0 for epoch in value)
    batches = all(is_whole(each) and each >= 1 for each in value.values())
    if not value or not epochs or not batches:
        raise ConfigurationError(
            f"{name}={value!r}: give the number of batches from an epoch on, as in {{0: 1, 5: 4}}: "
            "epochs from 0 on, batches from 1 on."
        )
    return {int(epoch): int(value[epoch]) for epoch in sorted(value)}


def times(accumulation: Accumulation, ranks: int) -> Accumulation:
    """What one process accumulates that goes through the batches of all ``ranks``."""
    if isinstance(accumulation, dict):
        return {epoch: batches * ranks for epoch, batches in Windows.of(accumulation).changes}
    return accumulation * ranks


@attrs.frozen
class Windows:
    """How many batches an optimizer step averages; the last window of an epoch may be shorter."""

    changes: Tuple[Tuple[int, int], ...]
    """(epoch, batches of a window from it on), the first of epoch 0."""

    @classmethod
    def of(cls, accumulation: Accumulation, ranks: int = 1) -> Windows:
        """Those that all ranks together make."""
        by_epoch = accumulation if isinstance(accumulation, dict) else {0: accumulation}
        all_of_them = {0: 1, **by_epoch}
        return cls(tuple((e, all_of_them[e] * ranks) for e in sorted(all_of_them)))

    def at(self, epoch: int) -> int:
        """Batches of a window in ``epoch``."""
        return self.changes[bisect_right(self.changes, (epoch, float("inf"))) - 1][1]

    @property
    def most(self) -> int:
        """Batches of the longest window."""
        return max(batches for _, batches in self.changes)

    def stretches(self, first: int) -> Iterator[Tuple[int, int, Optional[int]]]:
        """(epoch, batches of a window, epoch of the next change) from epoch ``first`` on."""
        later = [change for change in self.changes if change[0] > first]
        starts: List[Tuple[int, int]] = [(first, self.at(first)), *later]
        ends = [*(epoch for epoch, _ in later), None]
        for (epoch, batches), end in zip(starts, ends):
            yield epoch, batches, end

    def steps(self, batches: int, epochs: int) -> int:
        """The optimizer steps of the first ``epochs`` epochs of so many ``batches`` each."""
        total = 0
        for epoch, window, end in self.stretches(0):
            stop = epochs if end is None else min(end, epochs)
            total += max(0, stop - epoch) * -(-batches // window)
        return total

    def locate(self, step: int, batches: int, first: int = 0) -> Tuple[int, int]:
        """(epoch, step within it) of a ``step`` counted from the beginning of epoch ``first``."""
        epoch, per_epoch = first, -(-batches // self.changes[0][1])
        if len(self.changes) == 1:
            further, within = divmod(step, per_epoch)
            return epoch + further, within
        for epoch, window, end in self.stretches(first):
            per_epoch = -(-batches // window)
            if end is None or step < (end - epoch) * per_epoch:
                break
            step -= (end - epoch) * per_epoch
        further, within = divmod(step, per_epoch)
        return epoch + further, within
