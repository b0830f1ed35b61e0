"""Small tasks. ``helpers.resuming`` and ``helpers.tiny`` have their own."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence

import oneflow as flow
from oneflow import nn

from ofengine import TaskModule


class ByStep(TaskModule):
    """A task whose loss ``step`` makes of the task and of a batch; a subclass adds the modules."""

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(self, batch))


class Bare(TaskModule):
    """A task with a model of two inputs and one output, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)


class Line(Bare):
    """The loss is the mean output, in training and in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


class _Seeing(TaskModule):
    """Logs the mean of each batch of an evaluation as "seen"; SGD at one rate."""

    def __init__(self, rate: float, weight: float, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=bias)
        self.rate = rate
        with flow.no_grad():
            self.layer.weight.fill_(weight)
            if bias:
                self.layer.bias.zero_()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.rate)


class SquaredLine(_Seeing):
    """Half the sum of two inputs, and a bias that starts at 0; the loss is the mean square."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(rate, weight=0.5, bias=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch) ** 2).mean()


class MeanLine(_Seeing):
    """A weight of 0 for each of two inputs; the loss is the mean output, its gradient the input."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__(rate, weight=0.0, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()


class Scored(TaskModule):
    """A task that is told its ``scores``, one an epoch; a subclass logs them."""

    def __init__(self, scores: Optional[Sequence[float]] = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).pow(2).mean()
