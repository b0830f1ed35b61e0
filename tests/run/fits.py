"""What the tests of runs share: a fit and its diary, and batches in DataLoaders."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import oneflow as flow
from helpers import Diary, MeanLine, SquaredLine, numbered_batches, quiet_trainer
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import TaskModule, Trainer


def loader_of(*numbers: float, batch_size: int = 1) -> DataLoader:
    """A DataLoader over samples of two equal numbers each."""
    samples = flow.tensor([[number, number] for number in numbers], dtype=flow.float32)
    return DataLoader(TensorDataset(samples), batch_size=batch_size)


class OfLists(SquaredLine):
    """For DataLoaders over a TensorDataset, whose batches are lists of one tensor."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return SquaredLine.training_step(self, batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch[0].mean())

    test_step = validation_step


class ShortDiary(Diary):
    """Notes ``v`` where a validation begins, too."""

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        self.events.append("v")


class FullDiary(Diary):
    """Notes each batch of the other stages, too: ``v0`` for validation on a batch of 0."""

    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        self.events.append(f"v{float(batch[0, 0]):g}")

    def on_test_batch_end(self, *arguments: Any) -> None:
        self.events.append("test")

    def on_predict_batch_end(self, *arguments: Any) -> None:
        self.events.append("predict")

    def on_sanity_check_end(self, trainer: Any, task: Any) -> None:
        self.events.append("sane")


def fitted(
    task: Optional[TaskModule] = None, train: Any = None, validation: Any = None, **arguments: Any
) -> Tuple[str, Trainer]:
    """The short diary of a fit, of a ``SquaredLine`` on three batches; and its trainer."""
    train = numbered_batches(3) if train is None else train
    return _fitted(ShortDiary(), task or SquaredLine(), train, validation, arguments)


def fitted_on(
    train: Any = None, validation: Any = None, task: Optional[TaskModule] = None, **arguments: Any
) -> Tuple[str, Trainer]:
    """The full diary of a fit, of a ``MeanLine`` on five batches; and its trainer."""
    train = numbered_batches(5) if train is None else train
    return _fitted(FullDiary(), task or MeanLine(), train, validation, arguments)


def _fitted(
    diary: Diary, task: TaskModule, train: Any, validation: Any, arguments: Dict[str, Any]
) -> Tuple[str, Trainer]:
    callbacks = [diary, *arguments.pop("callbacks", [])]
    asked = {"max_epochs": 1, "num_sanity_val_steps": 0, **arguments}
    trainer = quiet_trainer(callbacks=callbacks, **asked)
    trainer.fit(task, train, validation)
    return diary.text, trainer
