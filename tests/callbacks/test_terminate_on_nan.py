"""TerminateOnNaN: the error names the first bad step, late only by what was asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_arrays, fill_deterministically, quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, ConfigurationError, NonFiniteError, OFEngineError, TaskModule
from ofengine.callbacks import ModelCheckpoint, TerminateOnNaN
from ofengine.checkpoint import load_weights

NAN, INF = float("nan"), float("inf")


class Small(TaskModule):
    """The loss is the mean of the output times the mean of the batch: NaN where the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)
        fill_deterministically(self, spread=0.4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, factor = batch
        return (self.head(self.norm(self.stem(x))) * factor).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_x", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.01, momentum=0.9)


def batches(count: int, bad: Dict[int, float]) -> List[Any]:
    """Random batches; those in ``bad`` have that number in the place of a finite factor."""
    generator = np.random.RandomState(0)
    return [
        (
            flow.tensor(generator.standard_normal((4, 2)).astype("float32")),
            flow.tensor([bad.get(index, 1.0)], dtype=flow.float32),
        )
        for index in range(count)
    ]


class Count(Callback):
    """How many batches were trained on."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def error_of(
    callback: TerminateOnNaN,
    data: Sequence[Any],
    also: Sequence[Callback] = (),
    task: Optional[TaskModule] = None,
    **arguments: Any,
) -> str:
    arguments = {"max_epochs": 2, "num_sanity_val_steps": 0, **arguments}
    validation = arguments.pop("validation", None)
    trainer = quiet_trainer(callbacks=[callback, *also], **arguments)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(task or Small(), data, validation)
    return str(caught.value)


# ---------------------------------------------------------------------- what is said, and when


@pytest.mark.parametrize(
    ("every", "bad", "step", "trained"),
    [
        (1, 3, 3, 4),
        (4, 3, 3, 4),
        (4, 0, 0, 4),
        (4, 5, 5, 8),
        (4, 9, 9, 10),  # the end of the epoch comes first
        (100, 6, 6, 10),
    ],
)
def test_the_first_bad_step_is_named(
    mode: str, every: int, bad: int, step: int, trained: int
) -> None:
    count = Count()
    text = error_of(TerminateOnNaN(every), batches(10, {bad: NAN}), [count], mode=mode)
    assert f"the loss of optimizer step {step} (from 0; epoch 0, batch {bad}) is nan" in text
    assert f"after {trained} steps 6 of the 6 numbers of 'stem.weight' are not finite" in text
    assert count.batches == trained


def test_an_infinite_loss_is_told_from_nan(mode: str) -> None:
    text = error_of(TerminateOnNaN(1), batches(3, {1: INF}), mode=mode)
    assert "optimizer step 1 (from 0; epoch 0, batch 1) is inf" in text


def test_the_first_parameter_in_order_is_named_with_its_count() -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                with flow.no_grad():
                    task.head.weight[0, 1:] = INF
                    task.norm.bias[0] = NAN

        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=True)  # so that nothing else breaks

    text = error_of(TerminateOnNaN(1), batches(4, {}), [Breaks()])
    assert "step 2 (from 0; epoch 0, batch 2) is nan, and after 3 steps 1 of the 3" in text
    assert "numbers of 'norm.bias' are not finite" in text


def test_parameters_that_are_still_finite_are_said_to_be() -> None:
    class Skips(Callback):
        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=True)

    text = error_of(TerminateOnNaN(1), batches(3, {1: NAN}), [Skips()])
    assert "is nan, and after 2 steps all parameters are still finite:" in text


def test_the_default_is_as_often_as_metrics_are_read(mode: str) -> None:
    count = Count()
    text = error_of(
        TerminateOnNaN(), batches(10, {1: NAN}), [count], mode=mode, log_every_n_steps=3
    )
    assert "optimizer step 1 " in text
    assert count.batches == 3


def test_a_batch_of_a_window_is_named_with_the_step_that_it_belongs_to(mode: str) -> None:
    count = Count()
    text = error_of(
        TerminateOnNaN(2), batches(12, {4: NAN}), [count], mode=mode, accumulate_grad_batches=3
    )
    assert "optimizer step 1 (from 0; epoch 0, batch 4) is nan, and after 2 steps" in text
    assert count.batches == 6


def test_a_later_epoch_is_named_with_its_number(mode: str) -> None:
    class Poison(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            if trainer.current_epoch == 1:
                with flow.no_grad():
                    task.head.bias.fill_(NAN)

    text = error_of(TerminateOnNaN(), batches(3, {}), [Poison()], mode=mode)
    assert "optimizer step 3 (from 0; epoch 1, batch 0) is nan" in text


def test_finite_losses_end_nothing_and_each_fit_starts_anew(mode: str) -> None:
    callback, data = TerminateOnNaN(2), batches(5, {3: NAN})
    error_of(callback, data, mode=mode)
    count = Count()
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[callback, count])
    trainer.fit(Small(), data[:3])
    assert count.batches == trainer.global_step == 6


def test_it_waits_for_the_device_only_when_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked: List[int] = []
    stack = flow.stack

    def counting(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        stacked.append(len(tensors))
        return stack(tensors, *args, **kwargs)

    monkeypatch.setattr("ofengine.callbacks.terminate_on_nan.flow.stack", counting)
    trainer = quiet_trainer(max_epochs=1, callbacks=TerminateOnNaN(4), log_every_n_steps=1000)
    trainer.fit(Small(), batches(10, {}))
    assert stacked[:2] == [4, 4]
    assert 2 in stacked[2:]  # the rest, at the end of the epoch


def test_losses_of_more_than_one_dtype_are_read() -> None:
    class Mixed(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss.double() if batch_idx == 1 else loss

    text = error_of(TerminateOnNaN(4), batches(4, {2: NAN}), task=Mixed())
    assert "optimizer step 2 " in text


def test_it_is_one_sentence_and_one_of_the_engines_errors() -> None:
    text = error_of(TerminateOnNaN(1), batches(2, {0: NAN}))
    assert issubclass(NonFiniteError, OFEngineError)
    assert "\n" not in text
    assert re.findall(r"\. ", text) == []
    assert text.endswith("try a lower learning rate, gradient_clip_val, or look at that batch.")


# ---------------------------------------------------------------------- restore


class Saved(Callback):
    """The weights after each step, as a checkpoint would hold them."""

    def __init__(self) -> None:
        self.steps: List[Dict[str, np.ndarray]] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
        trainer.settle()
        self.steps.append(weights_of(task))


def test_restore_takes_the_newest_weights_that_are_finite(mode: str, tmp_path: Path) -> None:
    task, saved = Small(), Saved()
    keeps = ModelCheckpoint(tmp_path, "a", every_n_train_steps=3)
    older = ModelCheckpoint(tmp_path, "b-{step}", every_n_train_steps=2)
    text = error_of(
        TerminateOnNaN(4, restore=True),
        batches(8, {3: NAN}),
        [keeps, older, saved],
        task=task,
        mode=mode,
    )
    # When it looks, after step 4, the newest files are those of the steps 3 and 2.
    assert text.count(str(tmp_path / "a.safetensors")) == 1
    assert "the task has the weights of" in text
    assert_same_arrays(weights_of(task), saved.steps[2])


def test_restore_passes_over_weights_that_are_not_finite(mode: str, tmp_path: Path) -> None:
    task, saved = Small(), Saved()
    newer = ModelCheckpoint(tmp_path, "newer", every_n_train_steps=5)
    older = ModelCheckpoint(tmp_path, "older", every_n_train_steps=3, save_top_k=-1)
    text = error_of(
        TerminateOnNaN(6, restore=True),
        batches(8, {3: NAN}),
        [newer, older, saved],
        task=task,
        mode=mode,
    )
    assert str(tmp_path / "older.safetensors") in text
    assert_same_arrays(weights_of(task), saved.steps[2])


def test_restore_knows_all_that_were_kept_for_their_metric(tmp_path: Path) -> None:
    task = Small()
    keeps = ModelCheckpoint(tmp_path, "{step}", monitor="val_x", mode="max", save_top_k=3)
    text = error_of(
        TerminateOnNaN(restore=True),
        batches(4, {3: NAN}),
        [keeps],
        task=task,
        val_check_interval=1,
        validation=batches(1, {}),
    )
    newest = str(tmp_path / "step=3.safetensors")
    assert newest in text
    assert newest != keeps.best_model_path
    expected = Small()
    load_weights(expected, newest)
    assert_same_arrays(weights_of(task), weights_of(expected))


def test_restore_passes_over_a_file_that_is_damaged(tmp_path: Path) -> None:
    class Damages(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                (tmp_path / "last.safetensors").write_bytes(b"nothing")

    keeps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_last=True)
    text = error_of(TerminateOnNaN(1, restore=True), batches(5, {3: NAN}), [keeps, Damages()])
    assert str(tmp_path / "step=2.safetensors") in text


@pytest.mark.parametrize("checkpoints", [False, True])
def test_with_nothing_to_restore_the_weights_stay(checkpoints: bool, tmp_path: Path) -> None:
    task = Small()
    also = [ModelCheckpoint(tmp_path, every_n_train_steps=1)] if checkpoints else []
    text = error_of(TerminateOnNaN(3, restore=True), batches(3, {0: NAN}), also, task=task)
    assert "no checkpoint of this run has finite weights to go back to" in text
    assert np.isnan(weights_of(task)["stem.weight"]).all()
    assert int(weights_of(task)["norm.num_batches_tracked"]) == 3


def test_without_restore_the_weights_stay(tmp_path: Path) -> None:
    task = Small()
    keeps = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    text = error_of(TerminateOnNaN(1), batches(4, {2: NAN}), [keeps], task=task)
    assert "safetensors" not in text
    assert np.isnan(weights_of(task)["stem.weight"]).all()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"check_every_n_steps": 0}, "check_every_n_steps=0: give a whole number of steps"),
        ({"check_every_n_steps": 2.5}, "check_every_n_steps=2.5"),
        ({"restore": "last"}, "restore='last': give True or False"),
    ],
)
def test_wrong_arguments_are_errors_at_once(wrong: Dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        TerminateOnNaN(**wrong)
