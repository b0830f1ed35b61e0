"""Bias correction with the bits of graphs: in any group, at any step, and in no other loop."""

from __future__ import annotations

import math
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, quiet_trainer, refused
from oneflow import nn

from ofengine import Callback, GraphModeError, TaskModule
from ofengine._oneflow.bias_correction import STEPPING, graph_power

F = np.float32
Make = Callable[[Any], Any]


def by_squaring(beta: float, step: int) -> np.float32:
    """``Fastpow<float>`` of OneFlow, line by line."""
    power, square = F(1), F(beta)
    while step:
        if step & 1:
            power = power * square
        square, step = square * square, step >> 1
    return power


def in_float64(beta: float, step: int) -> float:
    return math.pow(beta, step)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8, 0.9, 0.95, 0.999, 0.9999, 0.9999999, 1 - 1e-12])
def test_the_power_is_that_of_graphs(beta: float) -> None:
    steps = [*range(1, 1100), 65_535, 65_536, 999_999, 1_000_000, 16_777_217, 2**40 + 3]
    for step in steps:
        power = graph_power(beta, step)
        assert F(power).tobytes() == by_squaring(beta, step).tobytes(), step
        assert power == float(F(power))


def test_numpy_that_raises_for_underflow_is_no_hindrance() -> None:
    with np.errstate(all="raise"):
        assert graph_power(0.123, 5_000) == 0.0


# ---------------------------------------------------------------------- groups and steps


class Vectors(TaskModule):
    """Vectors in a group each; the gradient of each is the batch, to the bit."""

    def __init__(self, make: Make, *options: Dict[str, Any]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(flow.tensor(v)) for v in START])
        self.make, self.options = make, options or ({}, {}, {})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.vectors[0] * batch).sum()
        return loss + (self.vectors[1] * batch).sum() + (self.vectors[2] * batch).sum()

    def configure_optimizers(self) -> Any:
        return self.make([{"params": [v], **o} for v, o in zip(self.vectors, self.options)])


def random_vectors(count: int, seed: int) -> List[np.ndarray]:
    return list(np.random.RandomState(seed).standard_normal((count, 12)).astype(F))


START, GRADIENTS = random_vectors(3, seed=5), random_vectors(20, seed=6)
BATCHES = [flow.tensor(gradient) for gradient in GRADIENTS]


def adam(
    weight: np.ndarray,
    power: Callable[[float, int], Any],
    betas: Callable[[int], Sequence[float]] = lambda step: (0.9, 0.999),
    first: int = 1,
    corrects: bool = True,
) -> np.ndarray:
    """Adam at lr 0.01 in numpy, from step ``first`` on, as OneFlow's kernel computes it."""
    m, v = np.zeros(12, F), np.zeros(12, F)
    for step, gradient in enumerate(GRADIENTS, first):
        beta1, beta2 = betas(step)
        one, two = (F(1.0 - float(power(b, step))) if corrects else F(1) for b in (beta1, beta2))
        m = F(beta1) * m + (F(1) - F(beta1)) * gradient
        v = F(beta2) * v + (F(1) - F(beta2)) * gradient * gradient
        weight = weight - (F(0.01) / one) * (m / (np.sqrt(v) / np.sqrt(two) + F(1e-8)))
    return weight


def assert_vectors(task: Vectors, expected: Sequence[np.ndarray]) -> None:
    for vector, right in zip(task.vectors, expected):
        assert vector.numpy().tobytes() == right.tobytes()


def test_groups_with_betas_of_their_own(mode: str) -> None:
    other = {"betas": [0.8, 0.97]}
    task = Vectors(lambda g: flow.optim.Adam(g, 0.01), {}, other, {"do_bias_correction": False})
    quiet_trainer(mode=mode, max_epochs=1).fit(task, BATCHES)
    second = adam(START[1], by_squaring, lambda step: (0.8, 0.97))
    third = adam(START[2], by_squaring, corrects=False)
    assert_vectors(task, [adam(START[0], by_squaring), second, third])


class StartsAt(Callback):
    """Goes on from a step, as a resumed run would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Any, task: Any) -> None:
        trainer._run.training_mode.load_optimizer_state(self.steps, {})


@pytest.mark.parametrize("steps", [255, 1_000, 999_990])
def test_from_a_later_step_on(mode: str, steps: int) -> None:
    task = Vectors(lambda g: flow.optim.Adam(g, 0.01))
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[StartsAt(steps)]).fit(task, BATCHES)
    assert_vectors(task, [adam(v, by_squaring, first=steps + 1) for v in START])


class Betas(Callback):
    """Sets the betas before each step."""

    def __init__(self, betas: Callable[[int], Sequence[float]]) -> None:
        self.betas = betas

    def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        for group in trainer.optimizer.param_groups:
            group["betas"] = self.betas(trainer.global_step + 1)


def cycled(step: int) -> Sequence[float]:
    return 0.85 + 0.01 * (step % 10), 0.999


def changed_once(step: int) -> Sequence[float]:
    return (0.9, 0.999) if step < 10 else (0.8, 0.99)


@pytest.mark.parametrize(
    "mode, betas", [("eager", cycled), ("eager", changed_once), ("graph", changed_once)]
)
def test_betas_that_a_hook_changes(mode: str, betas: Callable[[int], Sequence[float]]) -> None:
    task = Vectors(lambda g: flow.optim.Adam(g, 0.01))
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[Betas(betas)]).fit(task, BATCHES)
    assert_vectors(task, [adam(v, by_squaring, betas) for v in START])


# ---------------------------------------------------------------------- optimizers of one's own


class Defaults(flow.optim.AdamW):
    """Has its own constructor."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.01, betas=(0.7, 0.98), weight_decay=0.1)


class Counting(flow.optim.Adam):
    """Counts its steps."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class Own(flow.optim.Optimizer):
    """Plain descent, in Python."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        with flow.no_grad():
            for group in self.param_groups:
                for parameter in group.parameters:
                    parameter.sub_(parameter.grad * group["lr"])


def test_a_subclass_is_the_same_in_both_modes() -> None:
    tasks = [Vectors(Defaults), Vectors(Defaults)]
    for mode, task in zip(("eager", "graph"), tasks):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, BATCHES)
    assert_same_weights(*tasks)


def test_a_step_that_calls_oneflow_s_is_corrected_too() -> None:
    task = Vectors(lambda g: Counting(g, 0.01))
    trainer = quiet_trainer(mode="eager", max_epochs=1)
    trainer.fit(task, BATCHES)
    assert trainer.optimizer.steps == len(BATCHES)
    assert_vectors(task, [adam(v, by_squaring) for v in START])


def test_an_optimizer_in_python_trains_in_eager_mode() -> None:
    task = Vectors(Own)
    quiet_trainer(mode="eager", max_epochs=1).fit(task, BATCHES)
    right = START[0] - F(0.01) * np.sum(GRADIENTS, axis=0)
    np.testing.assert_allclose(task.vectors[0].numpy(), right, atol=1e-5)


def with_a_step_put_in(groups: Any) -> Any:
    optimizer = flow.optim.Adam(groups, 0.01)
    step = optimizer.step
    optimizer.step = lambda closure=None: step(closure)
    return optimizer


OWN_STEPS = [
    (lambda g: Counting(g, 0.01), r"^Counting\.step is not called in graph mode"),
    (Own, r"^Own\.step is not called in graph mode"),
    (with_a_step_put_in, r"put into the Adam object is not called in graph mode"),
]


@pytest.mark.parametrize("make, text", OWN_STEPS, ids=["override", "in Python", "put in"])
def test_a_step_of_one_s_own_is_refused_in_graph_mode(make: Make, text: str) -> None:
    """A graph would leave it out without a word."""
    refused(Vectors(make), GraphModeError, text, 'mode="eager"', mode="graph", train=BATCHES)


# ---------------------------------------------------------------------- others' loops


def by_hand() -> np.ndarray:
    """The first vector after OneFlow's own loop."""
    task = Vectors(lambda g: flow.optim.Adam(g, 0.01))
    optimizer = task.configure_optimizers()
    for batch in BATCHES:
        task.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.vectors[0].numpy()


def test_a_loop_by_hand_computes_what_oneflow_computes() -> None:
    """Before, after and within a run, and after one that broke down in its step."""
    right = adam(START[0], in_float64).tobytes()
    assert right != adam(START[0], by_squaring).tobytes()

    results = [by_hand().tobytes()]

    class LoopsByHand(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            results.append(by_hand().tobytes())

    class Breaks(flow.optim.Adam):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("broken")

    make: Make = lambda g: flow.optim.Adam(g, 0.01)  # noqa: E731
    quiet_trainer(max_epochs=1, callbacks=[LoopsByHand()]).fit(Vectors(make), BATCHES[:2])
    results.append(by_hand().tobytes())
    with pytest.raises(RuntimeError, match="broken"):
        quiet_trainer(max_epochs=1).fit(Vectors(Breaks), BATCHES)
    assert [*results, by_hand().tobytes()] == [right] * 5
    assert not STEPPING.on


def test_a_loop_in_another_thread_goes_on_by_itself() -> None:
    """While a step of a run waits for it, it computes what OneFlow computes."""
    results: List[Optional[bytes]] = []

    class Waiting(flow.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            if not results:
                assert STEPPING.on
                thread = threading.Thread(target=lambda: results.append(by_hand().tobytes()))
                thread.start()
                thread.join()
            return super().step(closure)

    task = Vectors(lambda g: Waiting(g, 0.01))
    quiet_trainer(max_epochs=1).fit(task, BATCHES)
    assert results == [adam(START[0], in_float64).tobytes()]
    assert_vectors(task, [adam(v, by_squaring) for v in START])
