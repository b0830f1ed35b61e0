"""Batch norms that normalize by the batches of all ranks, as one process does with a larger batch.

In a step each call exchanges its batch's count, mean and squares, and its backward pass the sums
that the gradient needs; all ranks put them together in float64 in the order of ranks. A rank that
has no batch in a round is asked for none, and updates its running statistics with the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any, List, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.autograd import Function

from ofengine.errors import RankError
from ofengine.ranks.meetings import Meetings
from ofengine.ranks.statistics import (
    KINDS,
    refuse_average,
    replace_forward,
    running_of,
    updated,
    write,
)

_batch_norm = nn.functional.batch_norm
_OTHERS = (nn.SyncBatchNorm, nn.FusedBatchNorm1d, nn.FusedBatchNorm2d, nn.FusedBatchNorm3d)


class SyncedNorms:
    """The batch norms of a task that several ranks train with ``sync_batchnorm``.

    Args:
        meetings: this rank's end of the exchange.
        task: whose batch norms are synchronized in steps until :meth:`close`.

    Raises:
        RankError: a layer averages over all batches, with ``momentum=None``, or is of another kind.
    """

    def __init__(self, meetings: Meetings, task: nn.Module) -> None:
        self._meetings = meetings
        self._layers = norms_of(task)
        self._in_step = False
        for number, layer in enumerate(self._layers):
            of_all = _function(self, number, layer)
            replace_forward(layer, partial(self._call, of_all))
        meetings.serve_statistics = self._update
        self.body = b""
        """Nothing that the others need to know at the end of a step."""

    def close(self) -> None:
        """Let go of the layers."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        self._layers.clear()

    def begin(self) -> None:
        """The step of a batch begins."""
        self._in_step = True

    @property
    def done(self) -> bool:
        """True where this rank has a batch in this round, so that others need not wait for it."""
        return self._in_step

    def finish(self, bodies: Sequence[bytes]) -> None:
        """The step is over on all ranks."""
        self._in_step = False

    def _call(self, of_all: Any, layer: Any, forward: Any, x: Any) -> Any:
        if not self._in_step or not layer.training:
            return forward(x)
        layer._check_input_dim(x)
        weight, bias = layer.weight, layer.bias
        if weight is None:
            weight, bias = x.new_ones(x.shape[1]), x.new_zeros((x.shape[1],))
        return of_all.apply(x, weight, bias)

    def statistics(self, number: int, x: Any) -> Tuple[np.ndarray, np.ndarray, float]:
        """Of each channel the mean and the variance over all ranks; how many numbers it has."""
        channels = x.shape[1]
        count = x.numel() // channels
        mean, variance = x.new_zeros((channels,)), x.new_zeros((channels,))
        ones = x.new_ones(channels)
        # With this momentum the running statistics become those of the batch.
        _batch_norm(x, mean, variance, ones, ones, True, 1.0, 1.0)
        squares = np.zeros(channels) if count == 1 else variance.numpy() * np.float64(count - 1)
        own = np.concatenate([[float(count)], mean.numpy().astype(np.float64), squares])
        rows = self._meetings.statistics(own, 1 + 2 * number)
        self._update(1 + 2 * number, rows)
        return _together(rows, channels)

    def gradients(self, number: int, own: np.ndarray) -> np.ndarray:
        """``own`` of all ranks, added in their order."""
        total: np.ndarray = np.add.reduce(self._meetings.statistics(own, 2 + 2 * number))
        return total

    def _update(self, of: int, rows: np.ndarray) -> None:
        """Update the running statistics by what all ranks sent, where it is of a forward pass."""
        layer = self._layers[(of - 1) // 2]
        if of % 2 == 0 or layer.running_mean is None:
            return
        mean, variance, count = _together(rows, int(layer.num_features))
        now, momentum = running_of(layer), layer.momentum
        unbiased = variance * count / max(count - 1.0, 1.0)
        added = [(momentum * each).astype(now[0].dtype) for each in (mean, unbiased)]
        write(layer, updated(now, (added[0], added[1]), momentum))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)


def norms_of(task: nn.Module) -> List[Any]:
    """The batch norms of ``task``.

    Raises :class:`RankError` for one that is not synchronized.
    """
    layers = []
    for name, module in task.named_modules():
        if not isinstance(module, (*KINDS, *_OTHERS)):
            continue
        where = f"{type(task).__name__}.{name}"
        if type(module).forward is not nn.BatchNorm2d.forward or "forward" in vars(module):
            raise RankError(
                f"sync_batchnorm computes nn.BatchNorm1d, 2d and 3d, and {where} is a "
                f"{type(module).__name__} with a forward of its own: use one of these."
            )
        refuse_average(task, name, module)
        layers.append(module)
    return layers


def _together(rows: np.ndarray, channels: int) -> Tuple[np.ndarray, np.ndarray, float]:
    """Mean, variance and count of what the batches of all ``rows`` are together."""
    counts, means = rows[:, :1], rows[:, 1 : 1 + channels]
    squares = rows[:, 1 + channels : 1 + 2 * channels]
    count = float(counts.sum())
    mean = np.add.reduce(counts * means) / count
    total = np.add.reduce(squares + counts * (means - mean) ** 2)
    return mean, total / count, count


def _function(norms: SyncedNorms, number: int, layer: Any) -> Any:
    """The function of the input, the weight and the bias of ``layer`` that all ranks compute."""

    class Synced(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
            mean, variance, count = norms.statistics(number, x)
            of_all = [
                flow.tensor(each, dtype=x.dtype, device=x.device) for each in (mean, variance)
            ]
            ctx.save_for_backward(x, weight, *of_all, flow.tensor(count, dtype=flow.float64))
            return _batch_norm(x, *of_all, weight, bias, False, 0.0, layer.eps)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, weight, mean, variance, count = ctx.saved_tensors
            channels = x.shape[1]
            zeros, ones = x.new_zeros((channels,)), x.new_ones(channels)
            centred = _batch_norm(x, mean, variance, ones, zeros, False, 0.0, layer.eps)
            others = [0, *range(2, x.dim())]
            of_bias, of_weight = gradient.sum(dim=others), (gradient * centred).sum(dim=others)
            own = np.concatenate([of_bias.numpy(), of_weight.numpy()]).astype(np.float64)
            means = flow.tensor(
                norms.gradients(number, own) / count.numpy(), dtype=x.dtype, device=x.device
            )
            shape = (1, channels, *([1] * (x.dim() - 2)))
            scale = (weight / (variance + layer.eps).sqrt()).reshape(shape)
            rest = gradient - means[:channels].reshape(shape)
            of_x = (rest - centred * means[channels:].reshape(shape)) * scale
            return of_x, of_weight, of_bias

    return Synced
