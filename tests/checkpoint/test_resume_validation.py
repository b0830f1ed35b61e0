"""Validation draws, too: a resumed run validates on the batches, and with the numbers, to come."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers.resuming import some_slow
from helpers.stopping import Mean, check_stopping, run_once
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from ofengine import Callback
from ofengine.callbacks import EarlyStopping, EMAWeightAveraging

DATA = TensorDataset(flow.arange(9, dtype=flow.float32))


def train() -> Any:
    return [flow.ones(1) * n for n in (1.0, 2.0, 3.0)]


def generator(seed: int) -> Any:
    made = flow.Generator("cpu")
    made.manual_seed(seed)
    return made


class Noisy(Dataset):
    def __init__(self, rng: Any = None) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        noise = np.random.rand() if self.rng is None else self.rng.random()
        return flow.tensor([index + float(noise)])


LOADERS: Dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "shuffle, generator": lambda: DataLoader(
        DATA, batch_size=2, shuffle=True, generator=generator(5)
    ),
    "sampler": lambda: DataLoader(
        DATA, batch_size=2, sampler=RandomSampler(DATA, generator=generator(5))
    ),
    "noise": lambda: DataLoader(Noisy(), batch_size=2),
    "noise, its own": lambda: DataLoader(Noisy(random.Random(3)), batch_size=2, shuffle=True),
    "several": lambda: [
        DataLoader(DATA, batch_size=2, shuffle=True, generator=generator(n)) for n in (5, 6)
    ],
    "persistent workers": lambda: DataLoader(
        Noisy(np.random.default_rng(3)), shuffle=True, num_workers=1, persistent_workers=True
    ),
}


class Logs(Mean):
    """Logs as "val" the sum of what all loaders gave, weighted by when it came."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        numbers = batch[0] if isinstance(batch, (list, tuple)) else batch
        self.log("of_loader", numbers.mean())
        self.seen = [*self.seen, float(numbers.mean().numpy())]

    def on_validation_start(self) -> None:
        self.seen: List[float] = []

    def on_validation_epoch_end(self) -> None:
        self.log("val", sum(7.0**n * each for n, each in enumerate(self.seen)))

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: what is seen begins anew in each validation."""


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("seed", some_slow([None, 3], 3))
def test_it_goes_on_before_in_and_after_a_validation(
    name: str, seed: Optional[int], tmp_path: Path
) -> None:
    # Of an epoch's nine moments, each fourth of all is another: before, in and after a validation.
    whole = check_stopping(
        tmp_path, "eager", train, LOADERS[name], every=4, task=Logs, seed=seed,
        limit_val_batches=2, eval_mode="eager",
    )  # fmt: skip
    values = [row[1] for row in whole.rows if row[0] == "metric"]
    assert len(values) == 3 and len(set(values)) > 1  # else it would not matter what is drawn


def test_in_both_modes_and_within_the_epoch(mode: str, tmp_path: Path) -> None:
    check_stopping(
        tmp_path, mode, train, LOADERS["shuffle"], every=2, limit_val_batches=1,
        val_check_interval=2, max_epochs=2,
    )  # fmt: skip


def test_early_stopping_ends_training_in_the_same_epoch(tmp_path: Path) -> None:
    def callbacks() -> List[Callback]:
        return [EarlyStopping("val", patience=2, min_delta=0.01)]

    whole = check_stopping(
        tmp_path, "eager", train, LOADERS["shuffle"], every=3, callbacks=callbacks, task=Logs,
        limit_val_batches=1, max_epochs=30, eval_mode="eager",
    )  # fmt: skip
    assert 2 < whole.trainer.current_epoch < 30


class Dropped(Mean):
    """Draws in validation from a generator of its own, and from a layer left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.rng = np.random.default_rng(8)

    def on_validation_epoch_start(self) -> None:
        self.drop.train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = float(self.rng.random())
        self.log("val", self.drop(batch * flow.ones(50)).mean() + noise + flow.rand(1).sum())


class Draws(Callback):
    """Draws in validation from a generator that only the callback has."""

    def __init__(self) -> None:
        self.rng = random.Random(2)

    def on_validation_batch_start(self, trainer: Any, task: Any, batch: Any, *_: int) -> None:
        batch.fill_(self.rng.random())

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        batch.fill_(self.rng.random())


@pytest.mark.slow
def test_what_the_task_and_callbacks_draw_goes_on(tmp_path: Path) -> None:
    def validation() -> Any:
        return [flow.ones(1) * n for n in (1.0, 2.0)]

    whole = check_stopping(
        tmp_path, "eager", train, validation, task=Dropped, callbacks=lambda: [Draws()],
        eval_mode="eager", max_epochs=2,
    )  # fmt: skip
    values = [row[1] for row in whole.rows if row[0] == "metric"]
    assert len(set(values)) == 2


class Counts(Mean):
    """Counts validation batches in a buffer that training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", flow.zeros(1))
        self.register_buffer("aside", flow.zeros(1), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch * (self.count + self.aside)).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.count.add_(1.0)
        self.aside.add_(0.5)
        self.log("val", batch.mean())


def test_buffers_that_validation_changes_are_not_changed_twice(tmp_path: Path) -> None:
    def validation() -> Any:
        return [flow.ones(1)] * 2

    for name, callbacks in (
        ("plain", list),
        ("averaged", lambda: [EMAWeightAveraging(0.5, include_buffers=True)]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        check_stopping(
            folder, "eager", train, validation, task=Counts, eval_mode="eager", max_epochs=2,
            callbacks=callbacks,
        )  # fmt: skip


def test_a_validation_loader_that_is_left_out_is_told(tmp_path: Path) -> None:
    _, saved = run_once("eager", train, LOADERS["shuffle, generator"], save_to=tmp_path)
    with pytest.warns(UserWarning, match="state of a random generator that is gone: data.sampler"):
        run_once("eager", train, resume_from=saved[-3][0])


class CountsKept(Mean):
    """Counts what it sees in validation, and keeps the count in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"batches": 0}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["batches"] += 1
        self.log("val", batch.mean() + self.counts["batches"])

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["counts"] = self.counts  # the dict itself, which goes on changing

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.counts = checkpoint["counts"]


class Sums(Callback):
    """Adds up in validation, in a tensor and in a list; shifts the batches by the sum."""

    def __init__(self) -> None:
        self.total, self.seen = flow.zeros(1), [0.0]

    def on_validation_batch_start(self, trainer: Any, task: Any, batch: Any, *_: int) -> None:
        self.total.add_(batch)
        self.seen.append(float(batch.numpy()[0]))
        batch.add_(self.total + len(self.seen))

    def state_dict(self) -> Dict[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.total, self.seen = flow.tensor(state["total"]), list(state["seen"])


@pytest.mark.parametrize("eval_mode", ["eager", "graph"])
def test_what_validation_counts_counts_once(eval_mode: str, tmp_path: Path) -> None:
    """A run that is cut off in a validation begins it anew, with the counts of before it."""
    task = CountsKept if eval_mode == "eager" else CountsInBuffer  # a trace would freeze a number

    def validation() -> Any:
        return Again([1.0, 2.0])

    whole = check_stopping(
        tmp_path, "eager", train, validation, task=task, callbacks=lambda: [Sums()],
        eval_mode=eval_mode, max_epochs=2, num_sanity_val_steps=0,
        every=1 if eval_mode == "eager" else 4,
    )  # fmt: skip
    values = [row[1] for row in whole.rows if row[0] == "metric"]
    assert len(set(values)) == 2


class CountsInBuffer(CountsKept):
    """The same in a buffer that is no part of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", flow.zeros(1), persistent=False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self.log("val", (batch + self.count).mean())


class Again:
    """Batches that each pass makes anew."""

    def __init__(self, numbers: List[float]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Any:
        return (flow.ones(1) * number for number in self.numbers)
