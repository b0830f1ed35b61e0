"""What a hook does with the optimizer or takes from the task: as in eager mode, to the bit."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer, random_rows, refused
from oneflow import nn

from ofengine import GraphModeError, TaskModule


class Net(TaskModule):
    """Two layers of one shape; at the batch of index 2 a hook does ``do(task)``."""

    def __init__(self, do: Callable[[Any], None], adam: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        fill_deterministically(self, spread=0.5)
        self.do, self.adam, self.seen = do, adam, []

    def loss(self, batch: Any) -> Any:
        return (self.last(self.second(self.first(batch))) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        if batch_idx == 2:
            self.do(self)

    def configure_optimizers(self) -> Any:
        if self.adam:
            return flow.optim.Adam(self.param_groups(), lr=0.1)
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)


class OwnGraph(nn.Graph):
    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(task.trainer.optimizer)

    def build(self, batch: Any) -> Any:
        loss = self.task.training_step(batch, 0)
        loss.backward()
        return loss


def options(task: Any) -> Any:
    return task.optimizer.param_groups[0].options


def zeroed(task: Any) -> None:
    for parameter in task.parameters():
        task.optimizer._state[parameter]["momentum_buf"].zero_()


def loaded(task: Any) -> None:
    state = task.optimizer.state_dict()
    state["state"]["step"] -= 1
    for kept in state["state"].values():
        if isinstance(kept, dict):
            kept["momentum_buf"] = kept["momentum_buf"] * 0.5
    state["param_groups"][0]["_options"]["momentum"] = 0.7
    task.optimizer.load_state_dict(state)


def loaded_and_written(task: Any) -> None:
    task.optimizer.load_state_dict(task.optimizer.state_dict())
    options(task)["weight_decay"] = 0.1


def stepped_by_hand(task: Any) -> None:
    task.loss(task.batch).backward()
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)


def swapped(task: Any) -> None:
    task.first, task.second = task.second, task.first


def one_taken_out(task: Any) -> None:
    task.first = nn.Identity()


def tied(task: Any) -> None:
    task.second.weight = task.first.weight


def pruned(task: Any) -> None:
    task.second.bias = None


def gradients_left(task: Any) -> None:
    task.loss(task.batch).backward()


def a_gradient_set(task: Any) -> None:
    task.first.bias.grad = flow.ones(3)


def gradients_halved(task: Any) -> None:
    for parameter in task.parameters():
        task.seen.append(float(parameter.grad.norm()))
        parameter.grad.mul_(0.5)


def gradients_dropped(task: Any) -> None:
    task.optimizer.zero_grad(set_to_none=True)


def data_replaced(task: Any) -> None:
    task.first.weight.data = task.first.weight.data * 0.5


DONE: Dict[str, Callable[[Any], Any]] = {
    "an option written": lambda task: options(task).__setitem__("weight_decay", 0.1),
    "options updated": lambda task: options(task).update(momentum=0.5),
    **{
        do.__name__.replace("_", " "): do
        for do in (zeroed, loaded, loaded_and_written, stepped_by_hand)
    },
    **{do.__name__.replace("_", " "): do for do in (swapped, one_taken_out, tied, pruned)},
    **{do.__name__.replace("_", " "): do for do in (gradients_left, a_gradient_set)},
}


def agree(
    do: Callable[[Any], Any], adam: bool = False, epochs: int = 1, **arguments: Any
) -> List[Net]:
    """Both modes end with the same weights."""
    tasks = [Net(do, adam) for _ in range(2)]
    for task, mode in zip(tasks, ("eager", "graph")):
        trainer = quiet_trainer(mode=mode, max_epochs=epochs, **arguments)
        trainer.fit(task, random_rows([2] * 5, 3))
    assert_same_weights(*tasks)
    return tasks


@pytest.mark.parametrize("do", DONE.values(), ids=DONE)
def test_a_hook_is_obeyed(do: Callable[[Any], Any]) -> None:
    agree(do)


@pytest.mark.parametrize("do", [gradients_halved, gradients_dropped, data_replaced, pruned])
def test_a_hook_finds_the_gradients_of_an_open_window_in_their_place(do: Any) -> None:
    eager, graph = agree(do, accumulate_grad_batches=2)
    assert eager.seen == graph.seen


def test_gradients_that_a_hook_leaves_are_refused_where_a_graph_of_one_s_own_updates() -> None:
    class Own(Net):
        def build_graph(self) -> Any:
            return OwnGraph(self)

    refused(Own(gradients_left), GraphModeError, r"build_graph\(\) takes none", mode="graph",
            train=random_rows([2] * 5, 3), trained=3)  # fmt: skip


def test_the_state_that_a_hook_reads_is_that_of_the_moment_and_its_count_goes_on() -> None:
    def read(task: Any) -> None:
        state = task.optimizer.state_dict()["state"]
        kept = task.optimizer._state[task.first.bias]["exp_avg"]
        task.seen.append((state["step"], kept.numpy().tolist()))

    eager, graph = agree(read, adam=True, epochs=2)
    assert [step for step, _ in eager.seen] == [3, 8]
    assert eager.seen == graph.seen
