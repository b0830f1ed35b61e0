"""``ofengine set-lr``: a rate that is changed while a run trains, at one step, for good."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import attrs
import numpy as np
import oneflow as flow
import pytest
from oneflow.optim.lr_scheduler import CosineAnnealingLR

from helpers import bits, quiet_trainer, weights_of
from helpers.tiny import Tiny, tiny_batches
from helpers.trainers import MODES
from ofengine import Callback, Trainer
from ofengine.cli.set_lr import change_rates
from ofengine.loggers import CSVLogger
from ofengine.processes import requests

EPOCHS = 4  # of three batches


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_PAUSE", 0.005)


class Asks(Callback):
    """Asks for rates as the command does, after so many batches; waits until the run has heard."""

    def __init__(self, wanted: Dict[int, Dict[str, float]]) -> None:
        self.wanted = wanted

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.batches_seen in self.wanted:
            rates = self.wanted[trainer.batches_seen]
            assert change_rates(Path(trainer.log_dir), rates, None) == []
            until = time.monotonic() + 30
            while not trainer._run.orders.agreed:
                assert time.monotonic() < until, "the run does not hear"
                time.sleep(0.005)


class Saves(Callback):
    """Saves after each batch, after each epoch's last hook but its own, and at the end."""

    fires_last = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: List[Path] = []

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{trainer.batches_seen:02}-{name}.safetensors"
        self.files.append(trainer.save_checkpoint(path))

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch")


class Cosine(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), momentum=0.5)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 12)}


def train(
    mode: str,
    folder: Path,
    *callbacks: Callback,
    task: Any = Tiny,
    ckpt: Any = None,
    epochs: int = EPOCHS,
    policy: str = "checkpoint",
    **arguments: Any,
) -> Trainer:
    """A fit whose folder is a version below ``folder``."""
    trainer = quiet_trainer(
        mode=mode, max_epochs=epochs, logger=CSVLogger(folder), callbacks=[*callbacks],
        default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(task(), tiny_batches(), ckpt_path=ckpt, rates_on_resume=policy)
    return trainer


def by_hand(changes: Dict[int, Dict[str, float]]) -> Dict[str, np.ndarray]:
    """A loop over OneFlow alone, with rates that are written before the step of each number."""
    task = Tiny()
    groups = [
        {"params": list(task.body.parameters()), "lr": 0.125 * 0.5},
        {"params": list(task.head.parameters()), "lr": 0.125},
    ]
    optimizer = flow.optim.SGD(groups, momentum=0.5)
    scales, names = {"body": 0.5, "head": 1.0}, ["body", "head"]
    for step, (inputs, targets) in enumerate(tiny_batches() * EPOCHS):
        for name, lr in changes.get(step, {}).items():
            optimizer.param_groups[names.index(name)]["lr"] = lr * scales[name]
        ((task.head(task.body(inputs)) - targets) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(task)


CHANGES = {5: {"head": 0.01}, 8: {"head": 0.25, "body": 0.0625}}


@pytest.mark.parametrize("mode", MODES)
def test_it_takes_effect_at_the_next_step_and_a_resume_repeats_it(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ofengine")
    saves = Saves(tmp_path / "saved")
    trainer = train(mode, tmp_path, Asks(CHANGES), saves)
    whole = weights_of(trainer.task)
    assert bits(whole) == bits(by_hand(CHANGES))
    assert bits(whole) != bits(by_hand({})), "the change changes nothing"
    assert "step 5: head: 0.125 -> 0.01, by ofengine set-lr." in caplog.messages
    for path in saves.files:
        resumed = train(mode, tmp_path, ckpt=path)
        assert bits(weights_of(resumed.task)) == bits(whole), path.name
    print(caplog.messages)
