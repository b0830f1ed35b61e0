"""LearningRateMonitor: the logged rates are the ones of the definition, in both modes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, CheckpointError, ConfigurationError, TaskModule
from ofengine.callbacks import LearningRateMonitor, LRDecayCallback
from ofengine.loggers import Logger

LR = 0.125
SCALE = 0.25
FACTOR = 0.5


class Records(Logger):
    """Keeps the rates that it is sent, with their step."""

    def __init__(self) -> None:
        self.rates: List[Tuple[int, Dict[str, float]]] = []

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        rates = {name: value for name, value in metrics.items() if name.startswith("lr/")}
        if rates:
            self.rates.append((step, rates))


class TwoGroups(TaskModule):
    """A "body" with ``lr_scale``, a "head" with ``lr_decay_scale``, a cosine over 10 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.body(batch)).pow(2).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"name": "body", "params": self.body.parameters(), "lr": LR, "lr_scale": SCALE},
            {"name": "head", "params": self.head.parameters(), "lr": LR, "lr_decay_scale": FACTOR},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=LR)
        cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": cosine}


def cosine(step: int) -> float:
    return LR * (1 + math.cos(math.pi * step / 10)) / 2


def batches(count: int) -> List[Any]:
    return [flow.ones(3, 2)] * count


def fitted(monitor: LearningRateMonitor, count: int, **arguments: Any) -> Records:
    records = Records()
    decay = LRDecayCallback(every_n_batches=2)
    trainer = quiet_trainer(callbacks=[decay, monitor], logger=records, **arguments)
    trainer.fit(TwoGroups(), batches(count))
    return records


def check(records: Records, steps: List[int], decays: Callable[[int], int]) -> None:
    """``steps`` were logged, each with the closed form of the step made last."""
    assert [step for step, _ in records.rates] == steps
    for step, rates in records.rates:
        assert list(rates) == ["lr/body", "lr/head"]
        last = step - 1
        assert rates["lr/body"] == pytest.approx(cosine(last) * SCALE, rel=1e-6)
        assert rates["lr/head"] == pytest.approx(cosine(last) * FACTOR ** decays(last), rel=1e-6)


def test_every_n_steps_it_logs_the_rates_that_the_last_step_used(mode: str) -> None:
    records = fitted(LearningRateMonitor(), 4, mode=mode, max_epochs=2, log_every_n_steps=3)
    # Decay follows the batches 0 and 2 of the four of an epoch.
    check(records, [3, 6], lambda step: 2 * (step // 4) + [0, 1, 1, 2][step % 4])


def test_by_epoch_it_logs_the_rates_of_each_epochs_last_step() -> None:
    records = fitted(LearningRateMonitor("epoch"), 3, max_epochs=3, log_every_n_steps=1)
    check(records, [3, 6, 9], lambda step: 2 * (step // 3) + [0, 1, 1][step % 3])


def test_steps_are_the_optimizers_where_gradients_are_accumulated() -> None:
    records = fitted(
        LearningRateMonitor("step"), 5, max_epochs=1, log_every_n_steps=1, accumulate_grad_batches=2
    )
    # Windows of the batches (0, 1), (2, 3), (4): before step t, 2t batches were made, with an
    # event after each even one.
    check(records, [1, 2, 3], lambda step: step)


def test_without_a_logger_the_rates_are_in_callback_metrics() -> None:
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1, callbacks=LearningRateMonitor())
    trainer.fit(TwoGroups(), batches(3))
    assert trainer.callback_metrics["lr/body"] == pytest.approx(cosine(2) * SCALE, rel=1e-6)


def test_the_rates_used_are_logged_after_another_callback_has_set_new_ones(mode: str) -> None:
    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.set_lr("body", 1.0)

    records = Records()
    trainer = quiet_trainer(
        mode=mode, max_epochs=1, log_every_n_steps=1, logger=records,
        callbacks=[Sets(), LearningRateMonitor()],
    )  # fmt: skip
    trainer.fit(TwoGroups(), batches(3))
    rates = [rates["lr/body"] for _, rates in records.rates]
    expected = [cosine(0) * SCALE, cosine(1) * SCALE, cosine(2) / LR * SCALE]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_second_fit_logs_from_its_own_first_step_on() -> None:
    records = Records()
    trainer = quiet_trainer(
        max_epochs=1, log_every_n_steps=2, callbacks=LearningRateMonitor(), logger=records
    )
    trainer.fit(TwoGroups(), batches(2))
    trainer.fit(TwoGroups(), batches(2))
    assert [step for step, _ in records.rates] == [2, 2]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_resumed_run_logs_what_the_whole_run_logs(
    mode: str, interval: str, tmp_path: Path
) -> None:
    def logged(callbacks: List[Callback], path: Optional[Path] = None) -> List[Tuple[int, float]]:
        trainer = quiet_trainer(
            mode=mode, max_epochs=2, log_every_n_steps=3, accumulate_grad_batches=2,
            callbacks=[LearningRateMonitor(interval), *callbacks],
        )  # fmt: skip
        trainer.fit(TwoGroups(), batches(6), ckpt_path=path)
        return [(row["step"], row["lr/head"]) for row in trainer.history if "lr/head" in row]

    class Saves(Callback):
        fires_last = True

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.batches_seen in (6, 7):  # an epoch's last batch, and one within a window
                trainer.save_checkpoint(tmp_path / f"{trainer.batches_seen}.safetensors")

    whole = logged([Saves()])
    assert [step for step, _ in whole] == [3, 6]
    for seen in (6, 7):
        assert logged([], tmp_path / f"{seen}.safetensors") == whole


def test_a_state_that_is_none_of_its_own_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="state of LearningRateMonitor is wrong: logged is -1"
    ):
        LearningRateMonitor().load_state_dict({"logged": -1})


@pytest.mark.parametrize("wrong", ["batch", "steps", 1, ""])
def test_another_interval_is_an_error_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="use 'step', 'epoch' or None"):
        LearningRateMonitor(wrong)
