"""Runs that are resumed, their rates measured from outside, and every schedule in closed form.

The loss is a sum of weights, so that its gradient is constant and an SGD step moves a weight by
its rate. What is expected is written out in this file, in closed forms: no schedule, plan or
calendar of the engine (or of OneFlow) is asked for it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import Callback, TaskModule, Trainer
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback
from ofengine.rates import WarmupLR

Closed = Callable[[float, int], float]
"""The rate of a group of this base rate at this position of a schedule, by hand."""
Rates = Dict[int, List[float]]
"""The rates of all groups by optimizer step."""

BATCHES, EPOCHS, SAVED_AT = 4, 3, 6
"""12 steps; the checkpoint is saved in the middle of the second epoch."""

GROUPS = (
    {"name": "stem", "lr": 0.5},
    {"name": "head", "lr": 0.3, "lr_scale": 0.5, "lr_decay_scale": 0.75},
)
EQUAL_GROUPS = (
    {"name": "stem", "lr": 0.5},
    {"name": "head", "lr": 0.5, "lr_scale": 0.5, "lr_decay_scale": 0.75},
)


class Line(TaskModule):
    """One weight for each group; the gradient of each is 1."""

    def __init__(
        self,
        schedule: Optional[Callable[[Any], Any]] = None,
        groups: Sequence[Dict[str, Any]] = GROUPS,
        scheduling: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.options = [dict(group) for group in groups]
        self.scheduling = dict(scheduling or {})
        for index in range(len(groups)):
            setattr(self, f"w{index}", nn.Parameter(flow.zeros(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("flat", 1.0)
        loss = batch.sum() * 0.0
        for index in range(len(self.options)):
            loss = loss + getattr(self, f"w{index}").sum()
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": [getattr(self, f"w{index}")], **options}
            for index, options in enumerate(self.options)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.1)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), **self.scheduling}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Meter(Callback):
    """Reads each step's rates off the weights, which it puts back to 0, then saves and acts."""

    fires_last = True

    def __init__(
        self, save: Optional[Path], save_at: int, changes: Dict[int, Tuple[str, float]]
    ) -> None:
        self.rates: Rates = {}
        self._save, self._save_at, self._changes = save, save_at, changes

    def on_train_batch_end(
        self, trainer: Trainer, task: Line, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        weights = [getattr(task, f"w{index}") for index in range(len(task.options))]
        moved = [-float(weight.numpy()[0]) for weight in weights]
        if any(moved):
            self.rates[trainer.global_step - 1] = moved
            if trainer.global_step in self._changes:
                trainer.set_lr(*self._changes[trainer.global_step])
        for weight in weights:
            weight.data.zero_()
        if self._save is not None and trainer.batches_seen == self._save_at:
            trainer.save_checkpoint(self._save)


def train(
    mode: str,
    task: TaskModule,
    data: Any = None,
    epochs: int = EPOCHS,
    save: Optional[Path] = None,
    save_at: int = SAVED_AT,
    ckpt: Optional[Path] = None,
    policy: str = "checkpoint",
    changes: Optional[Dict[int, Tuple[str, float]]] = None,
    every: int = 3,
    **arguments: Any,
) -> Rates:
    """The rates of each step of a run; a checkpoint is saved after ``save_at`` batches."""
    meter = Meter(save, save_at, changes or {})
    decay = [LRDecayCallback(every_n_batches=every), GraphLRScaleCallback(every_n_batches=every)]
    trainer = quiet_trainer(mode=mode, max_epochs=epochs, callbacks=[*decay, meter], **arguments)
    if data is None:
        data = [flow.zeros(1) for _ in range(BATCHES)]
    trainer.fit(task, data, ckpt_path=ckpt, rates_on_resume=policy)
    return meter.rates


def by_hand(
    closed: Closed,
    groups: Sequence[Dict[str, Any]] = GROUPS,
    lengths: Sequence[int] = (BATCHES,) * EPOCHS,
    every: int = 3,
    by_epoch: bool = False,
    accumulate: int = 1,
    changes: Optional[Dict[int, Tuple[str, float]]] = None,
) -> Rates:
    """``schedule * lr_scale * lr_decay_scale ** events`` for each step, by a loop over batches."""
    rates: Rates = {}
    lrs = {group["name"]: group["lr"] for group in groups}
    events = step = 0
    for epoch, length in enumerate(lengths):
        for first in range(0, length, accumulate):
            if changes and step in changes:
                name, lr = changes[step]
                lrs[name] = lr
            rates[step] = [
                closed(lrs[group["name"]], epoch if by_epoch else step)
                * group.get("lr_scale", 1.0)
                * group.get("lr_decay_scale", 1.0) ** events
                for group in groups
            ]
            step += 1
            window = range(first, min(first + accumulate, length))
            events += sum(batch % every == 0 for batch in window)
    return rates


def assert_close(ours: Rates, expected: Rates, steps: Sequence[int]) -> None:
    """Equal but for a few roundings to float32, at exactly these steps."""
    assert sorted(ours) == list(steps)
    for step in steps:
        np.testing.assert_allclose(ours[step], expected[step], rtol=1e-6, atol=1e-9, err_msg=step)


# ---------------------------------------------------------------------- schedules


class Kind(NamedTuple):
    make: Optional[Callable[[Any], Any]]
    closed: Closed
    groups: Sequence[Dict[str, Any]] = GROUPS
    scheduling: Optional[Dict[str, Any]] = None


def annealed(lr: float, position: int, length: int, low: float) -> float:
    return low + (lr - low) * (1 + math.cos(math.pi * position / length)) / 2


def _chain(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=7),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    ]
    return lr_scheduler.ChainedScheduler(parts)


def sequence(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.25, end_factor=1.0, total_iters=4),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4], interval_rescaling=True)


def _linear_warmup(optimizer: Any) -> Any:
    cosine = lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1)
    return lr_scheduler.WarmupLR(cosine, warmup_factor=0.2, warmup_iters=8)


def _own_warmup(optimizer: Any) -> Any:
    return WarmupLR(lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1), 0.2, 8)


def cosine_decay(lr: float, position: int) -> float:
    return annealed(lr, min(position, 12), 12, 0.1 * lr)


def _warmed_up(lr: float, position: int) -> float:
    if position >= 8:
        return cosine_decay(lr, position)
    return 0.2 * lr + (cosine_decay(lr, 8) - 0.2 * lr) * position / 8


def wave(position: int) -> float:
    return 1 / (1 + position) + position % 3


TABLE = [1.0, 0.5, 0.75, 0.25, 0.1, 0.3, 0.2, 0.9, 0.6]
KINDS = {
    "none": Kind(None, lambda lr, p: lr),
    "ConstantLR": Kind(
        lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=8),
        lambda lr, p: lr * (0.25 if p < 8 else 1),
    ),
    "LinearLR": Kind(
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, end_factor=0.9, total_iters=9),
        lambda lr, p: lr * (0.1 + 0.8 * min(p, 9) / 9),
    ),
    "StepLR": Kind(
        lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.3), lambda lr, p: lr * 0.3 ** (p // 4)
    ),
    "MultiStepLR": Kind(
        lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.3),
        lambda lr, p: lr * 0.3 ** ((p >= 2) + (p >= 7)),
    ),
    "ExponentialLR": Kind(
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8), lambda lr, p: lr * 0.8**p
    ),
    "PolynomialLR": Kind(
        lambda o: lr_scheduler.PolynomialLR(o, 20, end_learning_rate=0.01, power=2.0),
        lambda lr, p: (lr - 0.01) * (1 - p / 20) ** 2 + 0.01,
    ),
    "CosineDecayLR": Kind(
        lambda o: lr_scheduler.CosineDecayLR(o, decay_steps=12, alpha=0.1), cosine_decay
    ),
    "CosineAnnealingLR": Kind(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15, eta_min=0.02),
        lambda lr, p: annealed(lr, p, 15, 0.02),
    ),
    "CosineAnnealingWarmRestarts": Kind(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, eta_min=0.02),
        lambda lr, p: annealed(lr, p % 5, 5, 0.02),
    ),
    "LambdaLR": Kind(lambda o: lr_scheduler.LambdaLR(o, wave), lambda lr, p: lr * wave(p)),
    "ChainedScheduler": Kind(_chain, lambda lr, p: lr * (0.5 if p < 7 else 1) * 0.9**p),
    "SequentialLR": Kind(
        sequence, lambda lr, p: lr * ((0.25 + 0.75 * p / 4) if p < 4 else 0.8 ** (p - 4))
    ),
    "oneflow WarmupLR": Kind(_linear_warmup, _warmed_up, EQUAL_GROUPS),
    "ofengine WarmupLR": Kind(_own_warmup, _warmed_up),
    "function": Kind(lambda o: wave, lambda lr, p: lr * wave(p)),
    "table": Kind(lambda o: list(TABLE), lambda lr, p: lr * TABLE[min(p, 8)]),
    "one a group": Kind(
        lambda o: {"stem": lr_scheduler.ExponentialLR(o, gamma=0.8), "head": [0.9, 0.5, 0.1]},
        lambda lr, p: lr * (0.8**p if lr == 0.5 else [0.9, 0.5, 0.1][min(p, 2)]),
    ),
    "ReduceLROnPlateau": Kind(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        # The first metric is the best; each second one after it is one too many.
        lambda lr, p: lr * 0.5 ** (max(p - 1, 0) // 2),
        scheduling={"monitor": "flat", "interval": "step"},
    ),
}


def lines_of(caplog: pytest.LogCaptureFixture) -> List[str]:
    """What was logged about rates at the resume."""
    return [r.getMessage() for r in caplog.records if "its rate at step" in r.getMessage()]
