"""What ``log`` reports is what the tensor was when ``log`` was called, whoever writes into it."""

from __future__ import annotations

from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, TaskModule

BATCHES = [flow.full((2, 1), float(number)) for number in range(1, 5)]


class Writes(TaskModule):
    """Writes into a parameter, a buffer and a result, after it has logged them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.tensor(8.0))
        self.register_buffer("count", flow.tensor(0.0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.weight * batch.mean()
        self.log("weight", self.weight, on_epoch=True)
        self.log("count", self.count, on_epoch=True)
        self.log("result", loss, on_epoch=True)
        self.count += 1
        loss += 100
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        seen = batch.mean()
        self.log("val_count", self.count)
        self.log("val_seen", seen)
        self.count += 1
        seen *= 100

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.5)


class Rows(Callback):
    """Reads every value of a step, when some more steps were made or at once."""

    def __init__(self) -> None:
        self.rows: List[Dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append(dict(trainer.callback_metrics))


# The weight goes 8, 7.5, 6.5, 5; the losses are weight * batch + 100.
EXPECTED = {
    "weight": [8.0, 7.5, 6.5, 5.0],
    "count": [0.0, 1.0, 2.0, 3.0],
    "result": [8.0, 15.0, 19.5, 20.0],
}


def test_each_step_s_value(mode: str) -> None:
    rows = Rows()
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[rows]).fit(Writes(), BATCHES)
    for name, values in EXPECTED.items():
        assert [row[f"{name}_step"] for row in rows.rows] == values, name
    assert [row["loss"] for row in rows.rows] == [108.0, 115.0, 119.5, 120.0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_epoch_s_mean(mode: str, accumulate: int) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Writes(), BATCHES)
    found = trainer.callback_metrics
    expected = {name: sum(values) / 4 for name, values in EXPECTED.items()}
    if accumulate == 2:  # 8, 8, 7.25, 7.25
        expected.update(weight=7.625, result=(8 + 16 + 21.75 + 29) / 4)
    assert {name: found[f"{name}_epoch"] for name in expected} == expected


def test_an_evaluation(mode: str) -> None:
    (found,) = quiet_trainer(mode=mode).validate(Writes(), BATCHES)
    assert found == {"val_count": 1.5, "val_seen": 2.5}


def test_a_view_of_what_is_written_into() -> None:  # a graph refuses such a write
    class Views(Writes):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("counts", flow.zeros(2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("second", self.counts[1], on_epoch=True)
            self.log("one", self.counts[:1], on_epoch=True)
            self.counts += 10
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(mode="eager", max_epochs=1)
    trainer.fit(Views(), BATCHES)
    found = trainer.callback_metrics
    assert (found["second_epoch"], found["one_epoch"]) == (15.0, 15.0)


class InHooks(Callback):
    """Logs what the optimizer and it itself write into later."""

    def __init__(self) -> None:
        self.own = flow.tensor(0.0)

    def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        task.log("before", task.weight, on_epoch=True)

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        task.log("own", self.own, on_epoch=True)
        self.own += 1


def test_hooks(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[InHooks()])
    trainer.fit(Writes(), BATCHES)
    found = trainer.callback_metrics
    assert (found["before_epoch"], found["own_epoch"]) == (27 / 4, 1.5)


class IntoTheLoss(Callback):
    """Writes into the loss it is given."""

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
        outputs["loss"] += 1000


def test_hooks_that_write_into_the_loss_they_are_given(mode: str) -> None:
    rows = Rows()
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[IntoTheLoss(), rows])
    trainer.fit(Writes(), BATCHES)
    assert [row["loss"] for row in rows.rows] == [108.0, 115.0, 119.5, 120.0]


class OneMemory(TaskModule):
    """Sums the losses up in the tensor that its first step returned."""

    total: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.tensor(8.0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.weight * batch.mean()
        if self.total is None:
            self.total = loss.detach()
        else:
            self.total += loss.detach()
        return loss

    def on_before_backward(self, loss: Any) -> None:
        if self.total is not None:
            self.total += 1

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.5)


def test_a_task_that_writes_into_the_loss_it_returned() -> None:
    trainer = quiet_trainer(mode="eager", max_epochs=1, log_every_n_steps=1000)
    trainer.fit(OneMemory(), BATCHES[:1])
    assert trainer.callback_metrics["loss"] == 8.0


class OfTwo(TaskModule):
    """Each of two weights is the loss of an optimizer that has it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(flow.tensor(1.0))
        self.two = nn.Parameter(flow.tensor(10.0))

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return getattr(self, optimizer_name) * batch.mean()

    def configure_optimizers(self) -> Any:
        one, two = (flow.optim.SGD([each], lr=0.0) for each in (self.one, self.two))
        return {"one": one, "two": {"optimizer": two, "every_n_batches": 2}}


class IntoEachLoss(Callback):
    """Writes into the loss of each optimizer."""

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
        for name in ("one", "two"):
            if name in outputs:
                outputs[name]["loss"] += 1000


def test_the_losses_of_several_optimizers(mode: str) -> None:
    rows = Rows()
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[IntoEachLoss(), rows]).fit(OfTwo(), BATCHES)
    assert [row["loss"] for row in rows.rows] == [11.0, 2.0, 33.0, 4.0]
