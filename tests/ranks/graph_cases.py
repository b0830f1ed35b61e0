"""What graph mode trains on several ranks, to be compared with one process on the whole batch.

Each case is a function of a :class:`Place`; alone, it takes batches as large as those of all ranks
together. Run as a program, one rank goes through all cases and writes down what it got.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset
from rank_cases import Result, SavesAt, weights
from rank_cases import Place as EagerPlace

from ofengine import Callback, TaskModule, Trainer
from ofengine.callbacks import EMAWeightAveraging, LRDecayCallback, ModelCheckpoint

CASES: Dict[str, Callable[[Place], Result]] = {}


def case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    CASES[function.__name__] = function
    return function


class Place(EagerPlace):
    """Where a case runs: on one of ``size`` ranks, or alone, with the batches of all of them."""

    def rows(self, batch_size: int) -> int:
        """``batch_size`` of each rank, in the rows that this process takes at once."""
        return batch_size * self.size if self.alone else batch_size

    def trainer(self, accumulate: int = 1, **options: Any) -> Trainer:
        given = {"accumulate_grad_batches": accumulate, "mode": "graph", **options}
        return super().trainer(**given)

    def loader(self, samples: int = 46, batch_size: int = 4, shuffle: bool = True) -> DataLoader:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((samples, 6)).astype(np.float32)
        data = TensorDataset(flow.tensor(x), flow.tensor(rng.integers(0, 3, samples)))
        return DataLoader(data, batch_size=self.rows(batch_size), shuffle=shuffle)


class Net(TaskModule):
    """Two layers, and one that nothing uses."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        flow.manual_seed(1)
        self.optimizer_name = optimizer
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.never = nn.Linear(2, 2)
        self.register_buffer("scale", flow.tensor([0.9]))

    def scores(self, x: Any) -> Any:
        return self.second(self.first(x).relu() * self.scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self.scores(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", (scores.argmax(dim=-1) == y).to(flow.float32).mean())
        return {"loss": loss, "scores": scores}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.scores(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(dim=-1) == y).to(flow.float32).mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.scores(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "sgd":
            return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return flow.optim.AdamW(self.parameters(), lr=0.02)


def fitted(task: TaskModule, trainer: Trainer, train: Any, val: Any = None, **options: Any) -> Result:
    before = {name: id(each) for name, each in task.named_parameters()}
    trainer.fit(task, train, val, **options)
    after = dict(task.named_parameters())
    assert {name: id(each) for name, each in after.items()} == before
    assert all(each.is_local for each in (*after.values(), *task.buffers()))
    return {
        "weights": weights(task),
        "metrics": dict(trainer.callback_metrics),
        "steps": trainer.global_step,
    }


@case
def five_steps_of_sgd(place: Place) -> Result:
    return fitted(Net(), place.trainer(max_steps=5, max_epochs=-1), place.loader())


@case
def five_steps_of_adamw(place: Place) -> Result:
    return fitted(Net("adamw"), place.trainer(max_steps=5, max_epochs=-1), place.loader())


@case
def epochs_with_an_uneven_end(place: Place) -> Result:
    """At the end of an epoch there are 6 rows, then, of validation, fewer than ranks."""
    val = place.loader(batch_size=3 * 3, samples=1 + place.rows(9) * (1 if place.alone else place.size))
    return fitted(Net(), place.trainer(), place.loader(), val)


def run_case(name: str, place: Place) -> Result:
    place.folder.mkdir(parents=True, exist_ok=True)
    flow.manual_seed(0)
    return CASES[name](place)


def main(folder: Path, names: Any) -> None:
    from ofengine.launch.environment import read

    world = read()
    assert world is not None
    results: Dict[str, Any] = {}
    for name in names:
        place = Place(world.world_size, False, folder / "ranks" / name, folder)
        results[name] = run_case(name, place)
    (folder / f"results_{world.rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
