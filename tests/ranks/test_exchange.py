"""What one rank makes of what all have, the others being played by the test."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

from ofengine.launch.environment import World
from ofengine.ranks.gradients import GradientExchange
from ofengine.ranks.meetings import Meetings

SHAPES = {"a": (3, 5), "scalar": (), "b": (7,), "never": (2,), "wide": (4,)}
Gradients = Dict[str, Optional[np.ndarray]]


class Played(Meetings):
    """The meetings of rank 1 of so many; the others have the gradients that the test says."""

    def __init__(self, size: int, at_once: int) -> None:
        super().__init__(World(1, size, 0, size, 0, 1))
        self.at_once = at_once
        self.others: List[Gradients] = []
        self.gathered: List[int] = []
        self.reduced: List[int] = []

    @property
    def most_numbers(self) -> int:
        return self.at_once

    def step(
        self, body: bytes, check: int, done: bool, meanwhile: Callable[[], None]
    ) -> List[bytes]:
        meanwhile()
        flags = [bytes([each[name] is not None for name in SHAPES]) for each in self.others]
        self.at = dict.fromkeys((flow.float32, flow.float64), 0)
        return [*flags[:1], body, *flags[1:]]

    def of_others(self, dtype: Any) -> List[np.ndarray]:
        """What each other rank has of this dtype, one parameter after the other."""
        names = [name for name in SHAPES if (name == "wide") == (dtype == flow.float64)]
        flat = []
        for gradients in self.others:
            parts = [
                np.full(SHAPES[name], -0.0) if gradients[name] is None else gradients[name]
                for name in names
            ]
            flat.append(np.concatenate([each.reshape(-1) for each in parts]))
        return flat

    def add_other(self, own: Any) -> None:
        (other,) = self.of_others(own.dtype)
        size = int(own.numel())
        self.reduced.append(size)
        # Both have a piece that begins with the first parameter, in this test.
        own.copy_(flow.tensor(other[:size].astype(own.numpy().dtype) + own.numpy()))

    def gather_into(self, rows: Any, own: Any) -> None:
        size, start = int(own.numel()), self.at[own.dtype]
        self.at[own.dtype] += size
        self.gathered.append(size * self.size)
        flat = [each[start : start + size] for each in self.of_others(own.dtype)]
        every = [flat[0], own.numpy(), *flat[1:]]
        rows.copy_(flow.tensor(np.concatenate(every), dtype=own.dtype))


def drawn(random: np.random.Generator, used: str) -> Gradients:
    """Gradients of the parameters whose names ``used`` has, with zeros of both signs."""
    found: Gradients = dict.fromkeys(SHAPES)
    for name in used.split():
        dtype = np.float64 if name == "wide" else np.float32
        numbers = random.standard_normal(SHAPES[name]) * 10.0 ** random.integers(-6, 6)
        found[name] = np.where(random.random(SHAPES[name]) < 0.2, -0.0, numbers).astype(dtype)
    return found


def check_same(put: Dict[str, Any], expected: Dict[str, Any]) -> None:
    """The same parameters have a gradient, and the same one to the bit."""
    for name, gradient in put.items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            assert gradient.numpy().tobytes() == expected[name].numpy().tobytes(), name


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("ranks", "at_once"), [(3, 1000), (3, 23), (3, 4), (2, 1000), (2, 4)])
def test_gradients_are_added_in_the_order_of_one_process(
    ranks: int, at_once: int, kept: bool
) -> None:
    """Windows of several rounds, whoever uses what, gathered whole or in parts."""
    random = np.random.default_rng(3)
    parameters = {
        name: nn.Parameter(flow.zeros(*shape).to(flow.float64 if name == "wide" else flow.float32))
        if shape
        else nn.Parameter(flow.tensor(0.0))
        for name, shape in SHAPES.items()
    }
    meetings = Played(ranks, at_once)
    exchange = GradientExchange(meetings, list(parameters.values()))
    windows = [
        [["a scalar b wide"] * 3],
        [["a b", "a scalar", "wide"], ["b", "", "a b"]],
        [["a scalar b wide"] * 3],
        [["a scalar b wide"] * 3, ["a scalar b wide"] * 3],
        [["", "", "a"], ["", "b", ""], ["a", "a", "a wide"]],
        [["", "scalar", ""]],
        [["a scalar b wide"] * 3],
    ]
    held = []
    for window in windows:
        one_process = {name: nn.Parameter(each.detach()) for name, each in parameters.items()}
        for used in window:
            gradients = [drawn(random, each) for each in used[:ranks]]
            meetings.others = [gradients[0], *gradients[2:]]
            for name, parameter in parameters.items():
                own = gradients[1][name]
                parameter.grad = None if own is None else flow.tensor(own)
            exchange.add()
            for each in gradients:
                for name, gradient in each.items():
                    if gradient is not None:
                        (one_process[name] * flow.tensor(gradient)).sum().backward()
        exchange.put(kept)
        expected = {name: each.grad for name, each in one_process.items()}
        held.append(({name: each.grad for name, each in parameters.items()}, expected))
        check_same(*held[-1])
    if kept:  # those of earlier windows are still what they were
        for put, expected in held:
            check_same(put, expected)
    assert max(meetings.gathered) <= at_once * ranks
    # Where two ranks have the same and a window begins, in float32.
    assert len(meetings.reduced) == (4 if ranks == 2 else 0)


@pytest.mark.parametrize(("kept", "values"), [(True, 8), (False, 1)])
def test_memory_is_written_again_unless_a_gradient_may_be_kept(kept: bool, values: int) -> None:
    """Eight windows whose gradients differ are all seen afterwards, or the last one alone."""
    parameter = nn.Parameter(flow.zeros(3, 5))
    meetings = Played(2, 1000)
    meetings.others = [{**dict.fromkeys(SHAPES), "a": np.ones((3, 5), np.float32)}]
    exchange = GradientExchange(meetings, [parameter])
    gradients = []
    for window in range(8):
        parameter.grad = flow.ones(3, 5) * window
        exchange.add()
        exchange.put(kept)
        gradients.append(parameter.grad)
        assert parameter.grad.numpy().tolist() == np.full((3, 5), window + 1.0).tolist()
    assert len({each.numpy().ravel()[0] for each in gradients}) == values


@pytest.mark.parametrize("size", [2, 8, 512])
def test_memory_of_an_exchange_does_not_grow_with_the_ranks(size: int) -> None:
    """In bytes of what all send at once."""
    assert Meetings(World(1, size, 1, size, 0, 1)).most_numbers * size * 4 <= 16 * 1024 * 1024
