"""The running statistics of batch norms, updated by the batches of all ranks in their order.

Each rank normalizes its batch by that batch alone, as one process does with each of the batches it
accumulates. That process updates the running statistics once for each batch, ``r * (1 - momentum)
+ added``. Here a rank keeps what each of its calls adds, which is what the layer makes of 0, and
all ranks then update theirs by what every rank has, one after the other.
"""

from __future__ import annotations

import types
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RUNNING = ("running_mean", "running_var")

Pair = Tuple[np.ndarray, np.ndarray]
"""Of the running mean, and of the running variance."""


class RunningStatistics:
    """The batch norms of a task that several ranks train.

    Args:
        meetings: this rank's end of the exchange.
        task: whose batch norms are watched until :meth:`close`.

    Raises:
        RankError: a layer averages over all batches, with ``momentum=None``.
    """

    def __init__(self, meetings: Meetings, task: nn.Module) -> None:
        self._meetings = meetings
        self._layers: List[Any] = []
        self._before: Dict[int, List[Any]] = {}
        """Of each layer that was called, the two tensors before the first call of this round."""
        self._added: Dict[int, List[Any]] = {}
        """Of each layer, what each of its calls adds to them: tensors, two of each call."""
        self._own: List[Tuple[Any, Any]] = []
        """Each layer, and the ``forward`` that somebody had given this very object."""
        for name, module in task.named_modules():
            if not isinstance(module, KINDS) or module.running_mean is None:
                continue
            refuse_average(task, name, module)
            self._layers.append(module)
            self._own.append((module, vars(module).get("forward")))
            replace_forward(module, self._call)
        self.room = 0
        """So many numbers each meeting has to carry for it: they come once a round, apart."""
        self._size = sum(int(layer.running_mean.numel()) for layer in self._layers)

    def close(self) -> None:
        """Let go of the layers."""
        for layer, own in self._own:
            vars(layer).pop("forward", None)
            if own is not None:
                vars(layer)["forward"] = own
        self._own.clear()

    def _call(self, layer: Any, forward: Any, *inputs: Any) -> Any:
        """``forward``, noting what it adds to the running statistics."""
        if not layer.training:
            return forward(*inputs)
        with flow.no_grad():  # nothing waits for the device here
            running = [getattr(layer, name) for name in _RUNNING]
            before = [each.clone() for each in running]
            for each in running:
                each.zero_()
        output = forward(*inputs)
        with flow.no_grad():
            added = [each.clone() for each in running]
            for each, old, new in zip(running, before, added):
                each.copy_(old * (1.0 - layer.momentum) + new)
        self._before.setdefault(id(layer), before)
        self._added.setdefault(id(layer), []).extend(added)
        return output

    def begin(self) -> None:
        """The step of a batch begins."""

    @property
    def note(self) -> int:
        """How often the layer that was called most was called in this round."""
        return max(map(len, self._added.values()), default=0) // 2

    def finish(self, most: int) -> None:
        """The step is over on all ranks, none of which has more calls than so many."""
        if most:
            self._exchange(most)

    def _exchange(self, most_calls: int) -> None:
        """Update all layers by the calls of all ranks."""
        own = np.zeros((most_calls, len(self._layers) + 2 * self._size), np.float64)
        before, added = _read(self._before), _read(self._added)
        for calls in range(most_calls):
            row, at = own[calls], len(self._layers)
            for number, layer in enumerate(self._layers):
                arrays = added.get(id(layer), [])[2 * calls : 2 * calls + 2]
                size = int(layer.running_mean.numel())
                if arrays:
                    row[number] = 1.0
                    row[at : at + 2 * size] = np.concatenate(arrays)
                at += 2 * size
        rows = self._meetings.gather(own.reshape(-1)).reshape(-1, *own.shape)
        at = len(self._layers)
        for number, layer in enumerate(self._layers):
            size, count = int(layer.running_mean.numel()), 0
            old = before.get(id(layer))
            now = running_of(layer) if old is None else (old[0], old[1])
            dtype = now[0].dtype
            for calls in rows:  # of one rank after the other
                for call in calls:
                    if call[number]:
                        both = call[at : at + 2 * size].astype(dtype)
                        now = updated(now, (both[:size], both[size:]), layer.momentum)
                        count += 1
            at += 2 * size
            if count:
                write(layer, now)
            others = count - len(added.get(id(layer), [])) // 2
            if others and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(others)
        self._before.clear()
        self._added.clear()


def replace_forward(layer: Any, call: Callable[..., Any]) -> None:
    """Let ``layer(x)`` be ``call(layer, forward, x)``; a trace calls ``forward`` all the same."""
    forward = layer.forward

    def replaced(called: Any, *inputs: Any) -> Any:
        if called is layer:
            return call(layer, forward, *inputs)
        return forward.__func__(called, *inputs)  # by a proxy, for an evaluation in graph mode

    vars(layer)["forward"] = types.MethodType(replaced, layer)


def update_by_calls(layers: Sequence[Any], rows: np.ndarray) -> None:
    """Update the running statistics by calls that each rank has made of ``layers``, in this order.

    A row for each rank: of each call what it adds to the mean, then what it adds to the variance.
    """
    now = {id(layer): running_of(layer) for layer in layers}
    for row in rows:
        at = 0
        for layer in layers:
            mean, variance = now[id(layer)]
            size = mean.size
            added = row[at : at + 2 * size].astype(mean.dtype)
            both = (added[:size], added[size:])
            now[id(layer)] = updated((mean, variance), both, layer.momentum)
            at += 2 * size
    for layer in {id(each): each for each in layers}.values():
        write(layer, now[id(layer)])


def refuse_averages(task: nn.Module) -> None:
    """Raise :class:`RankError` for a batch norm that averages over all batches."""
    for name, module in task.named_modules():
        if isinstance(module, KINDS) and module.running_mean is not None:
            refuse_average(task, name, module)


def refuse_average(task: nn.Module, name: str, layer: Any) -> None:
    """Raise :class:`RankError` where a layer of ``task`` averages over all batches."""
    if layer.momentum is None:
        raise RankError(
            f"{type(task).__name__}.{name} has momentum=None, which several ranks do not "
            "keep to: give it a number, such as 0.1."
        )


def _read(tensors: Dict[int, List[Any]]) -> Dict[int, List[np.ndarray]]:
    """All of them as numpy has them, with one wait for the device."""
    every = [each for of_layer in tensors.values() for each in of_layer]
    if not every:
        return {}
    together = flow.cat([each.to(flow.float64) for each in every], dim=0).numpy()
    parts = np.split(together, np.cumsum([each.numel() for each in every])[:-1])
    names = [str(each.dtype).rpartition(".")[2] for each in every]  # float32 in float64 is exact
    arrays = iter([part.astype(name) for part, name in zip(parts, names)])
    return {key: [next(arrays) for _ in of_layer] for key, of_layer in tensors.items()}


def running_of(layer: Any) -> Pair:
    """The running mean and the running variance."""
    return np.array(layer.running_mean.numpy()), np.array(layer.running_var.numpy())


def updated(now: Pair, added: Pair, momentum: float) -> Pair:
    """As the layer itself does it, in its dtype."""
    kept = now[0].dtype.type(1.0 - momentum)
    return now[0] * kept + added[0], now[1] * kept + added[1]


def write(layer: Any, pair: Pair) -> None:
    """Let these be the running mean and the running variance."""
    with flow.no_grad():
        for name, array in zip(_RUNNING, pair):
            tensor = getattr(layer, name)
            tensor.copy_(flow.tensor(array, device=tensor.device))
