"""Runs that are saved in every hook and resumed from each file, to be compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import attrs
import numpy as np
import oneflow as flow
import pytest
from oneflow import nn
from oneflow.optim.lr_scheduler import CosineAnnealingLR
from oneflow.utils.data import DataLoader

from helpers import bits, fill_deterministically, quiet_trainer, weights_of
from ofengine import Callback, TaskModule, Trainer

OPTIMIZERS: Dict[str, Callable[[Any], Any]] = {
    "sgd": lambda groups: flow.optim.SGD(groups),
    "momentum": lambda groups: flow.optim.SGD(groups, momentum=0.9),
    "adam": lambda groups: flow.optim.Adam(groups),
    "amsgrad": lambda groups: flow.optim.Adam(groups, amsgrad=True),
    "adamw": lambda groups: flow.optim.AdamW(groups, weight_decay=0.01),
    "rmsprop": lambda groups: flow.optim.RMSprop(groups, centered=True),
    "adagrad": lambda groups: flow.optim.Adagrad(groups, lr_decay=0.01),
    "adadelta": lambda groups: flow.optim.Adadelta(groups),
    "lamb": lambda groups: flow.optim.LAMB(groups),
}


class Net(TaskModule):
    """Batch norm, two dropout layers, two groups with scale and decay, a schedule."""

    def __init__(self, optimizer: str = "momentum", scheduler: Any = None) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.first, self.second = nn.Dropout(0.3), nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)
        self.kind, self.scheduler = optimizer, scheduler

    def forward(self, x: Any) -> Any:
        return self.head(self.second(self.first(self.norm(self.body(x)).relu())))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def param_groups(self) -> List[Dict[str, Any]]:
        body = [*self.body.parameters(), *self.norm.parameters()]
        return [
            {"name": "body", "params": body, "lr": 0.1, "lr_scale": 0.5, "lr_decay_scale": 0.9},
            {"name": "head", "params": self.head.parameters(), "lr": 0.05},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](self.param_groups())
        if self.scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 40)}


EVEN = False
"""Whether all batches are of one size, which takes one graph less for each step."""


class Augmented:
    """Rows and labels; rows with new noise of numpy's global generator each time."""

    def __init__(self, rows: int, noise: float) -> None:
        generator = np.random.RandomState(0)
        self.x = generator.standard_normal((rows, 4)).astype("float32")
        self.y = generator.randint(0, 3, rows)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tuple[np.ndarray, int]:
        noise = np.random.standard_normal(4).astype("float32") if self.noise else 0
        return self.x[index] + self.noise * noise, self.y[index]


def collate(rows: Sequence[Any]) -> Tuple[Any, Any]:
    """A batch of tensors."""
    inputs, labels = zip(*rows)
    return flow.tensor(np.stack(inputs)), flow.tensor(np.array(labels))


def shuffled(noise: float = 0.1, workers: int = 0) -> Callable[[int], Any]:
    """A factory of a shuffled DataLoader: 5 batches of 4, the last of them smaller or not."""

    def make(seed: int) -> DataLoader:
        generator = flow.Generator("cpu")
        generator.manual_seed(seed)
        return DataLoader(
            Augmented(20 if EVEN else 18, noise), batch_size=4, shuffle=True, num_workers=workers,
            collate_fn=collate, generator=generator,
        )  # fmt: skip

    return make


class Endless:
    """Batches in an order of numpy's global generator, of a number that nobody is told."""

    def __init__(self, seed: int) -> None:
        self._data = Augmented(20 if EVEN else 18, 0.1)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.permutation(len(self._data))
        for start in range(0, len(order), 4):
            yield collate([self._data[i] for i in order[start : start + 4]])


class Records(Callback):
    """Notes every batch, validation and epoch with all their numbers."""

    def __init__(self) -> None:
        self.rows: List[Any] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        step, loss = trainer.global_step, outputs["loss"].numpy().tobytes()
        rates = tuple(trainer.rates.rates(max(step - 1, 0)))
        place = ("batch", trainer.current_epoch, i, step)
        self.rows.append((*place, loss, batch[0].numpy().tobytes(), rates))

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            self.rows.append(("validation", trainer.callback_metrics["val"]))

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.rows.append(("epoch", dict(trainer.callback_metrics)))


class Saves(Callback):
    """Saves in every hook in which a run can be saved, or in those of :data:`KINDS`."""

    fires_last = True

    def __init__(self, folder: Path, records: Records) -> None:
        self.folder, self.records = folder, records
        self.files: List[Path] = []
        self.rows_before: Dict[Path, int] = {}

    def save(self, trainer: Trainer, name: str) -> None:
        if trainer.sanity_checking or (KINDS and name not in KINDS):
            return
        path = self.folder / f"{len(self.files):03d}-{name}.safetensors"
        self.files.append(trainer.save_checkpoint(path))
        self.rows_before[path] = len(self.records.rows)

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "train_start")

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.save(trainer, "batch")

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validating")

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "train_end")


@attrs.frozen
class Outcome:
    """What a run came to."""

    trainer: Trainer
    task: Net
    weights: Dict[str, np.ndarray]
    rows: List[Any]
    states: List[Dict[str, Any]]
    """Of the callbacks, tensors as lists."""
    saves: Optional[Saves]


def plain(value: Any) -> Any:
    """``value`` so that == compares all of it."""
    if isinstance(value, flow.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def run(
    mode: str,
    *,
    resume_from: Optional[Path] = None,
    save_to: Optional[Path] = None,
    data: Callable[[int], Any] = shuffled(),
    task: Callable[[], Net] = Net,
    callbacks: Callable[[], List[Callback]] = list,
    **arguments: Any,
) -> Outcome:
    """Fit; a resumed run begins with other weights and generators than the one that saved."""
    start = 1 if resume_from is None else 77
    np.random.seed(start)
    flow.manual_seed(start)
    made, own, records = task(), callbacks(), Records()
    fill_deterministically(made, start, 0.5)
    for index, layer in enumerate((made.first, made.second)):
        layer.generator.manual_seed(start + index)
    saves = None if save_to is None else Saves(save_to, records)
    trainer = quiet_trainer(
        mode=mode,
        callbacks=[*own, records, *([] if saves is None else [saves])],
        **{"max_epochs": 2, "log_every_n_steps": 2, **arguments},
    )
    validation = DataLoader(Augmented(10 if EVEN else 9, 0.1), batch_size=5, collate_fn=collate)
    trainer.fit(made, data(start), validation, ckpt_path=resume_from)
    states = [plain(each.state_dict()) for each in own]
    return Outcome(trainer, made, weights_of(made), records.rows, states, saves)


def assert_same_run(ours: Outcome, theirs: Outcome, skipped: int, where: str) -> None:
    """``ours`` did what ``theirs`` did, its first ``skipped`` rows left out."""
    expected = theirs.rows[skipped:]
    assert [row[:4] for row in ours.rows] == [row[:4] for row in expected], where
    assert ours.rows == expected, where
    assert bits(ours.weights) == bits(theirs.weights), where
    assert repr(ours.states) == repr(theirs.states), where  # NaN has to equal NaN
    assert ours.trainer.global_step == theirs.trainer.global_step, where
    assert ours.trainer.current_epoch == theirs.trainer.current_epoch, where


KINDS: Tuple[str, ...] = ()
"""Points of these kinds alone are saved and resumed from; all kinds where it is empty."""


def choose(files: Sequence[Path], most: Optional[int]) -> List[Path]:
    """At most ``most`` of each kind, the last ones, and one in the middle of an epoch."""
    if most is None:
        return list(files)
    kinds: Dict[str, List[Path]] = {}
    for path in files:
        kinds.setdefault(path.stem[4:], []).append(path)
    return [path for each in kinds.values() for path in each[len(each) // 2 :][:most]]


def check_exact(
    folder: Path, mode: str, other: str = "", most: Optional[int] = 1, **setting: Any
) -> Outcome:
    """Resume from files saved in every hook in ``mode``, in the mode ``other``; compare all."""
    whole = run(mode, **setting)
    saving = run(mode, save_to=folder, **setting)
    assert_same_run(saving, whole, 0, "saving changed the run")
    assert saving.saves is not None
    files = choose(saving.saves.files, most)
    assert files
    for path in files:
        resumed = run(other or mode, resume_from=path, **setting)
        assert_same_run(resumed, whole, saving.saves.rows_before[path], path.name)
    return whole


def state_of(trainer: Trainer) -> str:
    """All that a checkpoint of this moment would hold, but times."""
    weights, state, metadata = trainer.checkpoint_content()
    assert state is not None
    state["run"].update(seconds=0, saved_at=0)
    return repr((plain(weights), plain(state), metadata))


def some_slow(values: Iterable[Any], *quick: Any) -> List[Any]:
    """Parameters of which all but the ``quick`` ones are left to ``make test-slow``."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
