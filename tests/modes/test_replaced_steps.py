"""Steps that reach the task or its parameters by unusual ways train the same in both modes."""

from __future__ import annotations

import types
import warnings
from functools import partial
from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import MODES, bits, fill_deterministically, image_batches, quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule


class Net(TaskModule):
    """A network, and a layer that only ``listed`` leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 36, 5),
        )  # fmt: skip
        self.apart = nn.Linear(2, 2)
        self.listed = [self.apart.weight]
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9, weight_decay=0.01)


def twice(own: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    return 2 * own(batch, batch_idx)


REPLACEMENTS: Dict[str, Callable[[Any], Any]] = {
    "a partial": lambda task: partial(twice, task.training_step),
    "a closure": lambda task: lambda batch, i, own=task.training_step: 2 * own(batch, i),
    "a method": lambda task: types.MethodType(
        lambda self, batch, i: 2 * Net.training_step(self, batch, i), task
    ),
}
HOOKS = ("setup", "on_train_start", "on_train_epoch_start", "on_train_batch_start")


class Twice(Net):
    """What each of the replacements comes to."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 2 * super().training_step(batch, batch_idx)


def replacing(hook: str, replacement: Callable[[Any], Any]) -> Callback:
    """A callback that puts another ``training_step`` on the task at ``hook``, once."""

    def replace(trainer: Any, task: Any, *_: Any) -> None:
        if "training_step" not in vars(task):
            task.training_step = replacement(task)

    callback = Callback()
    setattr(callback, hook, replace)
    return callback


def trained(task: TaskModule, mode: str, *callbacks: Callback, **arguments: Any) -> Any:
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=list(callbacks), **arguments)
    with warnings.catch_warnings():
        # OneFlow's, of modules that are called as they are in a graph
        warnings.filterwarnings("ignore", ".*is called in a nn.Graph, but not registered.*")
        trainer.fit(task, image_batches([4, 4, 2]))
    return bits(task)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", list(REPLACEMENTS))
@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_that_was_replaced_trains(mode: str, name: str, hook: str) -> None:
    """Running statistics of batch norm, which the closure reaches as the task's own, included."""
    replaced = trained(Net(), mode, replacing(hook, REPLACEMENTS[name]))
    assert replaced == trained(Twice(), "eager")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_that_a_step_reaches_only_through_a_list_trains(accumulate: int) -> None:
    """OneFlow's graph would take it for a constant, and never change it."""

    class Listed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + sum((each**2).sum() for each in self.listed)

    eager, graph = (trained(Listed(), m, accumulate_grad_batches=accumulate) for m in MODES)
    assert eager == graph
    before = weights_of(Listed())
    assert eager["apart.weight"] != before["apart.weight"].tobytes()
    assert eager["apart.bias"] == before["apart.bias"].tobytes()  # in no loss: left alone


@pytest.mark.parametrize("mode", MODES)
def test_a_third_argument_keeps_its_default(mode: str) -> None:
    class Scaled(Net):
        def training_step(self, batch: Any, batch_idx: int, scale: float = 2.0) -> Any:
            return scale * super().training_step(batch, batch_idx)

    assert trained(Scaled(), mode) == trained(Twice(), "eager")


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_any_number_of_arguments_is_given_two(mode: str) -> None:
    counts: List[int] = []

    class Any_(Net):
        def training_step(self, *args: Any) -> Any:
            counts.append(len(args))
            return super().training_step(*args)

    assert trained(Any_(), mode) == trained(Net(), "eager")
    assert set(counts) == {2}


@pytest.mark.parametrize("mode", MODES)
def test_a_third_argument_that_nothing_fills_is_refused(mode: str) -> None:
    class Three(Net):
        def training_step(self, batch: Any, batch_idx: int, more: Any) -> Any:  # type: ignore[override]
            return super().training_step(batch, batch_idx)

    with pytest.raises(ConfigurationError, match=r"Three\.training_step.*batch, batch_idx\)"):
        trained(Three(), mode)
