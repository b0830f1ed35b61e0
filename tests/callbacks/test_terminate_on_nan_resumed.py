"""Losses that nobody had looked at when a run was saved are looked at after it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, CheckpointError, NonFiniteError, TaskModule
from ofengine.callbacks import TerminateOnNaN


class Logged(TaskModule):
    """The loss is NaN for a batch of NaN; its weight takes no harm from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * 1.0).sum() + batch.sum()


def data() -> List[Any]:
    return [flow.ones(1) * value for value in (0.5, float("nan"), 1.5, 2.5, 3.5, 4.5)]


class SavesAt(Callback):
    fires_last = True

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def ended(mode: str, path: Any, *also: Callback) -> str:
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[TerminateOnNaN(4), *also])
    with pytest.raises(NonFiniteError) as error:
        trainer.fit(Logged(), data(), ckpt_path=path)
    return str(error.value)


@pytest.mark.parametrize("step", [2, 3])
def test_the_error_is_that_of_a_run_that_was_not_stopped(
    mode: str, step: int, tmp_path: Path
) -> None:
    path = tmp_path / "saved.safetensors"
    expected = ended(mode, None, SavesAt(step, path))
    assert "the loss of optimizer step 1 (from 0; epoch 0, batch 1) is nan, and after 4" in expected
    assert ended(mode, path) == expected


@pytest.mark.parametrize(
    "wrong",
    [{"losses": [1.0]}, {"losses": [1.0], "places": []}, {"losses": ["x"], "places": [[0, 0]]},
     {"losses": [1.0], "places": [[0]]}, {"losses": [1.0], "places": [[0, -1]]}],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(wrong: Dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the state of TerminateOnNaN is wrong"):
        TerminateOnNaN().check_state_dict(wrong, Logged())


def test_another_fit_begins_with_no_losses() -> None:
    callback = TerminateOnNaN(50)
    trainer = quiet_trainer(max_steps=2, callbacks=[callback])
    with pytest.raises(NonFiniteError):  # at the end of the epoch
        trainer.fit(Logged(), data()[:2])
    assert callback.state_dict() == {}
    trainer.fit(Logged(), data()[2:])
