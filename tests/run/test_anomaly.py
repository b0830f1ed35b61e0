"""``detect_anomaly``: it names the step, the module or line and the direction, in both modes."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Callable, List

import oneflow as flow
import pytest
from helpers import bits, fill_deterministically, image_batches, quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, NonFiniteError, TaskModule

BAD = 3
"""The batch in which it happens."""


class Logarithm(nn.Module):
    def forward(self, x: Any) -> Any:
        moved = x * 2
        return flow.log(moved)


class Root(nn.Module):
    """Finite at 0, and its derivative is not."""

    def forward(self, x: Any) -> Any:
        return flow.sqrt(x)


class Net(TaskModule):
    """``scale`` is what a batch is multiplied by: ``good``, or what makes it go wrong."""

    good = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.logarithm, self.root = Logarithm(), Root()
        self.head = nn.Linear(6, 3)
        fill_deterministically(self.body, spread=0.4)
        fill_deterministically(self.head, spread=0.4, seed=3)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(poison: float, good: float = 1.0) -> List[Any]:
    found = []
    for index, (x, y) in enumerate(image_batches([8] * 5, (4,), classes=3)):
        found.append((x, y, flow.tensor([poison if index == BAD else good])))
    return found


def line_of(function: Any, text: str) -> str:
    """``file:number`` of the line of ``function`` that has ``text``."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    return f"{__file__}:{first + offset}: `{lines[offset].strip()}`"


def features(task: Net, x: Any) -> Any:
    return task.drop(task.body(x))


class LogOfZero(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, scale = batch
        hidden = features(self, x) + 1
        logs = flow.log(hidden * scale)
        return nn.functional.cross_entropy(self.head(logs * 0.01), y)


class InAModule(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, scale = batch
        logs = self.logarithm(features(self, x) * 0 + scale)
        return nn.functional.cross_entropy(self.head(logs), y)


class InALayer(Net):
    good = 1e-30

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(6, 3).requires_grad_(False)
        nn.init.constant_(self.big.weight, 1e30)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, scale = batch
        scores = self.big(features(self, x) * scale)
        return nn.functional.cross_entropy(scores, y)


class InBackward(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, scale = batch
        roots = self.root(features(self, x) * scale + scale)
        return nn.functional.cross_entropy(self.head(roots), y)


class InBackwardOfALine(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, scale = batch
        small = features(self, x) * scale + scale
        roots = flow.sqrt(small)
        return nn.functional.cross_entropy(self.head(roots), y)


class WeightsAlone(Net):
    """The gradient of the weights is infinite, and nobody asks for that of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        large = flow.ones(8, 6) * (batch[2] - 1)
        return (self.head(large) * 1e5).sum()


class Poisoned(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(features(self, batch[0])), batch[1]) * batch[2]


CASES = [
    (
        LogOfZero, 0.0,
        "the loss is nan",
        lambda: f"NaN arose first in the forward of 'head' (Linear), called at "
        f"{line_of(LogOfZero.training_step, 'self.head')}; infinite numbers had come up before, at "
        f"{line_of(LogOfZero.training_step, 'flow.log')} in the forward of LogOfZero",
    ),
    (
        LogOfZero, -1.0,
        "the loss is nan",
        lambda: f"NaN arose first at {line_of(LogOfZero.training_step, 'flow.log')} in the forward "
        "of LogOfZero",
    ),
    (
        InAModule, -1.0,
        "the loss is nan",
        lambda: f"NaN arose first at {line_of(Logarithm.forward, 'flow.log')} in the forward of "
        "'logarithm' (Logarithm)",
    ),
    (
        InALayer, 1e9,
        "the loss is nan",
        lambda: f"NaN arose first at {line_of(InALayer.training_step, 'cross_entropy')} in the "
        "forward of InALayer; infinite numbers had come up before, in the forward of 'big' "
        f"(Linear), called at {line_of(InALayer.training_step, 'self.big')}",
    ),
    (
        InBackward, 0.0,
        " numbers of 'body.0.weight' are not finite",
        lambda: "an infinite number arose first in the backward of 'root' (Root), called at "
        f"{line_of(InBackward.training_step, 'self.root')}",
    ),
    (
        InBackwardOfALine, 0.0,
        " numbers of 'body.0.weight' are not finite",
        lambda: "an infinite number arose first in the backward of what uses the result at "
        f"{line_of(InBackwardOfALine.training_step, 'small =')}",
    ),
    (
        WeightsAlone, 1e35,
        "numbers of 'head.weight' are not finite",
        lambda: "an infinite number arose first in the backward of 'head' (Linear): in the "
        "gradient of 'head.weight'",
    ),
    (
        Poisoned, float("nan"),
        "the loss is nan",
        lambda: "the batch itself has NaN, in a tensor of shape (1,)",
    ),
]  # fmt: skip


class Before(Callback):
    """The task's bits before each step."""

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        trainer.settle()
        self.bits = bits(task)


@pytest.mark.parametrize(("task", "poison", "what", "where"), CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_names_where_it_arose(
    mode: str, accumulate: int, task: Any, poison: float, what: str, where: Callable[[], str]
) -> None:
    net, before = task(), Before()
    trainer = quiet_trainer(
        mode=mode, max_epochs=1, seed=1, callbacks=before, accumulate_grad_batches=accumulate,
        detect_anomaly=True,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(net, data(poison, task.good))
    said = str(raised.value)
    step = BAD // accumulate
    assert said.startswith(f"in optimizer step {step} (from 0; epoch 0, batch {BAD}) the loss is ")
    assert what in said
    assert where() in said
    assert bits(net) == before.bits
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert sys.gettrace() is None or "coverage" in str(sys.gettrace())


def test_a_run_without_a_fault_is_the_same_to_the_bit(mode: str) -> None:
    found = []
    for detect in (False, True):
        net = LogOfZero()
        quiet_trainer(
            mode=mode, max_epochs=2, seed=1, accumulate_grad_batches=2, detect_anomaly=detect
        ).fit(net, data(1.0))
        found.append(bits(net))
    assert found[0] == found[1]


def test_an_update_that_is_at_fault_is_told_so(mode: str) -> None:
    class Leaping(Net):
        def __init__(self) -> None:
            super().__init__()
            self.still = nn.Parameter(flow.ones(2))  # its gradient is 0, and Adam divides 0 by 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scores = self.head(features(self, batch[0]))
            return nn.functional.cross_entropy(scores, batch[1]) + (self.still * 0).sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.Adam(self.parameters(), eps=0.0)

    trainer = quiet_trainer(mode=mode, max_epochs=1, detect_anomaly=True)
    with pytest.raises(
        NonFiniteError,
        match=r"not finite\. Replayed operation by operation: the loss and gradients of this batch "
        r"alone are finite, so it comes from the update: look at the learning rate",
    ):
        trainer.fit(Leaping(), data(1.0))


def test_a_mask_of_infinite_numbers_is_no_fault(mode: str) -> None:
    """Only a loss, gradients and weights that are not finite start the search."""

    class Masked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y, scale = batch
            mask = flow.tensor([0.0, float("-inf"), 0.0, 0.0, 0.0, 0.0])
            weights = nn.functional.softmax(features(self, x) + mask, dim=1)
            return nn.functional.cross_entropy(self.head(weights * scale), y)

    net = Masked()
    quiet_trainer(mode=mode, max_epochs=1, detect_anomaly=True).fit(net, data(1.0))
    with pytest.raises(NonFiniteError, match="the batch itself has NaN"):
        quiet_trainer(mode=mode, max_epochs=1, detect_anomaly=True).fit(net, data(float("nan")))


def test_its_argument_is_true_or_false() -> None:
    with pytest.raises(ConfigurationError, match="detect_anomaly=1: give True or False"):
        quiet_trainer(detect_anomaly=1)
