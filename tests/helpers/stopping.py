"""A small run that is saved at every moment and resumed from each, as if by another process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader

from helpers import bits, quiet_trainer
from ofengine import Callback, TaskModule

Batch = Tuple[float, ...]


class Mean(TaskModule):
    """The loss is a weight times the batch's mean: the weight tells which batches came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * _numbers(batch)).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", _numbers(batch).mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.125, momentum=0.5)


def _numbers(batch: Any) -> Any:
    several = isinstance(batch, dict) or isinstance(batch[0], (list, tuple))
    if several:  # a batch of each loader
        parts = batch.values() if isinstance(batch, dict) else batch
        return flow.cat([_numbers(each).flatten() for each in parts if each is not None])
    return batch[0] if isinstance(batch, (list, tuple)) else batch


class Sees(Callback):
    """Notes the numbers of each batch, of training and validation, and what validation logs."""

    def __init__(self) -> None:
        self.rows: List[Any] = []

    def state_dict(self) -> Dict[str, Any]:
        return {}  # each run notes what it sees itself

    def note(self, kind: str, batch: Any) -> None:
        self.rows.append((kind, *_numbers(batch).numpy().ravel().tolist()))

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
        self.note("train", batch)

    def on_validation_batch_start(
        self, trainer: Any, task: Any, batch: Any, i: int, loader: int
    ) -> None:
        if not trainer.sanity_checking:
            self.note("val", batch)

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            self.rows.append(("metric", trainer.callback_metrics["val"]))


class SavesAll(Callback):
    """Saves in every hook of a run in which that is possible."""

    fires_last = True

    def __init__(self, folder: Path, sees: Sees) -> None:
        self.folder, self.sees = folder, sees
        self.saved: List[Tuple[Path, int]] = []
        """Each file, with how many rows had been noted by then."""

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def save(self, trainer: Any, hook: str, rows: Optional[int] = None) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.saved):02d}-{hook}.safetensors"
            self.saved.append(
                (trainer.save_checkpoint(path), len(self.sees.rows) if rows is None else rows)
            )

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "train_start")

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "batch_end")

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            self.before = len(self.sees.rows)
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validation_batch_end", getattr(self, "before", 0))  # it comes again

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "train_end")


class Ran:
    """What a run came to."""

    def __init__(self, task: TaskModule, sees: Sees, trainer: Any) -> None:
        self.task, self.rows, self.trainer = task, sees.rows, trainer
        self.bits = bits(task)


def run_once(
    mode: str,
    train: Callable[[], Any],
    validation: Callable[[], Any] = lambda: None,
    *,
    task: Callable[[], TaskModule] = Mean,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    resume_from: Optional[Path] = None,
    save_to: Optional[Path] = None,
    **arguments: Any,
) -> Tuple[Ran, List[Tuple[Path, int]]]:
    """Fit; what is made for a resumed run is made with other global generators, as elsewhere."""
    start = 1 if resume_from is None else 77
    random.seed(start)
    np.random.seed(start)
    flow.manual_seed(start)
    DataLoader([0]).generator.manual_seed(start)  # all DataLoaders share one by default
    if resume_from is not None:
        flow.rand(3), np.random.rand(3), random.random()
    made, sees = task(), Sees()
    saves = [] if save_to is None else [SavesAll(save_to, sees)]
    arguments = {"max_epochs": 3, "num_sanity_val_steps": 1, **arguments}
    trainer = quiet_trainer(mode=mode, callbacks=[*callbacks(), sees, *saves], **arguments)
    trainer.fit(made, train(), validation(), ckpt_path=resume_from)
    return Ran(made, sees, trainer), saves[0].saved if saves else []


def check_stopping(
    folder: Path,
    mode: str,
    train: Callable[[], Any],
    validation: Callable[[], Any] = lambda: None,
    every: int = 1,
    other: str = "",
    **setting: Any,
) -> Ran:
    """Stop at every moment (or every so manieth), go on from there, and compare all bits."""
    whole, _ = run_once(mode, train, validation, **setting)
    saving, saved = run_once(mode, train, validation, save_to=folder, **setting)
    assert saving.rows == whole.rows, "saving changed the run"
    assert saving.bits == whole.bits, "saving changed the run"
    assert saved
    for path, rows in saved[::every]:
        resumed, _ = run_once(other or mode, train, validation, resume_from=path, **setting)
        assert resumed.rows == whole.rows[rows:], path.name
        assert resumed.bits == whole.bits, path.name
        assert resumed.trainer.global_step == whole.trainer.global_step, path.name
        assert resumed.trainer.current_epoch == whole.trainer.current_epoch, path.name
    return whole
