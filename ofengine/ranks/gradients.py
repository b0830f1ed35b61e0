"""The gradients of all ranks, added up in the order in which one process would add them.

Floating-point addition depends on its order: a ring all-reduce of three ranks gives other last
bits than one process that accumulates three batches. Here each rank gathers what every rank has,
with a flag for each parameter that the batch used, and adds it rank by rank to what the window has
so far. All ranks then hold the same bits, which are those of the one process.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

import numpy as np
import oneflow as flow

from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings

_WIDE, _NARROW = np.dtype(np.float64), np.dtype(np.float32)


class GradientExchange:
    """The gradients of one accumulation window, of all ranks.

    Args:
        meetings: this rank's end of the exchange.
        parameters: the same on all ranks, in the same order.
        room: so many numbers each meeting has to carry for others, which come often: no more
            are in it. 0 for as many as it can.

    Raises:
        RankError: a parameter has a dtype that is not exchanged.
    """

    def __init__(self, meetings: Meetings, parameters: Sequence[Any], room: int = 0) -> None:
        self._meetings = meetings
        self.parameters = list(parameters)
        self._parts = [_Part(self.parameters, dtype) for dtype in (_NARROW, _WIDE)]
        exchanged = sum(len(part.indices) for part in self._parts)
        if exchanged != len(self.parameters):
            raise RankError(
                "several ranks exchange gradients of float32 and float64, and a parameter has "
                "another dtype: convert the model, as in task.float()."
            )
        # The flags and the gradients of float32 travel together: one array, of two views.
        numbers = len(self.parameters) + self._parts[0].size
        self._own = np.empty(numbers, np.float32)
        self._in_meeting = min(numbers, meetings.make_room(room or numbers, room))
        self.clear()

    def add(self, check: int = 0, note: int = 0) -> int:
        """Take the gradients of this rank's batch out of ``.grad``, and add those of all ranks.

        A rank without a batch has none. ``check`` must be the same on all ranks. Returns the
        largest ``note`` of all.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        own, count = self._own, len(self.parameters)
        own[:count] = [each is not None for each in gradients]
        own[count:], wide = (part.flat(gradients) for part in self._parts)
        rows, note = self._meetings.step(own[: self._in_meeting], check, note)
        _add(self._total[: self._in_meeting], rows)
        self._gather_into(self._total, own, self._in_meeting)
        if wide.size:
            self._gather_into(self._parts[1].total, wide, 0)
        np.minimum(self._flags, 1.0, out=self._flags)
        return note

    def _gather_into(self, total: np.ndarray, own: np.ndarray, first: int) -> None:
        most = self._meetings.most_numbers
        for start in range(first, own.size, most):
            part = slice(start, start + most)
            _add(total[part], self._meetings.gather(own[part]))

    def put(self) -> None:
        """Give each parameter that any batch of the window has used its gradient; begin anew."""
        for parameter, gradient in zip(self.parameters, self._split()):
            parameter.grad = gradient
        self.clear()

    def clear(self) -> None:
        """Begin a window anew."""
        # Arrays of their own: gradients that were put may still be looked at.
        self._total, count = np.empty(self._own.size, np.float32), len(self.parameters)
        self._flags, self._parts[0].total = self._total[:count], self._total[count:]
        self._parts[1].total = np.empty(self._parts[1].size, np.float64)
        self._flags.fill(0.0)
        for part in self._parts:
            part.total.fill(-0.0)  # not 0.0: it changes no number that it is added to, and no sign

    def totals(self, names: Dict[int, str]) -> Dict[str, Any]:
        """What the window has so far, by the names of parameters, which are by ``id``."""
        pairs = zip(self.parameters, self._split())
        return {names[id(p)]: gradient for p, gradient in pairs if gradient is not None}

    def load(self, totals: Dict[int, Any]) -> None:
        """Go on from these totals, by the ``id`` of parameters."""
        self.clear()
        for index, parameter in enumerate(self.parameters):
            if id(parameter) in totals:
                self._flags[index] = 1.0
                for part in self._parts:
                    part.set(index, totals[id(parameter)].numpy())

    def _split(self) -> List[Any]:
        gradients: List[Any] = [None] * len(self.parameters)
        for part in self._parts:
            for index, start, stop in zip(part.indices, part.starts, part.starts[1:]):
                if self._flags[index]:
                    parameter = self.parameters[index]
                    array = part.total[start:stop].reshape(tuple(parameter.shape))
                    gradients[index] = flow.from_numpy(array).to(parameter.device)
        return gradients


class _Part:
    """The parameters of one dtype, one after the other."""

    def __init__(self, parameters: Sequence[Any], dtype: np.dtype) -> None:
        of_dtype = {_NARROW: flow.float32, _WIDE: flow.float64}[dtype]
        self.indices = [i for i, p in enumerate(parameters) if p.dtype == of_dtype]
        sizes = [int(parameters[i].numel()) for i in self.indices]
        self.starts = [0, *np.cumsum(sizes).tolist()]
        self.size = self.starts[-1]
        self._dtype = dtype
        self.total = np.empty(0, dtype)
        """What the window has so far."""

    def flat(self, gradients: Sequence[Any]) -> np.ndarray:
        """All ``gradients`` of this part in a row."""
        having = [i for i in self.indices if gradients[i] is not None]
        flat = np.full(self.size, -0.0, self._dtype)
        if having:
            parts = [gradients[i].contiguous().reshape(-1) for i in having]
            together = (flow.cat(parts) if len(parts) > 1 else parts[0]).numpy()
            if len(having) == len(self.indices):
                return together
            at = 0
            for place, index in enumerate(self.indices):
                if gradients[index] is not None:
                    start, stop = self.starts[place], self.starts[place + 1]
                    flat[start:stop] = together[at : at + stop - start]
                    at += stop - start
        return flat

    def set(self, index: int, gradient: np.ndarray) -> None:
        if index in self.indices:
            place = self.indices.index(index)
            self.total[self.starts[place] : self.starts[place + 1]] = gradient.reshape(-1)


def _add(total: np.ndarray, rows: np.ndarray) -> None:
    """Add the rows to ``total``, which is changed, one after the other."""
    for row in rows:
        np.add(total, row, out=total)
