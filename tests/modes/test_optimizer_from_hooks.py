"""What a hook does with the optimizer or takes from the task: as in eager mode, to the bit."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer, random_rows
from oneflow import nn

from ofengine import TaskModule


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


DONE: Dict[str, Callable[[Any], Any]] = {
    "an option written": lambda task: options(task).__setitem__("weight_decay", 0.1),
    "options updated": lambda task: options(task).update(momentum=0.5),
    **{
        do.__name__.replace("_", " "): do
        for do in (zeroed, loaded, loaded_and_written, stepped_by_hand)
    },
    **{do.__name__.replace("_", " "): do for do in (swapped, one_taken_out, tied, pruned)},
}


def agree(do: Callable[[Any], Any], adam: bool = False, epochs: int = 1) -> List[Net]:
    """Both modes end with the same weights."""
    tasks = [Net(do, adam) for _ in range(2)]
    for task, mode in zip(tasks, ("eager", "graph")):
        quiet_trainer(mode=mode, max_epochs=epochs).fit(task, random_rows([2] * 5, 3))
    assert_same_weights(*tasks)
    return tasks


@pytest.mark.parametrize("do", DONE.values(), ids=DONE)
def test_a_hook_is_obeyed(do: Callable[[Any], Any]) -> None:
    agree(do)


def test_the_state_that_a_hook_reads_is_that_of_the_moment_and_its_count_goes_on() -> None:
    def read(task: Any) -> None:
        state = task.optimizer.state_dict()["state"]
        kept = task.optimizer._state[task.first.bias]["exp_avg"]
        task.seen.append((state["step"], kept.numpy().tolist()))

    eager, graph = agree(read, adam=True, epochs=2)
    assert [step for step, _ in eager.seen] == [3, 8]
    assert eager.seen == graph.seen
