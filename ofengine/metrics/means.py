"""Mean and MeanSquaredError: means over an epoch, in float64."""

from __future__ import annotations

import math
from typing import Any, Dict, Tuple

import oneflow as flow

from ofengine.data.structure import describe
from ofengine.errors import ConfigurationError, GraphModeError
from ofengine.metrics.base import Metric, State
from ofengine.tracing import active_trace


class Mean(Metric):
    """The weighted mean of numbers: ``update(value, weight=1)``.

    ``value`` is a tensor of any shape, or a number; ``weight`` a tensor of that shape, or one
    number for all. A mean over tokens is ``update(mean_of_batch, weight=tokens_in_batch)``.
    """

    def __init__(self) -> None:
        super().__init__()

    def sums(self, value: Any, weight: Any = 1) -> Dict[str, Any]:
        """The sum of value times weight, and that of the weights."""
        value = _tensor(value)
        if not isinstance(weight, flow.Tensor):
            weights = value.new_zeros((1,)) + weight * value.numel()
        elif weight.numel() == 1:
            weight = weight.reshape(()).to(flow.float64)
            weights = weight * value.numel()
        elif tuple(weight.shape) == tuple(value.shape):
            weight = weight.to(flow.float64)
            weights = weight.sum()
        else:
            raise ConfigurationError(
                f"Mean.update got a weight of shape {tuple(weight.shape)} for a value of shape "
                f"{tuple(value.shape)}: give one of its shape, or one number."
            )
        return {"sums": flow.cat([(value * weight).sum().reshape(1), weights.reshape(1)], dim=0)}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        return {"sums": ("f", (2,))}

    def value(self, state: State) -> float:
        """The mean; NaN where all weights are 0."""
        return _quotient(state)


class MeanSquaredError(Metric):
    """The mean of ``(prediction - target) ** 2`` over all numbers: ``update(prediction, target)``.

    Args:
        squared: False for its square root, the RMSE.

    Both are tensors of one shape; with another one, such as (N, 1) against (N,), they would be
    broadcast, and each be compared with all.
    """

    def __init__(self, squared: bool = True) -> None:
        self.squared = squared

    def sums(self, prediction: Any, target: Any) -> Dict[str, Any]:
        """The sum of squared errors, and how many."""
        if tuple(prediction.shape) != tuple(target.shape):
            raise ConfigurationError(
                f"MeanSquaredError.update got predictions of shape {tuple(prediction.shape)} and "
                f"targets of shape {tuple(target.shape)}: give both the same, for example with "
                ".reshape(target.shape)."
            )
        error = prediction.to(flow.float64) - target.to(flow.float64)
        count = error.new_zeros((1,)) + error.numel()
        return {"sums": flow.cat([(error * error).sum().reshape(1), count], dim=0)}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        return {"sums": ("f", (2,))}

    def value(self, state: State) -> float:
        """The mean, or its square root."""
        mean = _quotient(state)
        return mean if self.squared else math.sqrt(mean)


def _quotient(state: State) -> float:
    total, weights = map(float, state["sums"])
    return total / weights if weights else math.nan


def _tensor(value: Any) -> Any:
    """``value`` in float64, a number as a tensor."""
    if isinstance(value, flow.Tensor):
        return value.to(flow.float64)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"Mean.update got {describe(value)}: give a tensor or a number."
        ) from None
    if active_trace() is not None:
        raise GraphModeError(
            f"Mean.update({value!r}) in a compiled step would add this number in every step: give "
            "a tensor, or update it in on_train_batch_end."
        )
    return flow.tensor(number, dtype=flow.float64)
