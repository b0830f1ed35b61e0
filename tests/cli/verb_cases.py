"""A file with a task, its data, a callback, and a run of it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from ofengine import Trainer, seed_everything
from ofengine.checkpoint import read
from ofengine.cli.tasks import module_of

FILE = '''
from typing import Any, Dict, List, Optional

import oneflow as flow
from oneflow import nn

from ofengine import Callback, DataModule, TaskModule


class Net(TaskModule):
    """Two layers.

    Args:
        width: how many features
            are between them.
        rate: the learning rate.
    """

    def __init__(
        self,
        width: int = 3,
        rate: float = 0.1,
        name: str = "1e-3",
        sizes: Optional[List[int]] = None,
    ) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, width), nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.25)
        self.rate, self.name, self.sizes = rate, name, sizes

    def forward(self, inputs: Any) -> Any:
        return self.head(self.dropout(self.body(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return ((self(inputs) - targets) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.rate, momentum=0.5)


class Wide(Net):
    def __init__(self, width: int, *, deep: int = 1, **more: Any) -> None:
        super().__init__(width, **more)


class Raises(Net):
    def __init__(self, width: int = 3) -> None:
        raise ValueError("no such thing.")


class Rows(DataModule):
    """Rows of numbers.

    Args:
        batch_size: rows of a batch.
    """

    def __init__(self, batch_size: int = 2) -> None:
        self.batch_size = batch_size

    def batches(self) -> Any:
        rows = flow.arange(32, dtype=flow.float32).reshape(-1, self.batch_size, 2) / 16 - 1
        return [(each, each.sum(dim=1, keepdim=True)) for each in rows]

    def train_dataloader(self) -> Any:
        return self.batches()

    def val_dataloader(self) -> Any:
        return self.batches()[:2]

    def test_dataloader(self) -> Any:
        return self.batches()[2:5]

    def predict_dataloader(self) -> Any:
        return [inputs for inputs, _ in self.batches()]


class Counts(Callback):
    every: List[int] = []

    def __init__(self, every: int = 1) -> None:
        self.every.append(every)
'''

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def weights_of(folder: Path) -> Dict[str, Any]:
    """The weights of the only checkpoint in a run's folder."""
    (path,) = (folder / "checkpoints").glob("*.safetensors")
    weights: Dict[str, Any] = read(path).weights
    return weights


def weights_by_hand(file: Path, seed: int, task: Dict[str, Any], **trainer: Any) -> Dict[str, Any]:
    """The weights of the run that a script makes of the same classes."""
    module = module_of(file)
    seed_everything(seed)
    net = module.Net(**task)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    off = {"enable_checkpointing": False, "logger": False}
    Trainer(seed=seed, **quiet, **off, **trainer).fit(net, datamodule=module.Rows())
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def differing(one: Dict[str, Any], other: Dict[str, Any]) -> List[str]:
    """The names whose values are not the same to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].tobytes() != np.asarray(other[name]).tobytes()]
