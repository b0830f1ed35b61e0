"""What a traced step leaves behind: told by name, and undone."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import Bare, assert_same_weights, batches, quiet_trainer, refused
from oneflow import nn

from ofengine import GraphModeError, OFEngineWarning

GLOBAL: List[Any] = []


class Meter:
    """As users write them."""

    def __init__(self) -> None:
        self.values: List[Any] = []
        self.total: Any = 0.0
        self.last: Any = None

    def update(self, value: Any) -> None:
        self.values.append(value)


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.do: Any = lambda module, value: None
        self.seen: List[Any] = []

    def forward(self, batch: Any) -> Any:
        output = self.inner(batch)
        self.do(self, output.mean())
        return output


class Net(Bare):
    def __init__(self, do: Callable[[Any, Any], Any], where: str = "training_step") -> None:
        super().__init__()
        self.sub, self.meter = Sub(), Meter()
        self.outputs: List[Any] = []
        self.recent: Any = deque(maxlen=3)
        self.unique: Any = set()
        self.stages: Dict[str, Any] = {"train": [], "table": {}}
        self.deep = [{"a": ([], 1)}]
        self.do, self.where = do, where

    def _loss(self, batch: Any, where: str) -> Any:
        loss = self.layer(self.sub(batch)).mean()
        if where == self.where:
            self.do(self, loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._loss(batch, "training_step")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", self._loss(batch, "validation_step"))


def collecting_in_a_closure() -> Net:
    outputs_here: List[Any] = []
    return Net(lambda task, loss: outputs_here.append(loss))


def collecting_in_a_layer() -> Net:
    task = Net(lambda task, loss: None)
    task.sub.do = lambda sub, value: sub.seen.append(value)
    return task


COLLECT = {
    "self.outputs": lambda: Net(lambda task, loss: task.outputs.append(loss)),
    "self.outputs ": lambda: Net(lambda task, loss: task.outputs.append({"loss": [loss]})),
    "self.outputs  ": lambda: Net(lambda task, loss: task.outputs.extend((1, loss.detach()))),
    "self.recent": lambda: Net(lambda task, loss: task.recent.append(loss)),
    "self.unique": lambda: Net(lambda task, loss: task.unique.add(loss)),
    "self.stages['train']": lambda: Net(lambda task, loss: task.stages["train"].append(loss)),
    "self.deep['a']": lambda: Net(lambda task, loss: task.deep[0]["a"][0].append(loss)),
    "self.meter.values": lambda: Net(lambda task, loss: task.meter.update(loss)),
    "outputs_here": collecting_in_a_closure,
    "GLOBAL": lambda: Net(lambda task, loss: GLOBAL.append(loss)),
    "self.sub.seen": collecting_in_a_layer,
}


@pytest.mark.parametrize("name", COLLECT)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_list_that_a_step_collects_tensors_in_is_refused(name: str, accumulate: int) -> None:
    task = COLLECT[name]()
    before = repr((task.outputs, task.recent, task.unique, task.stages, task.deep, GLOBAL))
    refused(
        task, GraphModeError, f"training_step collects tensors in {_escaped(name)} ",
        "on_train_batch_end", mode="graph", accumulate_grad_batches=accumulate,
    )  # fmt: skip
    after = repr((task.outputs, task.recent, task.unique, task.stages, task.deep, GLOBAL))
    assert after == before
    assert not task.meter.values and not task.sub.seen
    assert_same_weights(copy.deepcopy(task), task)


def _escaped(name: str) -> str:
    return name.strip().replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")


@pytest.mark.parametrize("name", COLLECT)
def test_eager_mode_collects(name: str) -> None:
    task = COLLECT[name]()
    quiet_trainer(max_epochs=1).fit(task, batches(3))
    GLOBAL.clear()


def test_validation_is_told_before_training() -> None:
    task = Net(lambda task, loss: task.outputs.append(loss), "validation_step")
    refused(
        task, GraphModeError, r"validation_step collects tensors in self\.outputs", mode="graph",
        validation=batches(),
    )  # fmt: skip


def attribute_of_a_layer() -> Net:
    task = Net(lambda task, loss: None)
    task.sub.do = lambda sub, value: setattr(sub, "last", value)
    return task


KEPT = {
    "self.stages['table']": lambda: Net(lambda task, loss: task.stages["table"].update(a=loss)),
    "self.stages": lambda: Net(lambda task, loss: task.stages.update(loss=[loss])),
    "self.meter": lambda: Net(lambda task, loss: setattr(task.meter, "last", loss)),
    "self.meter ": lambda: Net(lambda t, loss: setattr(t.meter, "total", t.meter.total + loss)),
    "self.sub.last": attribute_of_a_layer,
    "self.last": lambda: Net(lambda task, loss: setattr(task, "last", loss)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_step_puts_into_a_place_is_told_and_taken_out(name: str) -> None:
    task = KEPT[name]()
    with pytest.warns(OFEngineWarning, match=_escaped(name)):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, batches(3), batches(1))
    assert task.stages == {"train": [], "table": {}}
    assert (task.meter.total, task.meter.last) == (0.0, None)
    assert not hasattr(task, "last")
    assert not hasattr(task.sub, "last")
    assert pickle.dumps(task.stages)


def test_a_table_that_is_made_once_is_made_in_each_trace() -> None:
    """As eager mode computes it; for each shape of batch, in training and in validation."""

    def masked(task: Any, batch: Any) -> Any:
        rows = batch.shape[0]
        if rows not in task.stages["table"]:
            task.stages["table"][rows] = flow.arange(rows).float()
        return task.stages["table"][rows]

    class Masked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.layer(self.sub(batch)).squeeze(1) * masked(self, batch)).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.training_step(batch, batch_idx))

    tasks = []
    for mode in ("eager", "graph"):
        flow.manual_seed(0)
        task = Masked(lambda task, loss: None)
        with flow.no_grad():
            for parameter in task.parameters():
                parameter.fill_(0.5)
        data = [flow.ones(3, 2), flow.ones(2, 2), flow.ones(3, 2)]
        trainer = quiet_trainer(mode=mode, max_epochs=2)
        if mode == "graph":
            with pytest.warns(OFEngineWarning, match=r"self\.stages\['table'\]"):
                trainer.fit(task, data, data)
        else:
            trainer.fit(task, data, data)
        tasks.append(task)
    assert_same_weights(*tasks)


@pytest.mark.parametrize("draws", [False, True])
def test_a_step_that_leaves_nothing_behind_is_not_told_of(
    draws: bool, recwarn: pytest.WarningsRecorder
) -> None:
    def local(task: Any, loss: Any) -> None:
        found = [loss, loss * 2]
        if draws:
            found.append(flow.rand(1))
        task.tables.setdefault((3, 2), ("made", "once"))

    task = Net(local)
    task.tables = {}
    quiet_trainer(mode="graph", max_epochs=1).fit(task, batches(), batches())
    assert task.tables == {(3, 2): ("made", "once")}
    assert not [each for each in recwarn if each.category is OFEngineWarning]


def test_what_hooks_collect_stays(mode: str) -> None:
    class Collects(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.outputs.append(outputs["loss"])

        def on_train_epoch_end(self) -> None:
            self.mean = flow.stack(self.outputs).mean().item()

    task = Collects(lambda task, loss: None)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, batches(3))
    assert len(task.outputs) == 3
    assert task.mean == pytest.approx(sum(each.item() for each in task.outputs) / 3)


# ---------------------------------------------------------------------- layers


HEADS = [nn.Linear(2, 1)]


@pytest.mark.parametrize(
    ("do", "name"),
    [
        (lambda task, loss: setattr(task, "head", nn.Linear(2, 1)), "self.head"),
        (lambda task, loss: setattr(task, "head", HEADS[0]), "self.head"),
        (lambda task, loss: setattr(task, "layer", HEADS[0]), "self.layer"),
        (lambda task, loss: setattr(task.sub, "head", HEADS[0]), "self.sub.head"),
        (lambda task, loss: setattr(task, "scale", nn.Parameter(flow.ones(1))), "self.scale"),
        (lambda task, loss: setattr(task, "heads", nn.ModuleList(HEADS)), "self.heads"),
    ],
)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_layer_made_in_a_traced_step_is_refused(do: Any, name: str, where: str) -> None:
    refused(
        Net(do, where), GraphModeError, f"{_escaped(name)} is a layer", "__init__",
        f"{where} at .*setattr", mode="graph", validation=batches(),
    )  # fmt: skip


def test_a_layer_without_parameters_may_be_made_anywhere(mode: str) -> None:
    task = Net(lambda task, loss: setattr(task, "act", nn.ReLU()))
    quiet_trainer(mode=mode, max_epochs=1).fit(task, batches())


# ---------------------------------------------------------------------- nothing to put out


@pytest.mark.parametrize("batch", [None, 3, "text", {}, []])
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_an_evaluation_without_tensors_runs(mode: str, batch: Any, verb: str) -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(flow.ones(4, 2)).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(flow.ones(4, 2))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    task, seen = Own(lambda task, loss: None), []
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    task.on_validation_batch_end = task.on_test_batch_end = lambda *_: seen.append(1)
    data = [batch] * 2
    if verb == "fit":
        trainer.fit(task, data, data)
        assert trainer.global_step == 2
    else:
        getattr(trainer, verb)(task, data)
