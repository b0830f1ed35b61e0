"""What a compiled step read is watched: a change made in a hook counts from the next step on."""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
import warnings
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer
from oneflow import nn

from ofengine import Callback, OFEngineWarning, TaskModule

RATE_OF_GLOBAL = 1.0
SETTINGS = {"weight": 1.0}


@dataclasses.dataclass
class Config:
    alpha: float = 1.0
    kind: str = "square"


class Net(TaskModule):
    """Reads a value of every kind; its loss is another where any of them is another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.0)
        self.act: nn.Module = nn.ReLU()
        self.blocks = nn.Sequential(nn.Identity(), nn.Identity())
        self.register_buffer("shift", flow.zeros(4))
        fill_deterministically(self, spread=0.3)
        self.alpha, self.flag, self.missing = 1.0, False, None
        self.weights = {"a": 1.0, "inner": {"b": 1.0}}
        self.config, self.space = Config(), types.SimpleNamespace(beta=1.0)
        self.powers, self.pair = [1.0, 1.0], (1.0, 1.0)
        self.array = np.ones(2, "float32")
        self.plain = flow.ones(4)
        self.helper: Callable[[Any], Any] = lambda x: x

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = self.helper(self.blocks(self.drop(self.norm(self.act(self.first(x))))))
        x = (x + self.shift) * self.plain
        loss = ((self.second(x) - y) ** 2).mean() * self.alpha * RATE_OF_GLOBAL
        loss = loss * self.weights["a"] * self.weights["inner"]["b"] * self.config.alpha
        loss = loss * self.space.beta * self.powers[0] * self.pair[1] * float(self.array[1])
        if self.flag:
            loss = loss + self.first.weight.abs().mean()
        if self.config.kind == "cube":
            loss = loss * loss * loss
        if self.missing is not None:
            loss = loss + (self.first.weight * self.missing).mean()
        return loss * SETTINGS["weight"]

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.5)


def data(count: int = 6) -> List[Any]:
    generator = np.random.RandomState(0)
    rows = [generator.randn(8, width).astype("f4") for _ in range(count) for width in (4, 1)]
    return [(flow.tensor(x), flow.tensor(y)) for x, y in zip(rows[::2], rows[1::2])]


class At(Callback):
    """Does something to the task before a batch."""

    def __init__(self, changes: Dict[int, Callable[[Any], Any]]) -> None:
        self.changes = changes

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.changes:
            self.changes[batch_idx](task)


def assign(path: str, value: Any) -> Callable[[Any], None]:
    def change(task: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            task = getattr(task, parent)
        setattr(task, name, value)

    return change


def set_global(task: Any) -> None:
    global RATE_OF_GLOBAL
    RATE_OF_GLOBAL = 0.5


def entry(holder: str, key: Any, value: Any) -> Callable[[Any], None]:
    def change(task: Any) -> None:
        getattr(task, holder)[key] = value

    return change


CHANGES: Dict[str, Callable[[Any], Any]] = {
    "a number": assign("alpha", 0.25),
    "a sign of zero and back": assign("alpha", -0.0),
    "a flag": assign("flag", True),
    "a dict's entry": entry("weights", "a", 0.25),
    "an entry of a dict in a dict": lambda task: task.weights["inner"].update(b=0.25),
    "a dataclass's field": assign("config.alpha", 0.25),
    "a text": assign("config.kind", "cube"),
    "a namespace": assign("space.beta", 0.25),
    "a list's element": entry("powers", 0, 0.25),
    "a tuple": assign("pair", (1.0, 0.25)),
    "an array in place": entry("array", 1, 0.25),
    "a global": set_global,
    "a global dict's entry": lambda task: SETTINGS.update(weight=0.25),
    "a buffer rebound": lambda task: assign("shift", flow.ones(4))(task),
    "a buffer filled in place": lambda task: task.shift.fill_(0.5),
    "a tensor rebound": lambda task: assign("plain", flow.ones(4) * 0.5)(task),
    "None becomes a tensor": lambda task: assign("missing", flow.ones(4, 4))(task),
    "parameter.data": lambda task: assign("first.weight.data", task.first.weight.data * 0.5)(task),
    "parameter in place": lambda task: task.first.weight.data.mul_(0.5),
    "dropout.p": assign("drop.p", 0.5),
    "momentum of a batch norm": assign("norm.momentum", 0.5),
    "eps of a batch norm": assign("norm.eps", 0.5),
    "a batch norm in eval mode": lambda task: task.norm.eval(),
    "the whole task in eval mode": lambda task: task.eval(),
    "a submodule": assign("act", nn.Sigmoid()),
    "a submodule by its index": lambda task: task.blocks.__setitem__(1, nn.Tanh()),
    "a helper": assign("helper", flow.tanh),
    "a step": lambda task: assign(
        "training_step", lambda batch, batch_idx: task.second(task.first(batch[0])).mean()
    )(task),
    "a frozen layer": lambda task: task.first.requires_grad_(False),
    "one frozen parameter": lambda task: setattr(task.first.weight, "requires_grad", False),
}


def fitted(mode: str, changes: Dict[int, Callable[[Any], Any]], **arguments: Any) -> Net:
    global RATE_OF_GLOBAL
    RATE_OF_GLOBAL = SETTINGS["weight"] = 1.0
    task = Net()
    trainer = quiet_trainer(mode=mode, max_epochs=1, seed=1, callbacks=At(changes), **arguments)
    trainer.fit(task, data())
    return task


@functools.lru_cache(maxsize=None)
def unchanged_of(accumulate: int) -> Net:
    return fitted("eager", {}, accumulate_grad_batches=accumulate)


IN_WINDOWS = [
    "a number", "an array in place", "a buffer rebound", "a tensor rebound", "parameter.data",
    "None becomes a tensor", "parameter in place", "dropout.p", "a batch norm in eval mode",
    "a submodule", "a step", "a frozen layer", "one frozen parameter",
]  # fmt: skip
"""One of each way in which a graph reads what is changed, and all that the update's graph reads."""


@pytest.mark.parametrize(
    ("change", "accumulate"),
    [
        *((each, 1) for each in CHANGES),
        *((each, 2) for each in IN_WINDOWS),
        *(pytest.param(c, 2, marks=pytest.mark.slow) for c in CHANGES if c not in IN_WINDOWS),
    ],
)
def test_a_change_in_a_batch_hook_counts_as_in_eager_mode(change: str, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    eager = fitted("eager", {3: CHANGES[change]}, **options)
    graph = fitted("graph", {3: CHANGES[change]}, **options)
    assert_same_weights(eager, graph)
    if change != "a sign of zero and back":
        with pytest.raises(AssertionError):  # it does make a difference
            assert_same_weights(eager, unchanged_of(accumulate))


def test_two_values_in_turn_are_two_graphs(caplog: pytest.LogCaptureFixture) -> None:
    turns = {index: assign("alpha", 1.0 - 0.5 * (index % 2)) for index in range(6)}
    with caplog.at_level(logging.INFO, "ofengine"):
        graph = fitted("graph", turns)
    assert_same_weights(fitted("eager", turns), graph)
    assert sum("self.alpha is another" in line for line in caplog.messages) == 1


def test_a_value_of_each_step_is_told_once_with_what_to_write() -> None:
    annealed = {index: assign("alpha", 1.0 / (index + 1)) for index in range(6)}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        graph = fitted("graph", annealed)
    told = [str(each.message) for each in shown if each.category is OFEngineWarning]
    assert len([text for text in told if "self.alpha has changed 5 times" in text]) == 1
    assert "register_buffer" in told[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_weights(fitted("eager", annealed), graph)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda p: flow.optim.SGD(p, lr=0.1, momentum=0.5), "weight_decay", 0.5),
        (lambda p: flow.optim.SGD(p, lr=0.1, momentum=0.5), "momentum", 0.25),
        (lambda p: flow.optim.RMSprop(p, lr=0.1), "alpha", 0.5),
        (lambda p: flow.optim.RMSprop(p, lr=0.1), "eps", 0.5),
        (lambda p: flow.optim.Adagrad(p, lr=0.1), "eps", 0.5),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_option_written_into_a_group_counts(
    make: Any, key: str, value: float, accumulate: int
) -> None:
    class Optimized(Net):
        def configure_optimizers(self) -> Any:
            return make(self.param_groups())

    def write(task: Any) -> None:
        task.optimizer.param_groups[0][key] = value

    tasks = {}
    for name, changes in (("eager", {3: write}), ("graph", {3: write}), ("unchanged", {})):
        tasks[name] = Optimized()
        mode = "graph" if name == "graph" else "eager"
        quiet_trainer(
            mode=mode, max_epochs=1, callbacks=At(changes), accumulate_grad_batches=accumulate
        ).fit(tasks[name], data())
    assert_same_weights(tasks["eager"], tasks["graph"])
    with pytest.raises(AssertionError):
        assert_same_weights(tasks["eager"], tasks["unchanged"])


def test_frozen_and_thawed_within_an_epoch() -> None:
    changes = {
        2: lambda task: task.first.requires_grad_(False),
        4: lambda task: task.first.requires_grad_(True),
    }
    options = {"gradient_clip_val": 0.1}
    assert_same_weights(fitted("eager", changes, **options), fitted("graph", changes, **options))


def test_what_no_step_reads_may_change_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    class Counts(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen = getattr(self, "seen", 0) + 1
            self.newest = outputs["loss"]
            self.weights["unread"] = self.seen  # beside what is read
            self.weights.pop("unread")

    with caplog.at_level(logging.INFO, "ofengine"):
        task = Counts()
        quiet_trainer(mode="graph", max_epochs=2, seed=1).fit(task, data())
    assert task.seen == 12
    assert not [line for line in caplog.messages if "compil" in line]


class Evaluates(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("above", (self.first(batch[0]) > self.alpha).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("above", (self.first(batch[0]) > self.weights["a"]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.act(self.first(batch[0])) * self.powers[0]


def test_evaluation_steps_are_watched_too(mode: str) -> None:
    task, batches = Evaluates(), data(2)
    inputs = np.concatenate([x.numpy() for x, _ in batches])

    class Moves(Callback):
        def on_validation_batch_start(
            self, trainer: Any, task: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            task.alpha = float(batch_idx)

        def on_test_batch_start(
            self, trainer: Any, task: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            task.weights["a"] = float(batch_idx)

        def on_predict_batch_start(
            self, trainer: Any, task: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            task.powers[0] = batch_idx + 1.0

    trainer = quiet_trainer(mode=mode, callbacks=Moves())
    with flow.no_grad():
        outputs = [task.first(x).numpy() for x, _ in batches]
    shares = [(out > index).mean() for index, out in enumerate(outputs)]
    expected = np.float32(np.mean(shares))
    assert trainer.validate(task, batches)[0]["above"] == pytest.approx(expected, abs=1e-7)
    assert trainer.test(task, batches)[0]["above"] == pytest.approx(expected, abs=1e-7)
    predicted = np.concatenate([each.numpy() for each in trainer.predict(task, batches)])
    factor = np.repeat([1.0, 2.0], len(inputs) // 2)[:, None].astype("f4")
    right = np.maximum(np.concatenate(outputs), 0) * factor
    assert predicted.tobytes() == right.tobytes()


def test_a_closure_s_variable(mode: str) -> None:
    weight = 1.0

    class Closed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.first(batch[0]) * weight).sum() + self.second.weight.sum()

    def change(task: Any) -> None:
        nonlocal weight
        weight = 0.0

    task = Closed()
    before = task.first.bias.numpy().copy()
    optimizer = {"configure_optimizers": lambda: flow.optim.SGD(task.param_groups(), lr=0.5)}
    vars(task).update(optimizer)
    quiet_trainer(mode=mode, max_epochs=1, callbacks=At({2: change})).fit(task, data(4))
    # The gradient of each bias is 8, the batch's rows, in the first two steps, and then 0.
    assert task.first.bias.numpy().tobytes() == (before - np.float32(4) - np.float32(4)).tobytes()
