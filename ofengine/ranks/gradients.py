"""The gradients of all ranks, added up in the order in which one process would add them.

Floating-point addition depends on its order: a ring all-reduce of three ranks gives other last
bits than one process that accumulates three batches. Here each rank gathers what every rank has,
and adds it rank by rank to what the window has so far. All ranks then hold the same bits, which
are those of the one process. Of two ranks an all-reduce in float32 has them too: a + b is b + a.

Which parameters a batch has used is known to Python while the device still computes: ranks tell
each other at a meeting. All else the device does in its turn, and nothing waits for it.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow

from ofengine._oneflow.operators import write_into
from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings

_Run = Tuple[int, int, bool]
"""From where to where; True where the window has nothing there so far."""
_Plan = List[List[_Run]]


class GradientExchange:
    """The gradients of one accumulation window, of all ranks.

    Args:
        meetings: this rank's end of the exchange.
        parameters: the same on all ranks, in the same order.

    Raises:
        RankError: a parameter has a dtype that is not exchanged.
    """

    def __init__(self, meetings: Meetings, parameters: Sequence[Any]) -> None:
        self._meetings = meetings
        self.parameters = list(parameters)
        parts = [_Part(meetings, self.parameters, of) for of in (flow.float32, flow.float64)]
        self._parts = [each for each in parts if each.indices]
        if sum(len(part.indices) for part in parts) != len(self.parameters):
            raise RankError(
                "several ranks exchange gradients of float32 and float64, and a parameter has "
                "another dtype: convert the model, as in task.float()."
            )
        self._used = b""
        self._newest: Tuple[Any, Any] = None, None
        """What was to be added last, which is mostly so the next time."""
        self.clear()

    def add(self, check: int = 0, done: bool = False, body: bytes = b"") -> List[bytes]:
        """Take the gradients of this rank's batch out of ``.grad``, and add those of all ranks.

        A rank without a batch has none. ``check`` must be the same on all ranks. Returns the
        ``body`` of each rank, of one size.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        count, having = len(gradients), bytes([each is not None for each in gradients])
        with flow.no_grad():
            said = self._meetings.step(having + body, check, done, lambda: self._take(gradients))
            key = self._used, [each[:count] for each in said]
            if key != self._newest[0]:
                self._newest = key, self._plan(*key)
            plans, self._used = self._newest[1]
            for part, plan in zip(self._parts, plans):
                part.add(plan)
        return [each[count:] for each in said]

    def _take(self, gradients: Sequence[Any]) -> None:
        for part in self._parts:
            part.take(gradients)

    def _plan(self, used: bytes, by_rank: Sequence[bytes]) -> Tuple[List[_Plan], bytes]:
        """What each part has to add, and what the window has used then."""
        had = [np.frombuffer(used, np.bool_)]
        for each in by_rank:
            had.append(had[-1] | np.frombuffer(each, np.bool_))
        having = [np.frombuffer(each, np.bool_) for each in by_rank]
        return [part.plan(having, had) for part in self._parts], had[-1].tobytes()

    def put(self, kept: bool = True) -> None:
        """Give each parameter that any batch of the window has used its gradient; begin anew.

        Where these are not ``kept`` by anybody, their memory is written again from the next
        :meth:`add` on.
        """
        for parameter, gradient in zip(self.parameters, self._split()):
            parameter.grad = gradient
        if not kept:
            for part in self._parts:
                part.reclaim()
        self.clear()

    def clear(self) -> None:
        """Begin a window anew."""
        self._used = bytes(len(self.parameters))
        """Of each parameter, whether a batch of the window has used it."""
        for part in self._parts:
            part.clear()

    def totals(self, names: Dict[int, str]) -> Dict[str, Any]:
        """What the window has so far, by the names of parameters, which are by ``id``."""
        pairs = zip(self.parameters, self._split())
        return {names[id(p)]: gradient for p, gradient in pairs if gradient is not None}

    def load(self, totals: Dict[int, Any]) -> None:
        """Go on from these totals, by the ``id`` of parameters."""
        self.clear()
        given = [totals.get(id(each)) for each in self.parameters]
        self._used = bytes([each is not None for each in given])
        for part in self._parts:
            part.load(given)

    def _split(self) -> List[Any]:
        gradients: List[Any] = [None] * len(self.parameters)
        with flow.no_grad():
            for part in self._parts:
                for index, gradient in part.split(self._used):
                    gradients[index] = gradient
        return gradients


class _Flat:
    """Memory for the parameters of one dtype, one after the other.

    Args:
        shapes: theirs.
        sizes: so many numbers each has.
    """

    def __init__(
        self, shapes: Sequence[Any], sizes: Sequence[int], dtype: Any, device: Any
    ) -> None:
        self.tensor = flow.empty(sum(sizes), dtype=dtype, device=device)
        parts = flow.split(self.tensor, list(sizes))
        self.views = [part.view(shape) for part, shape in zip(parts, shapes)]
        """A view of each parameter's place, in its shape."""


class _Part:
    """The parameters of one dtype.

    Args:
        meetings: this rank's end of the exchange.
        parameters: of all dtypes.
        dtype: which of them.
    """

    def __init__(self, meetings: Meetings, parameters: Sequence[Any], dtype: Any) -> None:
        self._meetings, self._dtype = meetings, dtype
        self.indices = [i for i, p in enumerate(parameters) if p.dtype == dtype]
        own = [parameters[i] for i in self.indices]
        self._shapes = [tuple(each.shape) for each in own]
        self._sizes = [int(each.numel()) for each in own]
        self._homes = [None if p.device == meetings.device else p.device for p in own]
        """Where each one is, unless it is where the ranks exchange."""
        self._size = sum(self._sizes)
        self._starts = [0, *np.cumsum(self._sizes).tolist()]
        self._at_once = max(1, min(self._size, meetings.most_numbers))
        self._total: Optional[_Flat] = None
        """What the window has so far; None before its first batch."""
        self._own: Optional[_Flat] = None
        """What this rank's batch has; None where it was made the total."""
        # New memory is slow, and the device keeps the order: it is written again where that can be.
        self._spare: Optional[_Flat] = None
        self._rows: Any = None

    def take(self, gradients: Sequence[Any]) -> None:
        """Take over those of this rank; None where its batch has not used a parameter."""
        if self._own is None:
            self._own = self._memory()
        for index, home, view in zip(self.indices, self._homes, self._own.views):
            gradient = gradients[index]
            if gradient is not None:
                write_into(view, gradient if home is None else gradient.to(self._meetings.device))

    def plan(self, having: Sequence[np.ndarray], had: Sequence[np.ndarray]) -> _Plan:
        """Of each rank, what it adds: all ranks ``having`` it, and the window what it ``had``.

        Only where there is a gradient: to add a zero may change the sign of another.
        """
        at = self.indices
        return [_runs(new[at], old[at], self._starts) for new, old in zip(having, had)]

    def add(self, plan: _Plan) -> None:
        """Add what all ranks have taken over."""
        if not any(plan):
            return
        assert self._own is not None, "take() comes first"
        if self._is_a_sum(plan):
            start, stop, _ = plan[0][0]
            self._meetings.add_other(self._own.tensor[start:stop])
            self._total, self._own = self._own, None
            return
        if self._total is None:
            self._total = self._memory()
        if self._rows is None:
            size = self._meetings.size * self._at_once
            self._rows = flow.empty(size, dtype=self._dtype, device=self._meetings.device)
        whole = self._total.tensor
        for first in range(0, self._size, self._at_once):
            own = self._own.tensor[first : first + self._at_once]
            size = int(own.numel())
            rows = self._rows[: self._meetings.size * size]
            self._meetings.gather_into(rows, own)
            for rank, runs in enumerate(plan):
                before = first - rank * size
                for start, stop, is_first in runs:
                    start, stop = max(start, first), min(stop, first + size)
                    if start < stop:
                        total = whole[start:stop]
                        row = rows[start - before : stop - before]
                        write_into(total, row) if is_first else total.add_(row)

    def _is_a_sum(self, plan: _Plan) -> bool:
        """True where two ranks have the same, in one piece, and the window has nothing so far.

        In float64 OneFlow's own addition makes +0 of -0 and -0, and its all-reduce does not.
        """
        if self._dtype != flow.float32 or self._total is not None:
            return False
        if len(plan) != 2 or [len(runs) for runs in plan] != [1, 1]:
            return False
        return plan[0][0][2] and plan[1][0] == (*plan[0][0][:2], False)

    def split(self, used: bytes) -> List[Tuple[int, Any]]:
        """The index and the total of each parameter that was ``used``, where the parameter is."""
        if self._total is None:
            return []
        return [
            (index, view if home is None else view.to(home))
            for index, home, view in zip(self.indices, self._homes, self._total.views)
            if used[index]
        ]

    def reclaim(self) -> None:
        """Let the memory of the totals be written again: nobody will look at them."""
        self._spare = self._total

    def clear(self) -> None:
        """Begin a window anew."""
        self._total = None

    def load(self, given: Sequence[Any]) -> None:
        """Go on from these totals."""
        if any(given[index] is not None for index in self.indices):
            self._total = self._memory()
            for index, view in zip(self.indices, self._total.views):
                if given[index] is not None:
                    write_into(view, given[index].to(self._meetings.device))

    def _memory(self) -> _Flat:
        flat, self._spare = self._spare, None
        if flat is None:
            flat = _Flat(self._shapes, self._sizes, self._dtype, self._meetings.device)
        return flat


def _runs(having: np.ndarray, had: np.ndarray, starts: Sequence[int]) -> List[_Run]:
    runs: List[_Run] = []
    for place, has in enumerate(having.tolist()):
        if has:
            start, stop, is_first = starts[place], starts[place + 1], not had[place]
            if runs and runs[-1][1:] == (start, is_first):
                start = runs.pop()[0]
            runs.append((start, stop, is_first))
    return runs
