"""``BatchSizeFinder`` sets the size before the data is made, keeps it, and sees that it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import oneflow as flow
import pytest
from helpers import run_python
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import CheckpointError, ConfigurationError, DataModule, TaskModule, Trainer
from ofengine.callbacks import BatchSizeFinder, ModelCheckpoint


class Sized(TaskModule):
    def __init__(self, samples: int = 20) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, 3
        self.body = nn.Linear(4, 1)
        self.rows: List[int] = []

    def setup(self, stage: str) -> None:
        self.data = TensorDataset(flow.ones(self.samples, 4))

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=self.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.body(batch[0]).mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rows.append(len(batch[0]))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.1)


class Told(Trainer):
    """A Trainer whose search is not made."""

    answer = 8
    asked: Optional[Dict[str, Any]] = None

    def scale_batch_size(self, task: Any, train_dataloaders: Any = None, **how: Any) -> int:
        self.asked = how
        return min(self.answer, how["max_val"])


def told(*callbacks: Any, **arguments: Any) -> Told:
    return Told(
        device="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks],
        **{"max_epochs": 1, "enable_checkpointing": False, **arguments},
    )  # fmt: skip


SCRIPT = """
import sys
from test_batch_size_finder import *

finder, task = BatchSizeFinder("binsearch", steps_per_trial=1, init_val=1, max_val=2), Sized(5)
Trainer(
    device="cpu", mode=sys.argv[1], max_epochs=1, callbacks=[finder], enable_progress_bar=False,
    enable_model_summary=False,
).fit(task)
print(finder.optimal_batch_size, task.batch_size, task.rows)
"""


@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_a_size_that_was_tried_is_trained_with(mode: str, tmp_path: Path) -> None:
    """Each try is a process, which leaves no folder."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_python("script.py", mode, cwd=tmp_path, env=environment())
    assert done.stdout == "2 2 [2, 2, 1]\n", done.stderr
    assert [each.name for each in (tmp_path / "ofengine_logs").iterdir()] == ["version_0"]


def environment() -> Dict[str, str]:
    here = Path(__file__).resolve().parent
    paths = map(str, (here.parents[1], here.parent, here))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_the_data_is_made_with_it_and_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    finder, task = BatchSizeFinder(), Sized()
    task.hparams["batch_size"] = 3
    trainer = told(finder, ModelCheckpoint(tmp_path), max_epochs=2)
    trainer.fit(task)
    assert task.rows == [8, 8, 4] * 2 and task.batch_size == task.hparams.batch_size == 8
    assert trainer.asked == {
        "mode": "power", "steps_per_trial": 3, "init_val": 2, "max_trials": 25, "max_val": 20,
        "memory_limit": 0.5,
    }  # fmt: skip
    resumed, other = told(BatchSizeFinder(), max_epochs=3), Sized()
    resumed.fit(other, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert resumed.asked is None, "a run that is resumed has its size"
    assert other.rows == [8, 8, 4]


def test_a_run_that_had_no_finder_goes_on_as_it_was(tmp_path: Path) -> None:
    trainer = told(ModelCheckpoint(tmp_path))
    trainer.fit(Sized())
    resumed, task = told(BatchSizeFinder(), max_epochs=2), Sized()
    resumed.fit(task, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert resumed.asked is None and task.rows == [3] * 6 + [2]


def test_it_is_never_more_than_there_are_samples() -> None:
    finder = BatchSizeFinder(init_val=16)
    trainer = told(finder)
    trainer.fit(Sized(5))
    assert finder.optimal_batch_size == 5 and trainer.asked is not None
    assert (trainer.asked["init_val"], trainer.asked["max_val"]) == (5, 5)


def test_a_data_module_s_size_is_set() -> None:
    class Data(DataModule):
        batch_size = 3

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(flow.ones(20, 4)), batch_size=self.batch_size)

    task, data = Sized(), Data()
    told(BatchSizeFinder()).fit(task, datamodule=data)  # type: ignore[arg-type]
    assert data.batch_size == 8 and task.batch_size == 3 and task.rows == [8, 8, 4]


def test_what_it_cannot_change_is_told() -> None:
    class Without(Sized):
        train_dataloader = TaskModule.train_dataloader

    class Fixed(Sized):
        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_size=4)

    given = [(flow.ones(4, 4),)] * 3
    with pytest.raises(ConfigurationError, match=r"cannot change the batches of a dataloader"):
        told(BatchSizeFinder()).fit(Without(), given)
    for data in (None, given):
        task = Fixed() if data is None else Sized()
        with pytest.raises(ConfigurationError, match=r"has set batch_size to 8, and the first"):
            told(BatchSizeFinder()).fit(task, data)
    with pytest.raises(ConfigurationError, match=r"set 'size', and Sized has no such attribute: w"):
        told(BatchSizeFinder(batch_arg_name="size")).fit(Sized())


def test_a_state_of_a_stranger_is_refused(tmp_path: Path) -> None:
    class Forged(BatchSizeFinder):
        def state_dict(self) -> Dict[str, Any]:
            return {"batch_size": "8", "name": "batch_size"}

    Forged.__qualname__ = "BatchSizeFinder"
    trainer = told(Forged(), ModelCheckpoint(tmp_path))
    trainer.fit(Sized())
    with pytest.raises(CheckpointError, match="the state of BatchSizeFinder is wrong"):
        told(BatchSizeFinder(), max_epochs=2).fit(
            Sized(), ckpt_path=trainer.checkpoint_callback.best_model_path
        )


def test_a_dev_run_searches_nothing() -> None:
    trainer, task = told(BatchSizeFinder(), fast_dev_run=1), Sized()
    trainer.fit(task)
    assert trainer.asked is None and task.rows == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "double"}, r"mode='double'"),
        ({"steps_per_trial": 0}, "steps_per_trial=0"),
        ({"init_val": 9, "max_val": 8}, "init_val=9 is more than max_val=8"),
        ({"batch_arg_name": "a b"}, "batch_arg_name='a b'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchSizeFinder(**arguments)
