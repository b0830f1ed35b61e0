"""Where the cases of ranks run, the list of them, and what most of them train.

Each case is a function of a :class:`Place` that trains and returns what must be equal everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Set

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import TensorDataset

from ofengine import TaskModule, Trainer

Result = Dict[str, Any]
CASES: Dict[str, Callable[[Place], Result]] = {}
CLOSE: Dict[str, float] = {}
SLOW: Set[str] = set()
"""Those that add least to the others."""


def case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    CASES[function.__name__] = function
    return function


def close_case(most: float) -> Callable[[Any], Any]:
    """One process comes this close to it; ranks are equal to each other to the bit."""

    def close(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
        CLOSE[function.__name__] = most
        return case(function)

    return close


def slow_case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    SLOW.add(function.__name__)
    return case(function)


class Place:
    """Where a case runs: in one of ``size`` ranks, or alone, in the place of all of them."""

    def __init__(self, size: int, alone: bool, folder: Path, shared: Path) -> None:
        self.size, self.alone, self.folder, self.shared = size, alone, folder, shared

    def each(self, batches: int) -> int:
        """``batches`` of each rank, in the batches that this process goes through."""
        return batches * self.size if self.alone else batches

    def trainer(self, accumulate: int = 1, **options: Any) -> Trainer:
        given = {
            "accumulate_grad_batches": self.each(accumulate),
            "device": "cpu",
            "max_epochs": 2,
            "seed": 5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(self.folder),
        }
        return Trainer(**{**given, **options})


def numbers(samples: int = 46) -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, 6)).astype(np.float32)
    return x, rng.integers(0, 3, samples)


def dataset(samples: int = 46) -> Any:
    x, y = numbers(samples)
    return TensorDataset(flow.tensor(x), flow.tensor(y))


class Net(TaskModule):
    """Two layers, a third that some batches use, and one that none does."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0) -> None:
        super().__init__()
        flow.manual_seed(1)
        self.optimizer_name = optimizer
        self.first = nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 3)
        self.sometimes = nn.Linear(6, 3)
        self.never = nn.Linear(2, 2)

    def scores(self, x: Any) -> Any:
        scores = self.second(self.dropout(self.first(x).relu()))
        return scores + self.sometimes(x) if float(x[0, 0].numpy()) > 0.3 else scores

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.scores(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.scores(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(dim=-1) == y).to(flow.float32).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adamw":
            return flow.optim.AdamW(self.parameters(), lr=0.02)
        if self.optimizer_name == "adagrad":  # which keeps something of what it never stepped
            return flow.optim.Adagrad(self.parameters(), lr=0.02, initial_accumulator_value=0.1)
        return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def weights(task: nn.Module) -> Dict[str, np.ndarray]:
    return {name: np.array(each.numpy()) for name, each in task.state_dict().items()}


def fitted(task: Net, trainer: Trainer, train: Any, val: Any = None, **options: Any) -> Result:
    trainer.fit(task, train, val, **options)
    return {
        "weights": weights(task),
        "metrics": dict(trainer.callback_metrics),
        "steps": trainer.global_step,
        "seen": trainer.batches_seen,
    }


# ---------------------------------------------------------------------- optimizers and rates


class Weighed(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": batch[0].abs().sum() * len(batch[0])}


class Predicts(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"scores": self.scores(x), "of": [y, "odd" if len(x) % 2 else "even"]}
