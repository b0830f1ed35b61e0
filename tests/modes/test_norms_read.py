"""Running statistics that a step reads besides updating them: obeyed, or refused in a sentence."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import (
    Line,
    assert_same_weights,
    fill_deterministically,
    quiet_trainer,
    random_rows,
    refused,
)
from oneflow import nn
from oneflow.framework import c_api_util

from ofengine import GraphModeError


class Net(Line):
    """Calls a batch norm in training mode; ``do`` does something before that and behind it."""

    def __init__(self, do: Callable[[Any, Any, bool], Any]) -> None:
        super().__init__()
        self.norm, self.teacher, self.do = nn.BatchNorm1d(2), nn.BatchNorm1d(2), do

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        before = self.do(self, batch, True)
        output = self.norm(batch)
        behind = self.do(self, batch, False)
        return (self.layer(output) ** 2).mean() + before + behind


def in_eval_mode(task: Any, batch: Any) -> Any:
    task.norm.eval()
    output = task.norm(batch)
    task.norm.train()
    return output.mean()


def without_gradients(task: Any, batch: Any, is_before: bool) -> Any:
    with flow.no_grad():
        return in_eval_mode(task, batch) * 1.0 if is_before else 0.0


def copying(task: Any, batch: Any, is_before: bool) -> float:
    with flow.no_grad():
        for ours, theirs in zip(task.teacher.buffers(), task.norm.buffers()):
            ours.copy_(theirs)
    return 0.0


def logging_it(task: Any, batch: Any, is_before: bool) -> float:
    task.log("mean", task.norm.running_mean.mean())
    return 0.0


READ: Dict[str, Callable[[Any, Any, bool], Any]] = {
    "called in eval mode before": lambda t, b, first: in_eval_mode(t, b) if first else 0.0,
    "called in eval mode behind": lambda t, b, first: 0.0 if first else in_eval_mode(t, b),
    "copied": copying,
    "logged": logging_it,
}


@pytest.mark.parametrize("do", READ.values(), ids=READ)
def test_statistics_that_are_read_behind_their_update_are_refused(do: Any) -> None:
    refused(Net(do), GraphModeError, "reads the running statistics of self.norm", mode="graph")


def for_nothing(task: Any, batch: Any, is_before: bool) -> float:
    in_eval_mode(task, batch)
    return 0.0


@pytest.mark.parametrize("do", [without_gradients, for_nothing])
def test_a_call_in_eval_mode_that_reads_what_it_should_is_eager_mode_s(do: Any) -> None:
    tasks = [Net(do) for _ in range(2)]
    for task, mode in zip(tasks, ("eager", "graph")):
        fill_deterministically(task)
        quiet_trainer(mode=mode, max_epochs=2).fit(task, random_rows([4, 4], 2))
    assert_same_weights(*tasks)


class Norms(Line):
    """So many batch norms, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(count)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(self.norms(batch)) ** 2).mean()


def test_a_trace_is_read_as_often_whatever_the_number_of_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OneFlow hands out the whole step as text: once a layer made it quadratic."""
    read: List[int] = []
    own = c_api_util.GetCurrentJob

    def counted() -> Any:
        read.append(1)
        return own()

    monkeypatch.setattr(c_api_util, "GetCurrentJob", counted)
    times = {}
    for count in (2, 12):
        read.clear()
        quiet_trainer(mode="graph", max_epochs=1).fit(Norms(count), random_rows([4, 4], 2))
        times[count] = len(read)
    assert times[2] == times[12] > 0
