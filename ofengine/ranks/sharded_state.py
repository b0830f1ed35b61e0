"""ZeRO, stage 1: each rank updates some of the parameters, and keeps their optimizer's state alone.

All ranks hold the same gradients when a window closes. The rank that a parameter is of updates it,
by the operations of one process, and tells the others what it has become: so all bits are those of
one process, and of the optimizer's state each rank holds about one N-th.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_copies import put_state_of, state_of
from ofengine._oneflow.optimizer_state import update_no_graph_makes
from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings
from ofengine.ranks.messages import pack, unpack

_DTYPES: Dict[Any, Any] = {
    flow.float32: np.dtype(np.float32),
    flow.float64: np.dtype(np.float64),
}
"""Those of parameters whose gradients are exchanged."""


def owners(sizes: Sequence[int], ranks: int) -> List[int]:
    """The rank that each parameter is of: the largest first, each to the rank that has least."""
    found, loads = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[index] = loads.index(min(loads))
        loads[found[index]] += sizes[index]
    return found


class ShardedState:
    """This rank's part of what an optimizer keeps.

    Args:
        meetings: this rank's end of the exchange.
        optimizer: the same on all ranks.

    Raises:
        RankError: the user's own update could read what this rank has no more.
    """

    def __init__(self, meetings: Meetings, optimizer: Optimizer) -> None:
        own = update_no_graph_makes(optimizer)
        if own is not None:
            raise RankError(
                f'strategy="zero" updates each parameter on one rank alone, and {own} may read '
                'others too: use an optimizer of oneflow.optim as it is, or strategy="ddp".'
            )
        self._meetings, self._optimizer = meetings, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group.parameters]
        self._owners = owners([int(p.numel()) for p in self._parameters], meetings.size)
        self._of_rank: List[List[Any]] = [[] for _ in range(meetings.size)]
        for parameter, owner in zip(self._parameters, self._owners):
            self._of_rank[owner].append(parameter)
        self._taken: Dict[int, Dict[str, Any]] = {}
        """What the last look at all ranks saw, by the number of the parameter."""
        meetings.serve_states = self._serve

    def drop_others(self) -> None:
        """Keep nothing of the parameters of other ranks."""
        for parameter in self._of_others():
            put_state_of(self._optimizer, parameter, {})

    def without_others(self, states: Dict[str, Any], parameters: Dict[str, Any]) -> Dict[str, Any]:
        """Of ``states``, by the names of ``parameters``, those that this rank keeps."""
        others = {id(each) for each in self._of_others()}
        return {n: kept for n, kept in states.items() if id(parameters[n]) not in others}

    def _of_others(self) -> List[Any]:
        pairs = enumerate(self._of_rank)
        return [p for rank, each in pairs if rank != self._meetings.rank for p in each]

    # ------------------------------------------------------------------ the update

    def step(self) -> None:
        """``optimizer.step()`` of all ranks together, which all come for this."""
        gradients = [(each, each.grad) for each in self._of_others()]
        for parameter, _ in gradients:
            parameter.grad = None
        self._optimizer.step()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        self._exchange()

    def _exchange(self) -> None:
        """Give the others this rank's parameters, and take what they have updated of theirs.

        All are sent, so that no hook of one rank can make it send less than the others wait for.
        """
        rank = self._meetings.rank
        own = np.zeros(max(sum(map(_bytes_of, each)) for each in self._of_rank), np.uint8)
        for parameter, start, stop in _laid_out(self._of_rank[rank]):
            own[start:stop] = np.ascontiguousarray(parameter.numpy()).reshape(-1).view(np.uint8)
        rows = self._meetings.gather_large(own)
        with flow.no_grad():
            for other, parameters in enumerate(self._of_rank):
                for parameter, start, stop in _laid_out(parameters) if other != rank else ():
                    if parameter.grad is not None:
                        array = rows[other, start:stop].view(_DTYPES[parameter.dtype])
                        shaped = array.reshape(tuple(parameter.shape))
                        parameter.copy_(flow.tensor(shaped, device=parameter.device))

    # ------------------------------------------------------------------ the whole of it

    def whole(self) -> Dict[int, Dict[str, Any]]:
        """What all ranks keep, by the ``id`` of the parameter, as tensors of the host.

        A rank may ask alone: the others serve it at their next meeting.
        """
        self._meetings.states()
        taken, self._taken = self._taken, {}
        host = flow.device("cpu")
        return {
            id(self._parameters[index]): {key: unpack(each, host) for key, each in kept.items()}
            for index, kept in sorted(taken.items())
        }

    def put_together(self) -> None:
        """Let the optimizer keep the whole again; all ranks come for it in the end."""
        states = self.whole()
        for parameter in self._of_others():
            kept = states.get(id(parameter), {})
            here = {key: each.to(parameter.device) for key, each in kept.items()}
            put_state_of(self._optimizer, parameter, here)

    def _serve(self, takes: bool) -> None:
        """Tell what this rank keeps, parameter by parameter, so that no message is large."""
        rank, count = self._meetings.rank, len(self._owners)
        own = [index for index in range(count) if self._owners[index] == rank]
        most = max(self._owners.count(each) for each in range(self._meetings.size))
        self._taken = {}
        for turn in range(most):
            told: List[Any] = []
            if turn < len(own):
                kept = state_of(self._optimizer, self._parameters[own[turn]])
                told = [own[turn], {key: pack(each) for key, each in kept.items()}]
            for said in self._meetings.trade(told):
                if takes and said and said[1]:
                    self._taken[said[0]] = said[1]


def _bytes_of(parameter: Any) -> int:
    return int(parameter.numel()) * _DTYPES[parameter.dtype].itemsize


def _laid_out(parameters: Sequence[Any]) -> Iterator[Tuple[Any, int, int]]:
    """Each, and from where to where its bytes are in a row of all of them."""
    stop = 0
    for parameter in parameters:
        start, stop = stop, stop + _bytes_of(parameter)
        yield parameter, start, stop
