"""Weighing: the weights of the batches in the accumulation window going on.

A window whose batches say what they weigh has the gradient ``sum(w * g) / sum(w)``. Both modes ask
the same object for both sums, so that they agree to the last bit.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Callable, Dict, List, Optional

import oneflow as flow

from ofengine.errors import ConfigurationError

_LEAST = 1e-37
"""What a window is divided by at least, that of weight 0, whose gradient is 0."""


def check_weight(weight: Any, task_name: str) -> None:
    """Raise :class:`ConfigurationError` where ``weight`` is none; a tensor's value is not read.

    A number has to be one from 0 on, a tensor to have one element.
    """
    if isinstance(weight, flow.Tensor):
        if weight.numel() != 1:
            raise ConfigurationError(
                f"{task_name}.training_step returned a weight of shape {tuple(weight.shape)}: "
                "reduce it to one number, for example with .sum()."
            )
        return
    number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:
        raise ConfigurationError(
            f"{task_name}.training_step returned the weight {weight!r}: give a number from 0 on, "
            "such as the tokens of the batch, or a tensor of one element."
        )


def weight_of(loss: Any, weight: Any) -> Any:
    """``weight``, which is one, as a tensor of no dimension; lazy ones too."""
    if isinstance(weight, flow.Tensor):
        weight = weight.detach().to(loss.dtype)
        return weight.reshape(()) if weight.dim() else weight
    return _number(float(weight), loss)


def _number(value: float, like: Any) -> Any:
    return flow.ones(1, dtype=like.dtype, device=like.device).reshape(()) * value


class Weighing:
    """What the batches of the open window weigh."""

    def __init__(self) -> None:
        self.batches = 0
        """How many of them have said so."""
        self._total: Any = None

    def add(self, weight: Any, batches: int = 1) -> None:
        """A batch of the window, or so many together, weighs so much."""
        self._total = weight if self._total is None else self._total + weight
        self.batches += batches

    def place(self, place: Callable[[Any], Any]) -> None:
        """Let the sum lie where the gradients do."""
        self._total = place(self._total)

    def close(self, gradients: List[Any], window: int, task_name: str) -> List[Any]:
        """The weighted mean of the window from its sums; a new one begins.

        Raises :class:`ConfigurationError` where some of its batches have said nothing.
        """
        total, batches = self._total, self.batches
        self._total, self.batches = None, 0
        if batches != window:
            raise ConfigurationError(
                f"{task_name}.training_step returned a weight for {batches} of the {window} "
                "batches of an accumulation window: return one for each, or for none."
            )
        total = total.clamp(min=_LEAST)
        return [None if each is None else each / total for each in gradients]

    def state(self) -> Optional[Dict[str, Any]]:
        """What a checkpoint keeps within a window; None where nothing was weighed."""
        if not self.batches:
            return None
        return {"batches": self.batches, "total": float(self._total.numpy())}

    def load(self, state: Optional[Dict[str, Any]], like: Any) -> None:
        """Go on from :meth:`state`; ``like`` is a parameter."""
        self.batches = 0 if state is None else state["batches"]
        self._total = None
        if state is not None:
            self._total = _number(state["total"], like)
