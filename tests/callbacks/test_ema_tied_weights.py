"""Weights with two names: checkpoints hold training's, also while the averages are in the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from oneflow import nn

from ofengine import Callback, OFEngineWarning, TaskModule, load_weights
from ofengine.callbacks import EMAWeightAveraging
from ofengine.checkpoint import arrays_of, read, write


class Tied(TaskModule):
    """Two layers with one weight, and one more layer that has two names itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.decode.weight = nn.init.zeros_(self.encode.weight)
        self.first = self.second = nn.Linear(1, 1)
        self.register_buffer("aside", flow.zeros(1), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # A step takes off 2 * 0.001 of the shared weight.
        return (self.encode(batch) + self.decode(batch) + self.second(batch)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.encode(batch).sum())


class Saves(Callback):
    """Saves in each validation, with the weights that training had when it began."""

    fires_last = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: List[Any] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        self.latest = arrays_of(task)

    def on_validation_epoch_end(self, trainer: Any, task: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(self.expected)}.safetensors")
        self.expected.append(self.latest)


@pytest.mark.parametrize("buffers", [False, True])
def test_a_checkpoint_of_a_validation_holds_training_s_weights(
    mode: str, buffers: bool, tmp_path: Path
) -> None:
    saves = Saves(tmp_path)
    callbacks = [EMAWeightAveraging(0.9, include_buffers=buffers), saves]
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(Tied(), [flow.ones(1, 1)] * 2, [flow.ones(1, 1)])
    for number, expected in enumerate(saves.expected):
        found = read(tmp_path / f"{number}.safetensors").weights
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name
    assert found["decode.weight"].item() == pytest.approx(-0.008, abs=1e-7)


def test_such_a_checkpoint_can_be_resumed(mode: str, tmp_path: Path) -> None:
    def fit(path: Any, *also: Callback) -> Tied:
        task = Tied()
        with flow.no_grad():
            for parameter in task.parameters():
                parameter.fill_(0.5)
        averages = EMAWeightAveraging(0.9, include_buffers=True)
        trainer = quiet_trainer(
            mode=mode, max_epochs=2, callbacks=[averages, *also], num_sanity_val_steps=0
        )
        trainer.fit(task, [flow.ones(1, 1)] * 2, [flow.ones(1, 1)], ckpt_path=path)
        return task

    whole = fit(None, Saves(tmp_path))
    assert bits(fit(tmp_path / "0.safetensors")) == bits(whole)


def test_two_names_with_other_numbers_are_told_and_the_first_counts(tmp_path: Path) -> None:
    weights = arrays_of(Tied())
    weights["encode.weight"] = np.full((1, 1), 3.0, dtype="float32")
    weights["decode.weight"] = np.full((1, 1), 4.0, dtype="float32")
    path = write(tmp_path / "file.safetensors", weights)
    task = Tied()
    with pytest.warns(OFEngineWarning, match="'encode.weight' and 'decode.weight' are one tensor"):
        load_weights(task, path)
    assert task.decode.weight.item() == 3.0
