"""Generators and iterators that a task holds: what a trace would draw from them once is refused."""

from __future__ import annotations

import itertools
import random
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Bare, batches, quiet_trainer, refused

from ofengine import GraphModeError, OFEngineWarning
from ofengine.modes.own_draws import state_of

RNG = np.random.default_rng(0)
TURN = itertools.cycle([1.0, 2.0])


def growing() -> Any:
    value = 1.0
    while True:
        yield value
        value *= 1.1


class Mixing:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def __call__(self) -> float:
        return self.rng.random()


class Net(Bare):
    def __init__(self, held: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.held, self.draw = held, draw

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean() * self.draw(self.held)


def of_closure() -> Net:
    rng = np.random.default_rng(0)
    return Net(None, lambda held: rng.random())


DRAWS: Dict[str, Callable[[], Net]] = {
    "draws from self.held ": lambda: Net(np.random.default_rng(0), lambda rng: rng.beta(1, 1)),
    "draws from self.held": lambda: Net(np.random.RandomState(0), lambda rng: rng.rand()),
    "draws from self.held  ": lambda: Net(random.Random(0), lambda rng: rng.random()),
    "draws from self.held.rng": lambda: Net(Mixing(), lambda mix: mix()),
    r"draws from self.held\['a'\]": lambda: Net(
        {"a": [np.random.RandomState(0).rand]}, lambda held: held["a"][0]()
    ),
    "draws from RNG": lambda: Net(None, lambda held: RNG.random()),
    "draws from rng": of_closure,
    "takes the next of self.held ": lambda: Net(iter([1.0, 2.0, 3.0, 4.0]), next),
    "takes the next of self.held": lambda: Net(growing(), next),
    "takes the next of self.held  ": lambda: Net(itertools.count(1.0), next),
    "takes the next of self.held   ": lambda: Net(zip(growing(), growing()), lambda z: next(z)[0]),
    "takes the next of TURN": lambda: Net(None, lambda held: next(TURN)),
}


@pytest.mark.parametrize("said", DRAWS)
def test_what_would_be_drawn_once_is_refused(said: str) -> None:
    refused(
        DRAWS[said](), GraphModeError, f"training_step {said.strip()} inside a compiled step",
        "first batch for ever", 'mode="eager"', mode="graph",
    )  # fmt: skip
    quiet_trainer(mode="eager", max_epochs=1).fit(DRAWS[said](), batches(2))


def test_what_hooks_draw_and_what_a_step_only_holds_is_not(
    recwarn: pytest.WarningsRecorder,
) -> None:
    class Draws(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seen = [next(self.held[0]), self.held[1].random(), RNG.random(), next(TURN)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            held = len(self.held) + sum(each for each in itertools.chain([1], range(2)))
            return self.layer(batch).mean() * held + flow.rand(1).sum()

    held = [growing(), np.random.default_rng(0), iter([1]), zip([1]), iter({1: 2}), iter({1})]
    held += [map(len, "a"), itertools.repeat(1), itertools.product("ab"), iter(lambda: 1, 2)]
    quiet_trainer(mode="graph", max_epochs=1).fit(Draws(held, next), batches(3))
    assert not [each for each in recwarn if each.category is OFEngineWarning]


ITERATORS: List[Callable[[], Any]] = [
    lambda: iter([1, 2, 3]), lambda: iter((1, 2, 3)), lambda: iter("abc"), lambda: iter({1, 2}),
    lambda: iter({1: 2, 3: 4}), lambda: iter({1: 2, 3: 4}.items()), lambda: reversed([1, 2]),
    growing,
    lambda: enumerate(growing()), lambda: map(str, [1, 2]), lambda: filter(None, [1, 2]),
    lambda: itertools.cycle([1, 2]), lambda: itertools.islice(growing(), 3), itertools.count,
    lambda: itertools.chain([1], [2]), lambda: itertools.permutations("ab"),
    lambda: itertools.accumulate([1, 2]), lambda: itertools.tee([1, 2])[0],
]  # fmt: skip


@pytest.mark.parametrize("make", ITERATORS)
def test_how_far_an_iterator_is_can_be_told_without_moving_it(make: Callable[[], Any]) -> None:
    iterator, other = make(), make()
    states = [state_of(iterator), state_of(iterator)]
    assert states[0] == states[1] is not None
    assert next(iterator) == next(other)
    again = state_of(iterator)
    assert again == state_of(iterator) != states[0]
    assert next(iterator) == next(other)
    assert state_of([1]) is state_of("text") is None
