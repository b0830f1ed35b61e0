"""What a step writes in place counts as in eager mode, or is told with the user's line."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, fill_deterministically, quiet_trainer, refused
from oneflow import nn

from ofengine import GraphModeError, OFEngineWarning, TaskModule

BESIDE = flow.zeros(2)


class Inner(nn.Module):
    """Keeps a running mean of what it is given."""

    def __init__(self, sets: bool) -> None:
        super().__init__()
        self.sets = sets
        self.register_buffer("mean", flow.zeros(2), persistent=False)

    def forward(self, x: Any) -> Any:
        if self.sets:
            self.mean = self.mean * 0.5 + x.detach().mean(0)
        else:
            self.mean.mul_(0.5).add_(x.detach().mean(0))
        return x - self.mean


class Writes(TaskModule):
    """Does ``write(task, out)`` in the middle of its step."""

    def __init__(self, write: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer, self.teacher = nn.Linear(3, 2), nn.Linear(3, 2)
        self.inner, self.setting = Inner(False), Inner(True)
        fill_deterministically(self, spread=0.4)
        for name, shape in {"center": 2, "kept": 2, "queue": (8, 2), "count": ()}.items():
            self.register_buffer(name, flow.zeros(shape))
        self.register_buffer("tied", self.center)
        self.beside, self.listed, self.write = flow.zeros(2), [flow.zeros(2)], write
        self.numbers = {"seen": 0}
        self.teacher.requires_grad_(False)
        center = self.center
        self.in_closure = lambda out: center.add_(out)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.setting(self.inner(self.layer(x)))
        written = self.write(self, out)
        out = out if written is None else written
        out = out - self.center - self.kept - self.teacher(x) * 0.1 + self.queue.mean(0) + self.tied
        return ((out - y) ** 2).mean() + self.count * self.layer.bias.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self.log("seen", self.count)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


def data() -> List[Any]:
    numbers = np.random.RandomState(0)
    made = [(numbers.randn(4, 3).astype("f4"), numbers.randn(4, 2).astype("f4")) for _ in range(3)]
    return [(flow.tensor(x), flow.tensor(y)) for x, y in made]


def ends(write: Any, mode: str, validates: bool = False, **settings: Any) -> Dict[str, bytes]:
    """All parameters and buffers, and what the task holds beside, after two epochs."""
    flow.manual_seed(0)
    BESIDE.zero_()
    task = Writes(write)
    trainer = quiet_trainer(mode=mode, max_epochs=2, **settings)
    trainer.fit(task, data(), data() if validates else None)
    tensors = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    tensors.update(beside=task.beside, listed=task.listed[0], out=BESIDE)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def everything(task: Any, out: Any) -> Any:
    """Operators in place of every kind, on every kind of tensor that a trace has not made."""
    mean = out.detach().mean(0)
    task.center.add_(mean).mul_(0.9).clamp_(max=1.5)
    task.in_closure(mean * 0.1)
    task.center.data.sub_(0.01)
    task.tied[0] = task.center[1]
    task.center[0:1] += 0.25
    task.count += 1
    task.beside.add_(1.0)
    task.listed[0].copy_(task.beside * 2 + mean)
    BESIDE.fill_(0.5)
    BESIDE.detach().add_(task.listed[0])
    task.queue[4:] = task.queue[:4].clone()
    task.queue[:4] = out.detach()
    for _, buffer in task.inner.named_buffers():
        buffer.div_(2.0)
    with flow.no_grad():
        for kept, own in zip(task.teacher.parameters(), task.layer.parameters()):
            kept.copy_(kept * 0.9 + own * 0.1)
    task.teacher.bias.data = task.teacher.bias.data * 0.5
    before = task.center.clone()
    task.center.zero_()
    task.center.copy_(before + BESIDE * 0.1)
    task.kept = task.kept * 0.5 + mean
    changed = out * 1.0
    changed.add_(1.0)
    changed[:, 0] *= 2.0
    return nn.functional.relu(changed, inplace=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_step_writes_is_what_eager_mode_writes(accumulate: int) -> None:
    """To the bit, with what reads it later in the step and in the next ones; nothing is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        runs = [ends(everything, mode, True, accumulate_grad_batches=accumulate) for mode in MODES]
    assert runs[0] == runs[1]
    assert len({runs[0][name] for name in ("center", "beside", "listed", "out", "inner.mean")}) == 5


def dropped(task: Any, out: Any) -> Any:
    changed = out * 1.0
    nn.functional.dropout(changed, 0.5, True, True)
    chances = flow.full((4, 2), 0.5)
    flow.bernoulli(chances, inplace=True)
    task.center.add_(changed.detach().mean(0))
    return changed * chances


@pytest.mark.parametrize("accumulate", [1, 2])
def test_so_it_is_with_what_is_drawn_in_place(accumulate: int) -> None:
    runs = [ends(dropped, mode, seed=0, accumulate_grad_batches=accumulate) for mode in MODES]
    assert runs[0] == runs[1]


def of_view(task: Any, out: Any) -> None:
    task.center.view(2, 1).add_(1.0)  # the line


def of_view_of_own(task: Any, out: Any) -> Any:
    doubled = out * 2
    doubled[:, 0].mul_(2.0)  # the line
    return doubled


def of_one_of_two(task: Any, out: Any) -> None:
    task.tied = task.tied * 0.5


def of_parameter(task: Any, out: Any) -> None:
    with flow.no_grad():
        task.layer.weight.mul_(0.9)  # the line


@pytest.mark.parametrize(
    "write, says",
    [
        (of_view, "writes in place into a view of self.center"),
        (of_view_of_own, "writes in place into a view at"),
        (of_one_of_two, "sets self.center, which the task holds at 2 places"),
        (of_parameter, "changes self.layer.weight, a parameter that trains"),
    ],
)
def test_what_cannot_be_as_in_eager_mode_is_refused(write: Any, says: str) -> None:
    refused(Writes(write), GraphModeError, says, mode="graph", train=data())


def of_batch(task: Any, out: Any) -> Any:
    """Nothing: the step below does it."""


class OfBatch(Writes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(2.0)
        return super().training_step(batch, batch_idx)


class OfSaved(Writes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.layer(batch[0])
        product = out * self.layer.bias  # its gradient needs out as it was
        out.mul_(10.0)
        return product.mean()


class OfNumbers(Writes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.numbers["seen"] += 1
        return super().training_step(batch, batch_idx)


class OwnGraph(nn.Graph):
    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(task.optimizer)

    def build(self, x: Any, y: Any) -> Any:
        self.task.center.add_(1.0)
        loss = ((self.task.layer(x) - y) ** 2).mean()
        loss.backward()
        return loss


class OfOwnGraph(Writes):
    def build_graph(self) -> Any:
        return OwnGraph(self)


@pytest.mark.parametrize(
    "kind, says",
    [
        (OfBatch, r"changes its batch in place at .*test_in_place\.py:\d+: `batch\[0\]\.mul_"),
        (OfSaved, r"in place at .*`out\.mul_\(10\.0\).* that the backward pass needs as it was"),
        (OfOwnGraph, r"OwnGraph\.build writes in place into center: a graph of your own forgets"),
        (OfNumbers, r"changes self\.numbers\['seen'\] in a compiled step, whose Python runs once"),
    ],
)
def test_what_another_mode_would_do_otherwise_is_told(kind: Any, says: str) -> None:
    given = data()
    before = given[0][0].numpy().tobytes()
    with pytest.warns(OFEngineWarning, match=says):
        quiet_trainer(mode="graph", max_epochs=1).fit(kind(of_batch), given)
    assert given[0][0].numpy().tobytes() == before  # it is the user's
