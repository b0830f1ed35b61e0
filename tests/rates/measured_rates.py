"""Rates measured from outside, by how much the weights move, and the same rates by hand.

With a loss whose gradient is a constant, SGD moves a weight by exactly rate * gradient. The
gradients here are powers of two, so that the product is exact and the rate can be read off.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, TaskModule, Trainer

Schedule = Callable[[Any], Any]
"""Makes a scheduler for an optimizer."""

LAYERWISE = [
    {"name": "stem", "lr": 0.1},
    {"name": "body", "lr": 0.01, "lr_scale": 0.3},
    {"name": "neck", "lr_scale": 0.7},
    {"name": "head", "lr_scale": 1.7, "lr_decay_scale": 0.9},
    {"name": "tail", "lr": 0.03, "lr_decay_scale": 0.5},
    {"name": "rest"},
]
"""Groups with all keys."""
RESET = 2
"""So many numbers of a weight are set back to 0 after each step; the others go on."""


class ConstantGradient(TaskModule):
    """One parameter for each group, and a loss whose gradient never changes."""

    def __init__(
        self,
        groups: Sequence[Dict[str, float]],
        schedule: Optional[Schedule] = None,
        scheduling: Optional[Dict[str, Any]] = None,
        default_lr: float = 0.25,
    ) -> None:
        super().__init__()
        self.options = [dict(group) for group in groups]
        self.gradients = [2.0 ** (2 * index - 1) for index in range(len(groups))]
        self.schedule = schedule
        self.scheduling = scheduling or {}
        self.default_lr = default_lr
        for index in range(len(groups)):
            setattr(self, f"weight_{index}", nn.Parameter(flow.zeros(5)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = batch.sum() * 0.0
        for index, gradient in enumerate(self.gradients):
            loss = loss + getattr(self, f"weight_{index}").sum() * gradient
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": [getattr(self, f"weight_{i}")], **options}
            for i, options in enumerate(self.options)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=self.default_lr)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), **self.scheduling}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Measure(Callback):
    """After each optimizer step: reads by how much the weights moved, sets the first two to 0."""

    def __init__(self) -> None:
        self.rates: List[List[float]] = []
        self.free: List[List[float]] = []
        self._steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, task: ConstantGradient, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        weights = [getattr(task, f"weight_{index}") for index in range(len(task.gradients))]
        arrays = [weight.numpy().copy() for weight in weights]
        moved = [array[:RESET] for array in arrays]
        if trainer.global_step == self._steps:
            assert not np.any(moved), "the weights moved without an optimizer step"
            return
        self._steps += 1
        assert trainer.global_step == self._steps
        for array in moved:
            assert (array == array[0]).all()
        self.rates.append([-float(a[0]) / g for a, g in zip(moved, task.gradients)])
        for array in arrays:
            assert (array[RESET:] == array[RESET]).all()
        self.free.append([float(array[RESET]) for array in arrays])
        for weight in weights:
            weight.data[:RESET] = 0


def rates_by_hand(
    task: ConstantGradient,
    epochs: Sequence[int],
    accumulate: int = 1,
    every_n_batches: int = 10,
    per_epoch: bool = True,
    key: str = "lr_decay_scale",
    max_steps: int = 10**9,
) -> Tuple[List[List[float]], List[List[Fraction]]]:
    """A loop over ``epochs`` (the batches of each) that steps, decays and schedules by hand.

    Returns, for each optimizer step and group, the rate as float32 arithmetic has it, and the
    definition ``schedule * lr_scale * lr_decay_scale ** events`` in exact arithmetic.
    """
    options = [{"lr": task.default_lr, **group} for group in task.options]
    optimizer = flow.optim.SGD(
        [{"params": [nn.Parameter(flow.zeros(1))], "lr": group["lr"]} for group in options]
    )
    scheduler = None if task.schedule is None else task.schedule(optimizer)
    interval = task.scheduling.get("interval", "step")
    frequency = task.scheduling.get("frequency", 1)
    decays = [group.get(key, 1.0) for group in options]
    scales = [1.0 if key == "lr_scale" else group.get("lr_scale", 1.0) for group in options]
    factors = [1.0 for _ in options]
    rounded: List[List[float]] = []
    exact: List[List[Fraction]] = []
    events = seen = epochs_done = 0
    for length in epochs:
        waiting: List[int] = []
        for batch in range(length):
            waiting.append(batch if per_epoch else seen)
            seen += 1
            if len(waiting) < accumulate and batch < length - 1:
                continue
            if len(rounded) == max_steps:
                return rounded, exact
            lrs = [group["lr"] for group in optimizer.param_groups]
            rounded.append(
                [
                    float(np.float32(lr * factor) * np.float32(scale))
                    for lr, factor, scale in zip(lrs, factors, scales)
                ]
            )
            scheduled = [group["lr"] for group in options] if scheduler is None else lrs
            exact.append(
                [
                    Fraction(lr) * Fraction(scale) * Fraction(decay) ** events
                    for lr, scale, decay in zip(scheduled, scales, decays)
                ]
            )
            if scheduler is not None and interval == "step" and len(rounded) % frequency == 0:
                scheduler.step()
            for index in waiting:
                if index % every_n_batches == 0:
                    events += 1
                    for i, decay in enumerate(decays):
                        if scheduler is None:  # as the cookbook: into the group itself
                            optimizer.param_groups[i]["lr"] *= decay
                        else:
                            factors[i] *= decay
            waiting = []
        epochs_done += 1
        if scheduler is not None and interval == "epoch" and epochs_done % frequency == 0:
            scheduler.step()
    return rounded, exact


def batches(count: int) -> List[Any]:
    return [flow.zeros(1) for _ in range(count)]


def measure(mode: str, task: ConstantGradient, data: Any, epochs: int, **arguments: Any) -> Measure:
    """Train ``task`` and measure the rates it was trained with."""
    meter = Measure()
    listed = [*arguments.pop("callbacks", []), meter]
    quiet_trainer(mode=mode, max_epochs=epochs, callbacks=listed, **arguments).fit(task, data)
    return meter


def check(meter: Measure, task: ConstantGradient, expected: Tuple[List[List[float]], Any]) -> None:
    """The measured rates are the expected ones, and the free weights moved by their sum."""
    rounded, exact = expected
    assert meter.rates == rounded
    for step, row in enumerate(exact):
        for group, value in enumerate(row):
            # two roundings to float32, and a few in float64
            error = abs(Fraction(meter.rates[step][group]) - value)
            assert error <= value * Fraction(2) ** -22, (step, group)
    weights = [np.float32(0) for _ in task.options]
    for row, free in zip(rounded, meter.free):
        weights = [
            weight - np.float32(rate) * np.float32(gradient)
            for weight, rate, gradient in zip(weights, row, task.gradients)
        ]
        assert free == [float(weight) for weight in weights]
