"""The running statistics of batch norms, updated by the batches of all ranks in their order.

Each rank normalizes its batch by that batch alone, as one process does with each of the batches it
accumulates. That process updates the running statistics once for each batch, ``r * (1 - momentum)
+ added``. Here a rank keeps what each of its calls adds, which is what the layer makes of 0, and
all ranks then update theirs by what every rank has, one after the other. The device does so in its
turn; how often each layer was called, Python knows before.
"""

from __future__ import annotations

import types
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.operators import write_into
from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RUNNING = ("running_mean", "running_var")

_MOST_KINDS = 8
"""So many ways of being called are kept ready for the next time."""

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
        self.done = False
        """Nothing that a meeting needs to know."""
        self._alike: Dict[Any, List[_Alike]] = {}
        """The layers by how often each rank has called them, for what was called so far."""

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
            for each, old in zip(running, before):
                each.add_(old * (1.0 - layer.momentum))
        self._before.setdefault(id(layer), before)
        self._added.setdefault(id(layer), []).extend(added)
        return output

    def begin(self) -> None:
        """The step of a batch begins."""

    @property
    def body(self) -> bytes:
        """How often each layer was called in this round."""
        added = self._added
        calls = [len(added.get(id(layer), ())) // 2 for layer in self._layers]
        return np.array(calls, np.uint32).tobytes()

    def finish(self, bodies: Sequence[bytes]) -> None:
        """The step is over on all ranks, which have made these calls."""
        kinds = tuple((each.momentum, each.running_mean.dtype) for each in self._layers)
        key = (kinds, *bodies)
        if key not in self._alike:
            if len(self._alike) >= _MOST_KINDS:
                self._alike.clear()
            self._alike[key] = self._by_calls([np.frombuffer(each, np.uint32) for each in bodies])
        with flow.no_grad():
            for alike in self._alike[key]:
                alike.update(self._before, self._added)
        self._before.clear()
        self._added.clear()

    def _by_calls(self, by_rank: Sequence[np.ndarray]) -> List[_Alike]:
        groups: Dict[Any, List[Any]] = {}
        for layer, calls in zip(self._layers, np.stack(by_rank, axis=1).tolist()):
            if any(calls):
                groups.setdefault((layer.running_mean.dtype, tuple(calls)), []).append(layer)
        return [_Alike(self._meetings, group, key[1]) for key, group in groups.items()]


class _Alike:
    """Batch norms of one dtype that a rank has called ``calls`` times, each of them."""

    def __init__(self, meetings: Meetings, layers: Sequence[Any], calls: Tuple[int, ...]) -> None:
        self._meetings, self._layers, self._calls = meetings, layers, calls
        sizes = [int(layer.running_mean.numel()) for layer in layers for _ in _RUNNING]
        self._size = sum(sizes)
        dtype = layers[0].running_mean.dtype

        def new(size: int) -> Any:
            return flow.empty(size, dtype=dtype, device=meetings.device)

        numbers = max(calls) * self._size
        self._own, self._rows = new(numbers), new(meetings.size * numbers)
        self._views = flow.split(self._own, sizes * max(calls))
        self._now = new(self._size)
        self._views_now = flow.split(self._now, sizes)
        kept = [1.0 - layer.momentum for layer in layers for _ in _RUNNING]
        self._kept = flow.tensor(np.repeat(kept, sizes), dtype=dtype, device=meetings.device)

    def update(self, before: Dict[int, List[Any]], added: Dict[int, List[Any]]) -> None:
        """Let the layers' running statistics be what the calls of all ranks make of them."""
        device, tensors = self._meetings.device, [_running(layer) for layer in self._layers]
        views = iter(self._views)
        for call in range(self._calls[self._meetings.rank]):
            for layer in self._layers:
                for each in added[id(layer)][2 * call : 2 * call + 2]:
                    write_into(next(views), each.to(device))
        self._meetings.gather_into(self._rows, self._own)
        old = [before.get(id(layer), now) for layer, now in zip(self._layers, tensors)]
        for view, each in zip(self._views_now, _flat(old)):
            write_into(view, each.to(device))
        for rank, calls in enumerate(self._calls):
            first = rank * int(self._own.numel())
            for start in range(first, first + calls * self._size, self._size):
                self._now.mul_(self._kept).add_(self._rows[start : start + self._size])
        for view, each in zip(self._views_now, _flat(tensors)):
            write_into(each, view.to(each.device))
        others = sum(self._calls) - self._calls[self._meetings.rank]
        for layer in self._layers:
            if others and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(others)


def _running(layer: Any) -> List[Any]:
    return [getattr(layer, name) for name in _RUNNING]


def _flat(pairs: Sequence[Sequence[Any]]) -> List[Any]:
    return [each for pair in pairs for each in pair]


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
