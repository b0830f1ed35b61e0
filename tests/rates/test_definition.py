"""The definition of a rate, measured from outside: by how much the weights move.

What is expected comes from ``rates_by_hand``: a training loop written out by hand, with OneFlow's
own scheduler stepped in it, or with a closed form of the schedule.
"""

from __future__ import annotations

from typing import Any, List

import numpy as np
import pytest
from helpers import OfUnknownLength, quiet_trainer
from measured_rates import (
    LAYERWISE,
    ConstantGradient,
    Measure,
    batches,
    check,
    measure,
    rates_by_hand,
)
from oneflow.optim import lr_scheduler

from ofengine import Callback, RateError, TaskModule, Trainer
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")


# ---------------------------------------------------------------------- constant rates


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
    assert not task.weight_0.numpy().any()


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
