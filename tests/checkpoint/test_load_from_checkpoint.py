"""``load_from_checkpoint``: how it is called, and what it says where that is not so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import ConfigurationError, TaskModule


class Wide(TaskModule):
    """A layer of ``width`` inputs."""

    def __init__(self, width: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.hparams.lr)


def saved(task: TaskModule, folder: Path, width: int = 2) -> Path:
    """A checkpoint of ``task``, which has trained for a step."""
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(task, [flow.ones(3, width)])
    return trainer.save_checkpoint(folder / "saved.safetensors")


def test_on_an_object_it_is_refused_and_the_object_stays(tmp_path: Path) -> None:
    task = Wide(width=3)
    path = saved(task, tmp_path, width=3)
    before = task.layer.weight.numpy().copy()
    with pytest.raises(ConfigurationError, match=r"on the class.*Wide.load_from_checkpoint\(path"):
        task.load_from_checkpoint(path)
    assert (task.layer.weight.numpy() == before).all()


def test_a_subclass_may_write_its_own_and_call_that_of_its_base(tmp_path: Path) -> None:
    class Narrow(Wide):
        @classmethod
        def load_from_checkpoint(cls, path: Any, **arguments: Any) -> Any:
            return super().load_from_checkpoint(path, lr=0.5, **arguments)

    task = Narrow.load_from_checkpoint(saved(Narrow(width=3), tmp_path, width=3))
    assert (type(task), task.hparams) == (Narrow, {"width": 3, "lr": 0.5})
