"""A regression of table rows whose run is a config file: there is no Trainer in here.

The rows are made up: ten numbers between 0 and 1, five of which say what is asked for, by
Friedman's formula (1991), plus noise of a standard deviation of 1. So no model can have a
root-mean-square error below 1; the task gets to 1.1. A picture of it is in the run's folder.

    ofengine fit --config examples/tabular_regression.yaml
    ofengine fit --config examples/tabular_regression.yaml --mode eager --task.width 16
    ofengine test --config examples/tabular_regression.yaml --ckpt_path last
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, DataModule, TaskModule, Trainer


class Regression(TaskModule):
    """A number for each row, by a network of two hidden layers.

    Args:
        width: features in a hidden layer.
        rate: the learning rate at the beginning; it falls to 0 along a cosine.
        weight_decay: how much all weights are drawn towards 0.
    """

    def __init__(self, width: int = 32, rate: float = 0.05, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, rows: flow.Tensor) -> flow.Tensor:
        return self.model(rows).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        rows, targets = batch
        return ((self(rows) - targets) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        rows, targets = batch
        predicted = self(rows)
        self.log("val_mse", ((predicted - targets) ** 2).mean(), prog_bar=True)
        return predicted

    def test_step(self, batch: Any, batch_idx: int) -> None:
        rows, targets = batch
        self.log("test_mse", ((self(rows) - targets) ** 2).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Dict[str, Any]:
        rate, decay = self.hparams["rate"], self.hparams["weight_decay"]
        optimizer = flow.optim.SGD(self.param_groups(), lr=rate, momentum=0.9, weight_decay=decay)
        steps = self.trainer.total_steps
        schedule = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Friedman(DataModule):
    """Rows that Friedman's formula makes, the same for the same seed.

    Args:
        rows: how many to train on; a fourth as many to validate, and to test.
        noise: the standard deviation of what the formula does not say.
        batch_size: rows of a batch.
        seed: which rows.
    """

    def __init__(
        self, rows: int = 2000, noise: float = 1.0, batch_size: int = 50, seed: int = 0
    ) -> None:
        self.rows, self.noise, self.batch_size, self.seed = rows, noise, batch_size, seed

    def made(self, part: int, rows: int) -> TensorDataset:
        """Rows (n, 10) and their targets (n,), less the mean of all targets."""
        draw = np.random.RandomState(3 * self.seed + part)
        x = draw.uniform(size=(rows, 10))
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
        y += 10 * x[:, 3] + 5 * x[:, 4] + draw.normal(scale=self.noise, size=rows) - 14.4
        return TensorDataset(*(flow.tensor(each.astype(np.float32)) for each in (x, y)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.made(0, self.rows), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.made(1, self.rows // 4), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.made(2, self.rows // 4), self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()


class Picture(Callback):
    """Draws the error by epoch, and what was predicted against what was right.

    Args:
        file: the picture's name in the run's folder.
    """

    rank_zero_only = True

    def __init__(self, file: str = "regression.png") -> None:
        self.file = file
        self.errors: List[float] = []
        self.predicted: List[np.ndarray] = []
        self.targets: List[np.ndarray] = []

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        self.predicted, self.targets = [], []

    def on_validation_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        self.predicted.append(outputs.numpy())
        self.targets.append(batch[1].numpy())

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        if not trainer.sanity_checking:
            self.errors.append(trainer.callback_metrics["val_mse"] ** 0.5)

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(range(1, len(self.errors) + 1), self.errors, marker=".")
        left.axhline(1, color="gray", linestyle=":", label="the noise, no model gets below it")
        left.set(xlabel="epoch", ylabel="root-mean-square error", title="validation")
        left.legend()
        targets, predicted = np.concatenate(self.targets), np.concatenate(self.predicted)
        right.scatter(targets, predicted, s=8, alpha=0.5)
        right.plot(targets, targets, color="gray", linewidth=0.8)
        right.set(xlabel="target", ylabel="predicted", title=f"{len(targets)} rows held out")
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.file
        figure.savefig(path, dpi=110)
        trainer.print(f"The picture is {path}")
