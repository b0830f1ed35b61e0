"""What a module holds, hooks, and the memory of tensors may change between two steps."""

from __future__ import annotations

from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer, random_rows, refused
from oneflow import nn

from ofengine import GraphModeError, TaskModule


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.row, self.some = nn.Sequential(nn.Tanh()), nn.ModuleList([nn.Tanh(), nn.Sigmoid()])
        self.named = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Tanh()})
        self.register_buffer("scale", flow.ones(1))
        fill_deterministically(self, spread=0.5)
        self.shift = {"all": [flow.ones(1)]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.row(self.layer(batch))
        for each in (*self.some, *self.named.values()):
            x = each(x)
        for name, _ in self.named_children():
            x = x * 2.0 if name == "more" else x
        x = x * self.scale + self.shift["all"][0]
        return ((x * self.other if hasattr(self, "other") else x) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.5, momentum=0.9)


STRUCTURES: Dict[str, Callable[[Net], Any]] = {
    "add_module": lambda task: task.row.add_module("more", nn.Sigmoid()),
    "append": lambda task: task.some.append(nn.Sigmoid()),
    "insert": lambda task: task.some.insert(0, nn.ReLU()),
    "del of a list": lambda task: task.some.__delitem__(0),
    "an entry of a list": lambda task: task.some.__setitem__(0, nn.ReLU()),
    "an entry of a dict": lambda task: task.named.update({"a": nn.ReLU()}),
    "del of a dict": lambda task: task.named.pop("a"),
    "a further child": lambda task: setattr(task, "more", nn.Identity()),
    "a new buffer": lambda task: task.register_buffer("other", flow.ones(1) * 0.5),
    "a buffer replaced": lambda task: task.register_buffer("scale", flow.ones(1) * 0.5),
    "a parameter's hook": lambda task: task.layer.weight.register_hook(lambda grad: grad * 0.0),
    "data of a tensor beside": lambda task: setattr(task.shift["all"][0], "data", flow.zeros(1)),
}


def fitted(mode: str, change: Callable[[Net], Any], at: Any = (2,)) -> Net:
    task = Net()
    task.on_train_batch_start = lambda batch, i: change(task) if i in at else None
    quiet_trainer(mode=mode, max_epochs=1).fit(task, random_rows((4,) * 5, 3))
    return task


@pytest.mark.parametrize("change", STRUCTURES)
def test_a_change_of_what_is_held_counts_as_in_eager_mode(change: str) -> None:
    eager, graph = (fitted(mode, STRUCTURES[change]) for mode in ("eager", "graph"))
    assert_same_weights(eager, graph)
    with pytest.raises(AssertionError):  # it does make a difference
        assert_same_weights(eager, fitted("eager", lambda task: None))


def test_data_of_a_tensor_that_came_later() -> None:
    def change(task: Net) -> None:
        if task.scale.item() == 1.0:
            task.scale = flow.ones(1) * 3.0
        else:
            task.scale.data = flow.ones(1) * 0.1

    assert_same_weights(*(fitted(mode, change, (1, 3)) for mode in ("eager", "graph")))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_forward_hook_that_is_registered_later_is_refused(kind: str) -> None:
    task = Net()
    task.on_train_batch_end = lambda *_: getattr(task.layer, kind)(lambda *args: None)
    refused(
        task, GraphModeError, "has a forward hook", 'mode="eager"', mode="graph",
        train=random_rows((4, 4), 3), trained=1,
    )  # fmt: skip


def test_the_methods_of_others_are_as_before_after_a_fit() -> None:
    before = [nn.Module.add_module, nn.ModuleList.insert, vars(nn.ModuleDict).get("clear")]
    register_hook = flow.Tensor.register_hook
    fitted("graph", lambda task: None)
    assert before == [nn.Module.add_module, nn.ModuleList.insert, vars(nn.ModuleDict).get("clear")]
    assert flow.Tensor.register_hook is register_hook
