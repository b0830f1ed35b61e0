"""What a traced step sets by name, outside its objects, and on layers, is told."""

from __future__ import annotations

from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import Bare, batches, quiet_trainer
from oneflow import nn

from ofengine import OFEngineWarning

COUNT: Any = 0
LAST: Any = None
TABLE: Any = None


class Meter:
    """Counts by its class, and in slots."""

    __slots__ = ("total",)
    seen = 0
    latest: Any = None

    def __init__(self) -> None:
        self.total = 0.0

    def update(self, value: Any) -> None:
        Meter.seen += 1

    def keep(self, value: Any) -> None:
        Meter.latest = value


class Net(Bare):
    steps = 0

    def __init__(self, do: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.meter, self.do = Meter(), do
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(self.drop(self.norm(batch))).mean()
        self.do(self, loss)
        return loss


def by_global(task: Any, loss: Any) -> None:
    global COUNT
    COUNT += 1


def by_default(task: Any, loss: Any, seen: Any = []) -> None:  # noqa: B006
    seen.append(1)


def tensor_in_a_global(task: Any, loss: Any) -> None:
    global LAST
    LAST = loss.detach()


def in_a_closure() -> Callable[[Any, Any], None]:
    count = 0

    def do(task: Any, loss: Any) -> None:
        nonlocal count
        count += 1

    return do


def by_class(task: Any, loss: Any) -> None:
    type(task).steps += 1
    Net.steps += 1


def in_slots(task: Any, loss: Any) -> None:
    task.meter.total += 1


CHANGES: Dict[str, Callable[[Any, Any], Any]] = {
    "changes COUNT ": by_global,
    "changes count ": in_a_closure(),
    "changes Net.steps ": by_class,
    "changes Meter.seen ": lambda task, loss: task.meter.update(loss),
    "changes self.meter.total ": in_slots,
    "changes by_default.__defaults__ ": by_default,
    "puts tensors into LAST ": tensor_in_a_global,
    "puts tensors into Meter.latest ": lambda task, loss: task.meter.keep(loss),
    "puts tensors into self.meter ": lambda task, loss: setattr(task.meter, "total", loss),
    "changes self.norm.training ": lambda task, loss: task.norm.eval(),
    "changes self.drop.training ": lambda task, loss: task.drop.eval(),
    "changes self.layer.weight.requires_grad, self.layer.bias.requires_grad ": lambda task, loss: (
        task.layer.requires_grad_(False)
    ),
}


@pytest.mark.parametrize("said", CHANGES)
def test_what_a_step_sets_is_told(said: str) -> None:
    task = Net(CHANGES[said])
    with pytest.warns(OFEngineWarning, match=f"training_step {said}"):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, batches(1))
    assert LAST is None and Meter.latest is None  # taken out again


def test_what_is_as_before_after_a_step_or_is_made_once_is_not_told_of(
    recwarn: pytest.WarningsRecorder,
) -> None:
    def switching(task: Any, loss: Any) -> None:
        global COUNT, TABLE
        COUNT, before = -1, COUNT
        COUNT = before
        TABLE = TABLE or ("made", "once")
        task.norm.eval()
        task.norm(flow.ones(2, 2))
        task.norm.train()
        task.layer.requires_grad_(False)
        task.layer(flow.ones(2, 2))
        task.layer.requires_grad_(True)

    class Beforehand(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.norm.eval()
            self.norm.weight.requires_grad_(False)
            return super().training_step(batch, batch_idx)

    quiet_trainer(mode="graph", max_epochs=1).fit(Beforehand(lambda task, loss: None), batches(1))
    quiet_trainer(mode="graph", max_epochs=1).fit(Net(switching), batches(1))
    assert TABLE == ("made", "once")
    assert not [each for each in recwarn if each.category is OFEngineWarning]
