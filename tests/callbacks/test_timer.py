"""Timer: seconds by a clock of ours, ends training in time, goes on where a run is resumed."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import pytest
from helpers import Line, batches, quiet_trainer

from ofengine import Callback, ConfigurationError
from ofengine.callbacks import EarlyStopping, ModelCheckpoint, Timer, timer as module


class Task(Line):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", self.layer(batch).mean())


class Clock(Callback):
    """Time that passes with batches alone: a second each, two each of validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 1.0

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 2.0


def fitted(
    monkeypatch: pytest.MonkeyPatch, timer: Timer, folder: Optional[Path] = None, **options: Any
) -> Any:
    saves = [] if folder is None else [ModelCheckpoint(folder, save_last=True)]
    trainer = quiet_trainer(max_epochs=2, callbacks=[Clock(monkeypatch), timer, *saves])
    trainer.fit(Task(), batches(4), **options)
    return trainer


def test_the_time_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer()
    trainer = fitted(monkeypatch, timer, val_dataloaders=batches(3))
    assert timer.time_elapsed() == 2 * (4 + 3 * 2)
    assert timer.time_elapsed("validate") == 2 * 3 * 2
    assert timer.time_elapsed("test") == 0.0
    assert timer.time_remaining() is None
    assert timer.idle_hooks == ("on_train_batch_end",)
    trainer.validate(Task(), batches(3))
    assert timer.time_elapsed("validate") == 3 * 3 * 2


@pytest.mark.parametrize(
    ("duration", "interval", "steps"),
    [
        (3, "step", 3),
        (2.5, "step", 3),
        ("00:00:00:03", "epoch", 4),
        (timedelta(hours=1), "step", 8),
    ],
)
def test_training_ends_when_the_time_is_used_up(
    monkeypatch: pytest.MonkeyPatch, duration: Any, interval: str, steps: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    timer = Timer(duration, interval)
    with caplog.at_level(logging.INFO, "ofengine"):
        assert fitted(monkeypatch, timer).global_step == steps
    assert ("are used up" in caplog.text) == (steps < 8)
    remaining = timer.time_remaining()
    assert remaining == (3592.0 if steps == 8 else 0.0)


def test_a_resumed_run_has_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert fitted(monkeypatch, Timer(3), tmp_path).global_step == 3
    last = tmp_path / "last.safetensors"
    assert fitted(monkeypatch, Timer(3), ckpt_path=last).global_step == 3
    timer = Timer(5)
    assert fitted(monkeypatch, timer, ckpt_path=last).global_step == 5
    assert timer.time_elapsed() == 5.0


@pytest.mark.parametrize(("interval", "steps"), [("epoch", 4), ("step", 3)])
def test_a_resumed_run_ends_by_epochs_at_the_end_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interval: str, steps: int
) -> None:
    def run(path: Optional[Path] = None) -> int:
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
        callbacks = [Clock(monkeypatch), Timer(3, interval), *([] if path else [saves])]
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(Task(), batches(4), ckpt_path=path)
        return trainer.global_step

    assert run() == steps
    for step in range(1, steps + 1):
        assert run(tmp_path / f"epoch=0-step={step}.safetensors") == steps


def test_time_that_no_look_has_seen_used_up_ends_nothing_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(threshold: Optional[float], path: Optional[Path] = None) -> int:
        early = EarlyStopping("seen", stopping_threshold=threshold)
        saves = ModelCheckpoint(tmp_path, monitor="seen")
        callbacks = [early, Timer(3, "epoch"), *([] if path else [saves])]
        trainer = quiet_trainer(
            max_epochs=2, val_check_interval=2, num_sanity_val_steps=0,
            callbacks=[Clock(monkeypatch), *callbacks],
        )  # fmt: skip
        trainer.fit(Task(), batches(4), batches(1), ckpt_path=path)
        return trainer.global_step

    assert run(float("inf")) == 2
    # After 2 + 2 seconds EarlyStopping's reason is gone, and an epoch's end is not there yet.
    assert run(None, tmp_path / "epoch=0-step=2.safetensors") == 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"duration": -1}, "duration=-1: give seconds"),
        ({"duration": True}, "duration=True"),
        ({"duration": "3 hours"}, "Timer: duration='3 hours': write it as"),
        ({"interval": "batch"}, "Timer: interval='batch'"),
        ({"verbose": 2}, "Timer: verbose=2"),
    ],
)
def test_a_wrong_argument_is_an_error_at_once(options: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Timer(**options)


def test_a_resumed_run_that_another_ended_stays_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def both(duration: float, threshold: Optional[float]) -> Any:
        early = EarlyStopping("loss", check_on_train_epoch_end=False, stopping_threshold=threshold)
        callbacks = [early, Timer(duration, "epoch"), ModelCheckpoint(tmp_path, save_last=True)]
        trainer = quiet_trainer(max_epochs=3, callbacks=[Clock(monkeypatch), *callbacks])
        trainer.fit(Task(), batches(4), batches(1), ckpt_path="last")
        return trainer.global_step

    assert both(4, float("inf")) == 4  # both have a reason
    assert both(100, float("inf")) == 4
    assert both(9, None) == 8
    assert both(100, None) == 12
