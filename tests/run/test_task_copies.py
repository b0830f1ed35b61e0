"""A task can be copied and pickled whenever it could before it met a Trainer."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import assert_same_weights, batches, quiet_trainer, run_python
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
        self.head = nn.Linear(3, 1)
        self.kept: Dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.head(self.net(batch)).mean()
        self.log("own", loss)
        return {"loss": loss, "seen": batch.mean()}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", self.head(self.net(batch)).mean())

    def forward(self, batch: Any) -> Any:
        return self.head(self.net(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept[f"outputs{batch_idx}"] = outputs


class OwnState(Net):
    """Says itself what is pickled of it."""

    def __getstate__(self) -> Any:
        return dict(self.__dict__)


def pickled(task: Any) -> Any:
    return pickle.loads(pickle.dumps(task))


WAYS = [copy.deepcopy, pickled]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Net, OwnState])
@pytest.mark.parametrize("verbs", ["fit", "validate", "predict", "fit validate"])
def test_after_every_verb(mode: str, way: Callable[[Any], Any], kind: Any, verbs: str) -> None:
    task, trainer = kind(), quiet_trainer(mode=mode, max_epochs=1)
    for verb in verbs.split():
        loaders = [batches(), batches()] if verb == "fit" else [batches()]
        getattr(trainer, verb)(task, *loaders)
    copied = way(task)
    assert_same_weights(copied, task)
    assert task.trainer is trainer
    with pytest.raises(ConfigurationError, match="not attached"):
        _ = copied.trainer
    for each in (task, copied):  # both go on, the copy under a Trainer of its own
        each.eval()
        flow.manual_seed(0)
        quiet_trainer(mode=mode, max_epochs=1, seed=0).fit(each, batches(), batches())
    assert_same_weights(copied, task)


@pytest.mark.parametrize("way", WAYS)
def test_in_the_hooks_of_a_fit_and_after_one_that_failed(
    mode: str, way: Callable[[Any], Any]
) -> None:
    class Copies(Callback):
        def __init__(self) -> None:
            self.copies = 0

        def copy(self, trainer: Any, task: Any, *_: Any) -> None:
            assert_same_weights(way(task), task)
            self.copies += 1

        on_fit_start = on_train_start = on_train_batch_end = on_validation_end = copy
        on_train_epoch_end = on_train_end = on_exception = copy

        def on_fit_end(self, trainer: Any, task: Any) -> None:
            raise KeyError

    task, copies = Net(), Copies()
    with pytest.raises(KeyError):
        quiet_trainer(mode=mode, max_epochs=1, callbacks=[copies], num_sanity_val_steps=0).fit(
            task, batches(), batches()
        )
    assert copies.copies == 8
    assert_same_weights(way(task), task)


def test_another_process_can_read_it(mode: str, tmp_path: Any) -> None:
    (tmp_path / "task_of_mine.py").write_text(
        "import oneflow as flow\n"
        "from ofengine import TaskModule\n"
        "class Task(TaskModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = flow.nn.Parameter(flow.zeros(1))\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return (self.weight * batch).sum()\n"
        "    def configure_optimizers(self):\n"
        "        return flow.optim.SGD(self.parameters(), lr=1.0)\n"
    )
    writes = (
        "import pickle, sys; sys.path.insert(0, '.')\n"
        "import oneflow as flow\n"
        "from ofengine import Trainer\n"
        "from task_of_mine import Task\n"
        "task = Task()\n"
        f"Trainer(mode={mode!r}, device='cpu', max_epochs=1, logger=False,\n"
        "        enable_checkpointing=False).fit(task, [flow.ones(1)] * 3)\n"
        "open('task.pickle', 'wb').write(pickle.dumps(task))\n"
    )
    reads = (
        "import pickle, sys; sys.path.insert(0, '.')\n"
        "task = pickle.load(open('task.pickle', 'rb'))\n"
        "print('weight', task.weight.numpy().item())\n"
    )
    for code in (writes, reads):
        done = run_python("-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "weight -3.0" in done.stdout
