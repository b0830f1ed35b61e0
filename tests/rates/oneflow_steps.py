"""By how much each step moves each weight: in OneFlow alone, and through the engine."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import largest_difference, quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, RateError, TaskModule

SHORT = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")
Make = Callable[[Any], Any]


def ones() -> Any:
    return flow.ones(2)


# ---------------------------------------------------------------------- OneFlow alone


class Weights(nn.Module):
    """``count`` parameters at 0. The gradient of each is what is put in."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.p = nn.ParameterList([nn.Parameter(flow.zeros(2)) for _ in range(count)])

    def forward(self, x: Any) -> Any:
        total = x.sum() * 0.0
        for index in range(len(self.p)):
            total = total + (self.p[index] * x).sum()
        return total

    def first(self) -> List[float]:
        return [float(parameter.numpy()[0]) for parameter in self.p]


class PlainGraph(nn.Graph):
    """What OneFlow's users write."""

    def __init__(self, model: nn.Module, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.model = model
        self._debug_min_s_level = 3
        self.add_optimizer(optimizer, **({} if scheduler is None else {"lr_sch": scheduler}))

    def build(self, x: Any) -> Any:
        loss = self.model(x)
        loss.backward()
        return loss


def eager_steps(model: Weights, optimizer: Any, count: int = 1) -> List[List[float]]:
    """By how much each step of a plain eager loop moves each parameter down."""
    rows = [model.first()]
    for _ in range(count):
        model(ones()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append(model.first())
    return (-np.diff(np.array(rows), axis=0)).tolist()


def graph_steps(
    model: Weights,
    optimizer: Any,
    count: int = 1,
    scheduler: Any = None,
    meddle: Optional[Callable[[], None]] = None,
) -> List[List[float]]:
    """The same with a plain graph; ``meddle`` is called after each step."""
    graph = PlainGraph(model, optimizer, scheduler)
    rows = [model.first()]
    for _ in range(count):
        graph(ones())
        rows.append(model.first())
        if meddle is not None:
            meddle()
    return (-np.diff(np.array(rows), axis=0)).tolist()


def sgd(model: Any, *options: Dict[str, Any], lr: float = 1.0, **others: Any) -> Any:
    """SGD with one group for each parameter."""
    groups = [{"params": [p], **o} for p, o in zip(model.p, options)]
    return flow.optim.SGD(groups, lr=lr, **others)


# ---------------------------------------------------------------------- through the engine


class Task(TaskModule):
    """The same parameters as a task."""

    def __init__(
        self, options: Sequence[Dict[str, Any]], schedule: Optional[Make] = None, **others: Any
    ) -> None:
        super().__init__()
        self.p = nn.ParameterList([nn.Parameter(flow.zeros(2)) for _ in options])
        self.options, self.schedule, self.others = list(options), schedule, others

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        total = batch.sum() * 0.0
        for index in range(len(self.p)):
            total = total + (self.p[index] * batch).sum()
        return total

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self, *self.options, **self.others)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


class Moves(Callback):
    """By how much each step moves each parameter down."""

    def __init__(self, meddle: Optional[Callable[[Any, Any], None]] = None) -> None:
        self.rows: List[List[float]] = []
        self.before: List[float] = []
        self.meddle = meddle

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self.before = [float(parameter.numpy()[0]) for parameter in task.p]

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        after = [float(parameter.numpy()[0]) for parameter in task.p]
        self.rows.append([one - other for one, other in zip(self.before, after)])
        if self.meddle is not None:
            self.meddle(trainer, task)


def engine_steps(
    mode: str,
    task: TaskModule,
    count: int = 1,
    meddle: Optional[Callable[[Any, Any], None]] = None,
    **asked: Any,
) -> List[List[float]]:
    moves = Moves(meddle)
    asked.setdefault("max_epochs", 1)
    quiet_trainer(mode=mode, callbacks=[moves], **asked).fit(task, [ones() for _ in range(count)])
    return moves.rows


def refused(mode: str, task: TaskModule, match: str) -> None:
    """``fit`` raises :class:`RateError` before a weight has moved."""
    before = weights_of(task)
    with pytest.raises(RateError, match=match):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [ones()])
    assert largest_difference(before, weights_of(task))[0] == 0
