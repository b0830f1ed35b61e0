"""What a step reads besides its arguments, wherever it is held, is followed in graph mode."""

from __future__ import annotations

import functools
import logging
import math
import types
from collections import deque
from typing import Any, Callable, Dict, List, Tuple

import attrs
import oneflow as flow
import pytest
from helpers import fill_deterministically, quiet_trainer
from oneflow import nn

from ofengine import OFEngineWarning, TaskModule
from ofengine.modes.guards import Guards
from ofengine.modes.photo import Film, photo
from ofengine.modes.reach import reached

OWN = types.ModuleType("own_settings")
CODE = """
GAMMA = scale_within = 1.0
def scale(x):
    return x * GAMMA
class Inner:
    beta = 1.0
"""
exec(CODE, vars(OWN))
BY_SUPER = BY_HELPER = BY_CALL = BY_STATIC = BY_PROPERTY = BY_HELD = BY_LAYER = BY_BACKWARD = 1.0


class Settings:
    alpha = 1.0

    class Deeper:
        alpha = 1.0


class SettingsOfBase:
    gamma = 1.0


class Derived(SettingsOfBase):
    pass


class Helper:
    kind = 1.0

    def loss(self, x: Any) -> Any:
        return x * BY_HELPER * self.kind

    def __call__(self, x: Any) -> Any:
        return x * BY_CALL

    @staticmethod
    def scaled(x: Any) -> Any:
        return x * BY_STATIC


class Slotted:
    __slots__ = ("alpha",)

    def __init__(self) -> None:
        self.alpha = 1.0


@attrs.define
class Config:
    alpha: float = 1.0
    inner: Any = attrs.Factory(Slotted)


class Numbers(list):  # type: ignore[type-arg]
    pass


class Number(float):
    pass


class Scale(flow.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * BY_BACKWARD


class Layer(nn.Linear):
    width = 1.0

    def forward(self, x: Any) -> Any:
        return super().forward(x) * BY_LAYER * self.width


def by_default(x: Any, factors: Any = [1.0]) -> Any:  # noqa: B006
    return x * factors[0]


def by_attribute(x: Any) -> Any:
    return x * by_attribute.scale  # type: ignore[attr-defined]


by_attribute.scale = 1.0  # type: ignore[attr-defined]


def weighted(x: Any, weight: float) -> Any:
    return x * weight


def held(x: Any) -> Any:
    return x * BY_HELD


CLOSED = [1.0]


def closing(factors: Any) -> Callable[[Any], Any]:
    return lambda x: x * factors[0]


def criterion(x: Any) -> Any:
    return x


CRITERION: Any = criterion


class Base(TaskModule):
    weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum() * BY_SUPER


class Net(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(2, 1)
        fill_deterministically(self)
        self.helper, self.config = Helper(), Config()
        self.recent: Any = deque([1.0], maxlen=1)
        self.numbers, self.number = Numbers([1.0]), Number(1.0)
        self.numbers.scale = self.number.scale = 1.0  # type: ignore[attr-defined]
        self.partial = functools.partial(weighted, weight=1.0)
        self.losses: Dict[str, Any] = {"a": held, "b": [closing(CLOSED)]}
        self.bound = Config().inner.__class__

    @property
    def of_property(self) -> float:
        return BY_PROPERTY

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) * self.weight * self.of_property
        loss = loss * Settings.alpha * Settings.Deeper.alpha * Derived.gamma
        loss = loss * OWN.scale_within * OWN.Inner.beta
        loss = OWN.scale(self.helper(self.helper.loss(self.helper.scaled(loss))))
        loss = loss * self.config.alpha * self.config.inner.alpha * self.recent[0]
        loss = loss * self.numbers.scale * self.number.scale
        loss = self.losses["b"][0](self.losses["a"](self.partial(loss)))
        return CRITERION(by_attribute(by_default(loss)))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.0)


def of_module(name: str) -> Callable[[Any, float], Any]:
    return lambda task, value: globals().update({name: value})


CHANGES: Dict[str, Callable[[Any, float], Any]] = {
    "a class's attribute": lambda task, value: setattr(Settings, "alpha", value),
    "that of a class in a class": lambda task, value: setattr(Settings.Deeper, "alpha", value),
    "that of a base of a class": lambda task, value: setattr(SettingsOfBase, "gamma", value),
    "one that hides its base's": lambda task, value: setattr(
        Derived, "gamma", value * Derived.gamma
    ),
    "that of the task's class": lambda task, value: setattr(Net, "weight", value),
    "that of a layer's class": lambda task, value: setattr(Layer, "width", value),
    "that of a helper's class": lambda task, value: setattr(Helper, "kind", value),
    "a module's attribute": lambda task, value: setattr(OWN, "scale_within", value),
    "that of a class in a module": lambda task, value: setattr(OWN.Inner, "beta", value),
    "a global of another module": lambda task, value: setattr(OWN, "GAMMA", value),
    "a global read by super()": of_module("BY_SUPER"),
    "by a layer's super()": of_module("BY_LAYER"),
    "by a helper's method": of_module("BY_HELPER"),
    "by a helper that is called": of_module("BY_CALL"),
    "by a static method": of_module("BY_STATIC"),
    "by a property": of_module("BY_PROPERTY"),
    "by a function in a dict": of_module("BY_HELD"),
    "a list in the closure of one in a list": lambda task, value: CLOSED.__setitem__(0, value),
    "a default": lambda task, value: by_default.__defaults__[0].__setitem__(0, value),  # type: ignore[index]
    "a function's attribute": lambda task, value: setattr(by_attribute, "scale", value),
    "a partial's keyword": lambda task, value: task.partial.keywords.update(weight=value),
    "a global function": lambda task, value: globals().update(CRITERION=lambda x: x * value),
    "a field of attrs": lambda task, value: setattr(task.config, "alpha", value),
    "slots in slots": lambda task, value: setattr(task.config.inner, "alpha", value),
    "a deque": lambda task, value: task.recent.append(value),
    "an attribute of a list": lambda task, value: setattr(task.numbers, "scale", value),
    "an attribute of a number": lambda task, value: setattr(task.number, "scale", value),
}


PRIMES = (2.0, 3.0, 5.0)


@functools.lru_cache(maxsize=None)
def factors(mode: str) -> Dict[str, int]:
    """By how much the loss grows with each change; the weights never change.

    Three are made at once, which multiply the loss by 2, by 3 and by 5.
    """
    task, losses, names = Net(), [], list(CHANGES)

    def change(batch: Any, batch_idx: int) -> None:
        for name, value in zip(names[batch_idx * 3 - 3 :], PRIMES) if batch_idx else ():
            CHANGES[name](task, value)

    task.on_train_batch_start = change
    task.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
    kept = [(cls, dict(vars(cls))) for cls in (Settings, Settings.Deeper, SettingsOfBase, Net)]
    kept += [(cls, dict(vars(cls))) for cls in (Layer, Helper, OWN.Inner)]
    before = {name: value for name, value in globals().items() if name.isupper()}
    own = {name: getattr(OWN, name) for name in ("GAMMA", "scale_within")}
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.ones(1, 2)] * (1 + len(names) // 3))
    for cls, attributes in kept:
        for name in ("alpha", "gamma", "weight", "width", "kind", "beta"):
            if name in attributes:
                setattr(cls, name, attributes[name])
    del Derived.gamma, Net.weight
    globals().update(before)
    vars(OWN).update(own)
    CLOSED[0] = by_default.__defaults__[0][0] = 1.0  # type: ignore[index]
    by_attribute.scale = 1.0  # type: ignore[attr-defined]
    grown = [round(b / a) for a, b in zip(losses, losses[1:])]
    return {n: math.gcd(grown[i // 3], int(PRIMES[i % 3])) for i, n in enumerate(names)}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_step_reads_is_followed(change: str, mode: str) -> None:
    position = list(CHANGES).index(change)
    assert factors(mode)[change] == PRIMES[position % 3]


def test_what_a_backward_of_one_s_own_reads() -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Scale.apply(self.layer(batch)).sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1.0)

    found = []
    for mode in ("eager", "graph"):
        task, seen = Own(), []
        task.on_train_batch_start = lambda _, i: globals().update(BY_BACKWARD=1.0 + i)
        task.on_train_batch_end = lambda *_: seen.append(task.layer.bias.item())  # noqa: B023
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.ones(1, 2)] * 3)
        globals().update(BY_BACKWARD=1.0)
        found.append([seen[0] - seen[1], seen[1] - seen[2]])
    assert found[0] == found[1] == pytest.approx([2.0, 3.0])


def names_reached(task: Any) -> List[str]:
    film = Film()
    for module in task.modules():
        film.meet(module)
    found = []
    for called, _, _, value in reached(film, frozenset({"training_step"})):
        photo(value, film)
        found.append(called)
    return sorted(found)


HISTORY: List[float] = []
SEEN = 0


class Plain(TaskModule):
    seen = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.layer(batch), flow.zeros(1, 1))
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        global SEEN
        SEEN += 1
        Plain.seen += 1
        HISTORY.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


def test_a_plain_task_has_nothing_to_look_at_before_a_step(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    task = Plain()
    with caplog.at_level(logging.INFO, "ofengine"):
        quiet_trainer(mode="graph", max_epochs=2).fit(task, [flow.ones(1, 2)] * 3)
    assert SEEN == Plain.seen == len(HISTORY) == 6
    assert not [line for line in caplog.messages if "compil" in line]
    assert not [each for each in recwarn if each.category is OFEngineWarning]
    assert names_reached(task) == []
    guards = Guards()
    with guards.reading():
        task.forward = lambda x: x
        task.layer(flow.ones(1, 2))
    assert not guards.watch(task).looks


def test_other_names_of_a_module_may_change_at_every_step_and_an_equal_list_is_followed() -> None:
    class Reads(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.powers = [1.0]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return held(self.layer(batch)).mean() * self.powers[0]

    guards, task = Guards(), Reads()
    with guards.reading():
        task.training_step(flow.ones(1, 2), 0)
    watch = guards.watch(task)
    looked = watch.changed
    watch.changed = lambda places=None: looked(places) if places else pytest.fail("looked at all")
    globals().update(SEEN=SEEN + 1)
    assert watch.looks and not watch.may_differ()
    task.powers = [1.0]
    assert watch.changed({(id(task), "powers")}) is None
    task.powers[0] = 2.0
    assert watch.may_differ()
    task.powers[0] = 1.0
    globals().update(BY_HELD=2.0)
    assert watch.may_differ()
    globals().update(BY_HELD=1.0)


def test_the_code_of_others_is_not_looked_into() -> None:
    import flowvision
    import numpy as np

    class Uses(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            names: Tuple[Any, ...] = (logging.getLogger(), functools.reduce, flowvision, np)
            return len(names)

    assert names_reached(Uses()) == []


MANY = [flow.ones(1) * index for index in range(30)]


def test_a_run_waits_for_the_tensors_that_its_graph_reads_alone() -> None:
    """OneFlow takes no more of them than the graph has variables."""

    class Counts(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            nn.init.zeros_(self.layer.bias)  # so that no difference is rounded

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean() * len(MANY) + MANY[2].sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.parameters(), lr=0.5)

    task = Counts()
    before = task.layer.bias.numpy().copy()
    quiet_trainer(mode="graph", max_epochs=1).fit(task, [flow.ones(2, 2)] * 2)
    assert (before - task.layer.bias.numpy()).tolist() == [30.0]
