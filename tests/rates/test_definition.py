"""The definition of a rate, measured from outside: by how much the weights move.

With a loss whose gradient is a constant, SGD moves a weight by exactly rate * gradient. The
gradients here are powers of two, so that the product is exact and the rate can be read off.
What is expected comes from ``rates_by_hand`` below: a training loop written out by hand, with
OneFlow's own scheduler stepped in it, or with a closed form of the schedule.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, OfUnknownLength, quiet_trainer
from hypothesis import Phase, given, settings, strategies as st
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import Callback, RateError, TaskModule, Trainer
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")

Schedule = Callable[[Any], Any]
"""Makes a scheduler for an optimizer."""


class ConstantGradient(TaskModule):
    """Two parameters for each group, and a loss whose gradient never changes."""

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
            setattr(self, f"reset_{index}", nn.Parameter(flow.zeros(2)))
            setattr(self, f"free_{index}", nn.Parameter(flow.zeros(3)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = batch.sum() * 0.0
        for index, gradient in enumerate(self.gradients):
            reset, free = getattr(self, f"reset_{index}"), getattr(self, f"free_{index}")
            loss = loss + reset.sum() * gradient + free.sum() * -gradient
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": [getattr(self, f"reset_{i}"), getattr(self, f"free_{i}")], **options}
            for i, options in enumerate(self.options)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=self.default_lr)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), **self.scheduling}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Measure(Callback):
    """After each optimizer step: reads by how much the weights moved, sets one half to 0."""

    def __init__(self) -> None:
        self.rates: List[List[float]] = []
        self.free: List[List[float]] = []
        self._steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, task: ConstantGradient, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        indices = range(len(task.gradients))
        moved = [getattr(task, f"reset_{index}").numpy().copy() for index in indices]
        if trainer.global_step == self._steps:
            assert not np.any(moved), "the weights moved without an optimizer step"
            return
        self._steps += 1
        assert trainer.global_step == self._steps
        for array in moved:
            assert (array == array[0]).all()
        self.rates.append([-float(a[0]) / g for a, g in zip(moved, task.gradients)])
        self.free.append([float(getattr(task, f"free_{i}").numpy()[1]) for i in indices])
        for index in indices:
            getattr(task, f"reset_{index}").data.zero_()


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
            weight + np.float32(rate) * np.float32(gradient)
            for weight, rate, gradient in zip(weights, row, task.gradients)
        ]
        assert free == [float(weight) for weight in weights]


# ---------------------------------------------------------------------- constant rates

LAYERWISE = [
    {"name": "stem", "lr": 0.1},
    {"name": "body", "lr": 0.01, "lr_scale": 0.3},
    {"name": "neck", "lr_scale": 0.7},
    {"name": "head", "lr_scale": 1.7, "lr_decay_scale": 0.9},
    {"name": "tail", "lr": 0.03, "lr_decay_scale": 0.5},
    {"name": "rest"},
]


def test_rates_of_groups_without_any_extra_key(mode: str) -> None:
    """A group's ``lr``, or the optimizer's default where it has none."""
    task = ConstantGradient([{"lr": 0.1}, {}, {"lr": 1e-3}], default_lr=0.003)
    meter = measure(mode, task, batches(4), 2)
    assert meter.rates == [[float(np.float32(lr)) for lr in (0.1, 0.003, 1e-3)]] * 8
    check(meter, task, rates_by_hand(task, [4, 4]))


def test_lr_scale_multiplies_the_rate(mode: str) -> None:
    """``lr_scale`` acts in both modes, with a group's own ``lr`` and with the default."""
    groups = [{"lr": 0.5, "lr_scale": 0.25}, {"lr_scale": 0.5}, {"lr": 2.0, "lr_scale": 0.0}]
    task = ConstantGradient(groups, default_lr=8.0)
    meter = measure(mode, task, batches(3), 1)
    assert meter.rates == [[0.125, 4.0, 0.0]] * 3
    check(meter, task, rates_by_hand(task, [3]))


def test_a_rate_of_zero_moves_nothing(mode: str) -> None:
    """``lr=0`` is allowed, and the weights of that group stay."""
    task = ConstantGradient([{"lr": 0.0}, {"lr": 0.5}])
    meter = measure(mode, task, batches(3), 1)
    assert meter.rates == [[0.0, 0.5]] * 3


# ---------------------------------------------------------------------- decay


def test_decay_follows_batches_0_and_10_without_any_callback_listed(mode: str) -> None:
    """A group that declares ``lr_decay_scale`` is not ignored: an event every 10 batches."""
    task = ConstantGradient([{"lr": 1.0, "lr_decay_scale": 0.5}, {"lr": 1.0}])
    meter = measure(mode, task, batches(12), 2)
    decayed = [1.0] + [0.5] * 10 + [0.25] + [0.25] + [0.125] * 10 + [0.0625]
    assert meter.rates == [[rate, 1.0] for rate in decayed]


@pytest.mark.parametrize("per_epoch", [True, False])
@pytest.mark.parametrize("every_n_batches", [1, 3])
def test_layerwise_rates_and_decay(mode: str, every_n_batches: int, per_epoch: bool) -> None:
    """All keys together, counted in each epoch or over the run."""
    task = ConstantGradient(LAYERWISE)
    decay = LRDecayCallback(every_n_batches=every_n_batches, per_epoch=per_epoch)
    meter = measure(mode, task, batches(7), 3, callbacks=[decay])
    check(meter, task, rates_by_hand(task, [7] * 3, 1, every_n_batches, per_epoch))


@pytest.mark.parametrize("accumulate, length", [(2, 7), (3, 8), (4, 3)])
@pytest.mark.parametrize("per_epoch", [True, False])
def test_decay_with_accumulation(mode: str, accumulate: int, length: int, per_epoch: bool) -> None:
    """An event follows the optimizer step that its batch is part of, in cut-short windows too."""
    task = ConstantGradient(LAYERWISE)
    decay = LRDecayCallback(every_n_batches=3, per_epoch=per_epoch)
    meter = measure(
        mode, task, batches(length), 3, callbacks=[decay], accumulate_grad_batches=accumulate
    )
    check(meter, task, rates_by_hand(task, [length] * 3, accumulate, 3, per_epoch))


def test_key_lr_scale_is_the_cookbook_s_decay(mode: str) -> None:
    """With ``key="lr_scale"`` that key is the factor of decay events and no multiplier."""
    task = ConstantGradient([{"lr": 1e-3, "lr_scale": 0.9}, {"lr": 1e-4, "lr_scale": 0.8}])
    decay = LRDecayCallback(every_n_batches=2, key="lr_scale")
    meter = measure(mode, task, batches(5), 2, callbacks=[decay])
    assert meter.rates[0] == [float(np.float32(1e-3)), float(np.float32(1e-4))]
    check(meter, task, rates_by_hand(task, [5, 5], every_n_batches=2, key="lr_scale"))


@pytest.mark.parametrize("listed", ["eager's", "graph's", "both"])
def test_either_callback_of_the_pair_tells_both_modes(mode: str, listed: str) -> None:
    """The pair is over one plan: what one of them says holds in the other's mode too."""
    callbacks: List[Callback] = []
    if listed != "graph's":
        callbacks.append(LRDecayCallback(every_n_batches=2))
    if listed != "eager's":
        callbacks.append(GraphLRScaleCallback(every_n_batches=2))
    task = ConstantGradient([{"lr": 1.0, "lr_decay_scale": 0.5}])
    meter = measure(mode, task, batches(5), 1, callbacks=callbacks)
    assert meter.rates == [[1.0], [0.5], [0.5], [0.25], [0.25]]


def test_a_pair_that_disagrees_is_refused(mode: str) -> None:
    """Two callbacks that say different things about decay are an error before training."""
    task = ConstantGradient([{"lr": 1.0, "lr_decay_scale": 0.5}])
    pair = [LRDecayCallback(every_n_batches=2), GraphLRScaleCallback(every_n_batches=3)]
    with pytest.raises(RateError, match="disagree"):
        measure(mode, task, batches(2), 1, callbacks=pair)
    assert not task.reset_0.numpy().any()


def test_lr_written_by_hand_during_training_is_refused() -> None:
    """In eager mode a hand on ``lr`` is an error, where graph mode would not see it at all."""

    class Meddler(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.optimizer.param_groups[0]["lr"] = 7.0

    task = ConstantGradient([{"name": "stem", "lr": 1.0}])
    with pytest.raises(RateError, match=r"'stem'.*from 1 to 7"):
        quiet_trainer(max_epochs=2, callbacks=[Meddler()]).fit(task, batches(2))


# ---------------------------------------------------------------------- epochs of unequal length


UNEQUAL_EPOCHS = [[6, 5, 3, 3, 2], [2, 3, 7, 3]]
"""The number of batches in each epoch: ever fewer, and at times more than in the first."""


@pytest.mark.parametrize("lengths", UNEQUAL_EPOCHS, ids=["shorter", "longer"])
@pytest.mark.parametrize("per_epoch", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_of_unknown_and_unequal_length(
    mode: str, per_epoch: bool, accumulate: int, lengths: List[int]
) -> None:
    """Decay events stay where the definition puts them when each epoch is another length."""
    task = ConstantGradient(LAYERWISE)
    data = OfUnknownLength(*[batches(length) for length in lengths])
    decay = LRDecayCallback(every_n_batches=3, per_epoch=per_epoch)
    meter = measure(
        mode, task, data, len(lengths), callbacks=[decay], accumulate_grad_batches=accumulate
    )
    check(meter, task, rates_by_hand(task, lengths, accumulate, 3, per_epoch))


@pytest.mark.parametrize("lengths", UNEQUAL_EPOCHS, ids=["shorter", "longer"])
def test_schedule_by_epochs_of_unknown_length(mode: str, lengths: List[int]) -> None:
    """``interval="epoch"`` counts the epochs as they really end."""
    schedule = {"interval": "epoch"}
    task = ConstantGradient(
        LAYERWISE, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.7), schedule
    )
    data = OfUnknownLength(*[batches(length) for length in lengths])
    meter = measure(mode, task, data, len(lengths))
    check(meter, task, rates_by_hand(task, lengths))


def test_limited_batches_make_the_epoch(mode: str) -> None:
    """``limit_train_batches`` shortens the epoch that decay is counted in."""
    task = ConstantGradient([{"lr": 1.0, "lr_decay_scale": 0.5}])
    meter = measure(mode, task, batches(9), 2, limit_train_batches=2)
    assert meter.rates == [[1.0], [0.5], [0.5], [0.25]]


def test_max_steps_ends_in_the_middle_of_an_epoch(mode: str) -> None:
    """A run that ends early has had the rates of its steps, and can be followed by another."""
    task = ConstantGradient(LAYERWISE)
    meter = measure(mode, task, batches(4), -1, max_steps=6)
    assert len(meter.rates) == 6
    check(meter, task, rates_by_hand(task, [4, 4], max_steps=6))


def test_a_second_fit_starts_the_rates_anew(mode: str) -> None:
    """``fit`` twice with one Trainer and one task: both have the rates from step 0 on."""
    task = ConstantGradient(
        LAYERWISE, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6)
    )
    expected, _ = rates_by_hand(task, [4])
    meter = Measure()
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[meter])
    trainer.fit(task, batches(4))
    meter._steps = 0
    trainer.fit(task, batches(4))
    assert meter.rates == expected * 2


# ---------------------------------------------------------------------- schedules


def _warm_restarts(lr: float, t: int) -> float:
    start, length = (0, 3) if t < 3 else (3, 6) if t < 9 else (9, 12)
    return 0.001 + (lr - 0.001) * 0.5 * (1 + math.cos(math.pi * (t - start) / length))


def _polynomial(lr: float, t: int) -> float:
    return (lr - 0.001) * (1 - min(t, 6) / 6) ** 2 + 0.001


SCHEDULES: Dict[str, Tuple[Schedule, Callable[[float, int], float]]] = {
    "StepLR": (
        lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
        lambda lr, t: lr * 0.3 ** (t // 3),
    ),
    "MultiStepLR": (
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.3),
        lambda lr, t: lr * 0.3 ** ((t >= 2) + (t >= 5)),
    ),
    "ExponentialLR": (
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.93),
        lambda lr, t: lr * 0.93**t,
    ),
    "CosineAnnealingLR": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=0.002),
        lambda lr, t: 0.002 + (lr - 0.002) * (1 + math.cos(math.pi * t / 6)) / 2,
    ),
    "CosineDecayLR": (
        lambda o: lr_scheduler.CosineDecayLR(o, decay_steps=5, alpha=0.1),
        lambda lr, t: lr * (0.9 * (1 + math.cos(math.pi * min(t, 5) / 5)) / 2 + 0.1),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2, eta_min=0.001),
        _warm_restarts,
    ),
    "PolynomialLR": (
        lambda o: lr_scheduler.PolynomialLR(o, decay_batch=6, end_learning_rate=0.001, power=2.0),
        _polynomial,
    ),
    "ConstantLR": (
        lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4),
        lambda lr, t: lr * (0.3 if t < 4 else 1),
    ),
    "LinearLR": (
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=0.9, total_iters=5),
        lambda lr, t: lr * (0.2 + 0.7 * min(t, 5) / 5),
    ),
    "LambdaLR": (
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda lr, t: lr / (1 + t),
    ),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3),
                lr_scheduler.ExponentialLR(o, gamma=0.9),
            ]
        ),
        lambda lr, t: lr * (0.1 if t < 3 else 1) * 0.9**t,
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
                lr_scheduler.ExponentialLR(o, gamma=0.8),
            ],
            milestones=[4],
            interval_rescaling=True,
        ),
        lambda lr, t: lr * (0.25 + 0.75 * t / 4) if t < 4 else lr * 0.8 ** (t - 4),
    ),
    "WarmUpLR": (
        lambda o: lr_scheduler.WarmUpLR(o, warmup_factor=0.5, warmup_iters=4),
        lambda lr, t: lr * (0.5 + 0.5 * min(t, 4) / 4),
    ),
    "constant WarmUpLR over cosine": (
        lambda o: lr_scheduler.WarmUpLR(
            lr_scheduler.CosineAnnealingLR(o, T_max=8),
            warmup_factor=0.5,
            warmup_iters=2,
            warmup_method="constant",
        ),
        lambda lr, t: lr * (0.5 if t < 2 else (1 + math.cos(math.pi * t / 8)) / 2),
    ),
    "linear WarmUpLR before cosine": (
        lambda o: lr_scheduler.WarmUpLR(
            lr_scheduler.CosineAnnealingLR(o, T_max=8),
            warmup_factor=0.5,
            warmup_iters=3,
            warmup_prefix=True,
        ),
        lambda lr, t: (
            lr * (0.5 + 0.5 * t / 3 if t < 3 else (1 + math.cos(math.pi * (t - 3) / 8)) / 2)
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_with_layerwise_rates_and_decay(mode: str, name: str) -> None:
    """schedule(lr) * lr_scale * lr_decay_scale ** events, for each of OneFlow's schedulers.

    LambdaLR and ChainedScheduler too, which OneFlow's own graphs refuse.
    """
    schedule, closed_form = SCHEDULES[name]
    task = ConstantGradient(LAYERWISE, schedule)
    decay = LRDecayCallback(every_n_batches=4)
    meter = measure(mode, task, batches(6), 2, callbacks=[decay])
    check(meter, task, rates_by_hand(task, [6, 6], every_n_batches=4))
    events_before = [0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]
    for t, events in enumerate(events_before):
        for group, options in enumerate(task.options):
            rate = closed_form(options.get("lr", 0.25), t) * options.get("lr_scale", 1)
            rate *= options.get("lr_decay_scale", 1) ** events
            assert meter.rates[t][group] == pytest.approx(rate, rel=1e-6, abs=1e-12), (t, group)


def test_lr_scale_scales_the_floor_of_a_schedule_too(mode: str) -> None:
    """``lr_scale`` comes after the schedule: ``eta_min`` is scaled with the rest."""
    task = ConstantGradient(
        [{"lr": 1.0, "lr_scale": 0.5}, {"lr": 1.0}],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=0.25),
    )
    meter = measure(mode, task, batches(5), 1)
    assert meter.rates[4] == [0.125, 0.25]


class OneSchedulePerGroup(lr_scheduler.LambdaLR):
    """A user's own subclass, with state of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.memory: List[int] = []
        super().__init__(optimizer, [lambda t: 0.5**t, lambda t: float(t % 3)])

    def step(self) -> None:
        super().step()
        self.memory.append(self.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1 + len(self.memory)


def test_a_schedule_of_the_user_s_own_and_one_per_group(mode: str) -> None:
    """Any deterministic scheduler works, a subclass that remembers its steps too."""
    task = ConstantGradient([{"lr": 1.0}, {"lr": 0.5, "lr_scale": 0.5}], OneSchedulePerGroup)
    meter = measure(mode, task, batches(5), 1)
    first = [0.5**t * (2 + t) for t in range(5)]
    second = [0.5 * (t % 3) * (2 + t) * 0.5 for t in range(5)]
    assert meter.rates == [list(pair) for pair in zip(first, second)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_interval_and_frequency(mode: str, interval: str, frequency: int) -> None:
    """The schedule moves on by one every ``frequency`` steps or epochs."""
    task = ConstantGradient(
        [{"lr": 1.0}, {"lr": 1.0, "lr_scale": 0.25}],
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5),
        {"interval": interval, "frequency": frequency},
    )
    meter = measure(mode, task, batches(3), 4, accumulate_grad_batches=2)
    steps = range(8)  # two in each epoch
    moved = [(t if interval == "step" else t // 2) // frequency for t in steps]
    assert meter.rates == [[0.5**k, 0.25 * 0.5**k] for k in moved]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedule_decay_and_accumulation_together(mode: str, interval: str) -> None:
    """Everything at once, with epochs of another length each time."""
    lengths = [5, 7, 4]
    task = ConstantGradient(
        LAYERWISE,
        lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
        {"interval": interval, "frequency": 2},
    )
    data = OfUnknownLength(*[batches(length) for length in lengths])
    decay = LRDecayCallback(every_n_batches=2, per_epoch=False)
    meter = measure(mode, task, data, 3, callbacks=[decay], accumulate_grad_batches=2)
    check(meter, task, rates_by_hand(task, lengths, 2, 2, per_epoch=False))


# ---------------------------------------------------------------------- anything together

RUNS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "known": st.booleans(),
        "accumulate": st.sampled_from([1, 2, 4]),
        "every": st.integers(1, 5),
        "per_epoch": st.booleans(),
        "key": st.sampled_from(["lr_decay_scale", "lr_scale"]),
        "schedule": st.sampled_from([None, *SCHEDULES]),
        "interval": st.sampled_from(["step", "epoch"]),
        "frequency": st.integers(1, 3),
        "groups": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "lr": st.floats(1e-6, 10),
                    "lr_scale": st.floats(0.01, 4),
                    "lr_decay_scale": st.floats(0.1, 1.5),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    }
)


def _run_and_check(mode: str, run: Dict[str, Any]) -> None:
    lengths = run["lengths"]
    if run["known"]:
        lengths = [lengths[0]] * len(lengths)
        data: Any = batches(lengths[0])
    else:
        data = OfUnknownLength(*[batches(length) for length in lengths])
    schedule = None if run["schedule"] is None else SCHEDULES[run["schedule"]][0]
    scheduling = {"interval": run["interval"], "frequency": run["frequency"]}
    task = ConstantGradient(run["groups"], schedule, scheduling)
    decay = LRDecayCallback(run["every"], run["per_epoch"], run["key"])
    meter = measure(
        mode,
        task,
        data,
        len(lengths),
        callbacks=[decay],
        accumulate_grad_batches=run["accumulate"],
    )
    expected = rates_by_hand(
        task, lengths, run["accumulate"], run["every"], run["per_epoch"], run["key"]
    )
    check(meter, task, expected)


@settings(max_examples=60)
@given(run=RUNS)
def test_any_combination_in_eager_mode(run: Dict[str, Any]) -> None:
    """The definition holds for whatever groups, schedules, windows and epochs are combined."""
    _run_and_check("eager", run)


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(run=RUNS)
def test_any_combination_in_graph_mode(run: Dict[str, Any]) -> None:
    """As above, compiled."""
    _run_and_check("graph", run)


def test_both_modes_are_tested() -> None:
    """The ``mode`` fixture runs over all modes there are."""
    assert MODES == ("eager", "graph")
