"""How OneFlow 0.9.0 by itself treats schedulers, and that the engine does right there.

The tests come in pairs, as in ``test_oneflow_rows.py``. That many groups cost no time is not tested
here, only that the results are equal.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import largest_difference, quiet_trainer, weights_of
from oneflow.optim import lr_scheduler
from oneflow_steps import (
    SHORT,
    Make,
    PlainGraph,
    Task,
    Weights,
    eager_steps,
    engine_steps,
    graph_steps,
    ones,
    sgd,
)

from ofengine import RateError

# ---------------------------------------------------------------------- which schedulers compile

COMPILE: Dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 0.01),
    "CosineDecayLR": lambda o: lr_scheduler.CosineDecayLR(o, 5, 0.1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 0.01, 2.0),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.3, 9), lr_scheduler.ExponentialLR(o, 0.8)], [3], [True]
    ),
    "constant WarmUpLR": lambda o: lr_scheduler.WarmUpLR(
        lr_scheduler.CosineAnnealingLR(o, 8), 0.5, 2, "constant"
    ),
    "prefixed WarmUpLR": lambda o: lr_scheduler.WarmUpLR(
        lr_scheduler.CosineAnnealingLR(o, 8), 0.5, 2, warmup_prefix=True
    ),
}
UNEQUAL: Tuple[Dict[str, float], Dict[str, float]] = ({"lr": 0.5}, {"lr": 0.2})


def scheduled_by_hand(make: Make, count: int) -> List[List[float]]:
    """The rates that OneFlow's eager scheduler writes into the groups."""
    optimizer = sgd(Weights(2), *UNEQUAL)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", COMPILE)
def test_oneflow_compiles_this_scheduler(name: str) -> None:
    """And it then gives the eager rates, to float32's precision."""
    model = Weights(2)
    optimizer = sgd(model, *UNEQUAL)
    steps = graph_steps(model, optimizer, 5, COMPILE[name](optimizer))
    np.testing.assert_allclose(steps, scheduled_by_hand(COMPILE[name], 5), rtol=0, atol=3e-7)


DO_NOT_COMPILE: Dict[str, Tuple[Make, Any]] = {
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 + t), AttributeError),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)]
        ),
        NotImplementedError,
    ),
    "ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, AssertionError),
}


@pytest.mark.parametrize("name", DO_NOT_COMPILE)
def test_oneflow_does_not_compile_this_scheduler(name: str) -> None:
    make, error = DO_NOT_COMPILE[name]
    model = Weights(1)
    optimizer = sgd(model, {})
    with pytest.raises(error):
        graph_steps(model, optimizer, 1, make(optimizer))


@SHORT
@pytest.mark.parametrize("name", ["LambdaLR", "ChainedScheduler"])
def test_engine_trains_with_it_in_both_modes(mode: str, name: str) -> None:
    """With unequal groups, to the bit: see tests/rates/test_matrix.py for all else."""
    make, _ = DO_NOT_COMPILE[name]
    steps = engine_steps(mode, Task(UNEQUAL, make), 4)
    np.testing.assert_allclose(steps, scheduled_by_hand(make, 4), rtol=0, atol=5e-7)


def linear_warmup(optimizer: Any) -> Any:
    return lr_scheduler.WarmUpLR(lr_scheduler.CosineAnnealingLR(optimizer, 8), 0.5, 2)


def test_oneflow_refuses_linear_warmup_over_unequal_groups() -> None:
    """By a ValueError where the scheduler is made; it works where lr_scale tells them apart."""
    with pytest.raises(ValueError, match="different warmup configs"):
        linear_warmup(sgd(Weights(2), *UNEQUAL))
    linear_warmup(sgd(Weights(2), {"lr_scale": 0.5}, {"lr_scale": 0.2}))


@SHORT
def test_engine_warms_up_unequal_groups(mode: str) -> None:
    """The ValueError comes before training; a table, or lr_scale, does the same."""
    task = Task(UNEQUAL, linear_warmup)
    with pytest.raises((ValueError, RateError), match=r"warmup|warm-up"):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [ones()])
    assert not task.p[0].numpy().any()
    optimizer = sgd(Weights(1), {})
    scheduler, factors = linear_warmup(optimizer), []
    for _ in range(5):
        factors.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    expected = [[0.5 * factor, 0.2 * factor] for factor in factors]
    by_table = engine_steps(mode, Task(UNEQUAL, lambda o: factors), 5)
    scaled = Task([{"lr_scale": 0.5}, {"lr_scale": 0.2}], linear_warmup)
    by_scale = engine_steps(mode, scaled, 5)
    np.testing.assert_allclose(by_table, expected, rtol=0, atol=5e-7)
    np.testing.assert_allclose(by_scale, expected, rtol=0, atol=5e-7)


# ---------------------------------------------------------------------- any function of the step


class Tables(lr_scheduler.ConstantLR):
    """A table of rates for each group in turn."""

    def __init__(self, optimizer: Any, tables: Sequence[Sequence[float]]) -> None:
        super().__init__(optimizer, 1.0, 1)
        self.tables = iter(tables)
        self.asked = 0

    def _generate_conf_for_graph(self, lr_conf: Any) -> None:
        self.asked += 1
        values = next(self.tables)
        conf = lr_conf.piecewise_constant_conf
        conf.SetInParent()
        conf.values.extend(values)
        conf.boundaries.extend(range(len(values) - 1))


def test_oneflow_compiles_a_table_of_absolute_rates_for_each_group() -> None:
    """Asked once for each group, in order; a value ends with the step that is its boundary."""
    tables = [[1.0, 4.0, 0.5, 2.0], [0.25, 0.125, 8.0, 1.0]]
    model = Weights(2)
    optimizer = sgd(model, {}, {"lr": 0.5})
    scheduler = Tables(optimizer, tables)
    steps = graph_steps(model, optimizer, 5, scheduler)
    assert steps == [*map(list, zip(*tables)), [2.0, 1.0]]
    assert scheduler.asked == 2


def test_engine_takes_any_function_for_each_group(mode: str) -> None:
    """Absolute rates of any shape, another one for each group: no step is off by one."""
    first, second = [1.0, 4.0, 0.5, 2.0, 2.0], [0.25, 0.125, 8.0, 1.0, 1.0]
    task = Task(
        [{"name": "a", "lr_scale": 0.5}, {"name": "b"}, {"name": "c"}],
        lambda o: {"a": lambda t: first[min(t, 4)], "b": second},
    )
    steps = engine_steps(mode, task, 5)
    assert steps == [[0.5 * one, other, 1.0] for one, other in zip(first, second)]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_engine_asks_a_function_for_no_step_beyond_the_run(mode: str) -> None:
    """A function that knows the run's own steps alone is enough, in both modes."""
    first = [1.0, 4.0, 0.5]
    steps = engine_steps(mode, Task([{}], lambda o: lambda t: first[t]), 3)
    assert steps == [[value] for value in first]


# ---------------------------------------------------------------------- rates from metrics


def test_oneflow_can_go_on_in_a_new_graph_with_another_rate() -> None:
    """With lr and initial_lr set, gradients cleared and the state loaded: the bits of eager."""
    halves = (0.3, 0.07)
    model = Weights(2)
    optimizer = sgd(model, {}, {}, lr=halves[0], momentum=0.9)
    rows = eager_steps(model, optimizer, 3)
    for group in optimizer.param_groups:
        group["lr"] = halves[1]
    rows += eager_steps(model, optimizer, 3)
    expected = weights_of(model)

    model = Weights(2)
    optimizer = sgd(model, {}, {}, lr=halves[0], momentum=0.9)
    old = PlainGraph(model, optimizer)
    for _ in range(3):
        old(ones())
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = halves[1]
    optimizer.zero_grad(set_to_none=True)
    new = PlainGraph(model, optimizer)
    new.load_state_dict(old.state_dict())
    for _ in range(3):
        new(ones())
    assert largest_difference(weights_of(model), expected)[0] == 0


class Watched(Task):
    """Its metric gets better once, and then no more."""

    def __init__(self) -> None:
        super().__init__([{"lr_scale": 0.5}, {"lr": 2.0}], momentum=0.5)

    def on_train_epoch_end(self, *_: Any) -> None:
        self.log("watched", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self, *self.options, **self.others)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        how = {"scheduler": scheduler, "monitor": "watched"}
        return {"optimizer": optimizer, "lr_scheduler": how}


def test_engine_follows_reduce_lr_on_plateau(mode: str) -> None:
    """By compiling again in graph mode, momentum and all: the rates of a loop by hand."""
    model = Weights(2)
    optimizer = sgd(model, {"lr": 0.5}, {"lr": 2.0}, momentum=0.5)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    expected = []
    for _ in range(6):
        expected += eager_steps(model, optimizer, 2)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.5
    assert engine_steps(mode, Watched(), 2, max_epochs=6) == expected


# ---------------------------------------------------------------------- many groups


def test_engine_gives_many_groups_the_weights_of_one(mode: str) -> None:
    """24 groups of one rate are the same as one group, to the bit."""
    schedule = COMPILE["constant WarmUpLR"]
    many = Task([{} for _ in range(24)], schedule, lr=0.3, momentum=0.9)
    one = OneGroup([{} for _ in range(24)], schedule, lr=0.3, momentum=0.9)
    assert engine_steps(mode, many, 5) == engine_steps(mode, one, 5)
    assert largest_difference(weights_of(many), weights_of(one))[0] == 0


class OneGroup(Task):
    def configure_optimizers(self) -> Any:
        assert self.schedule is not None
        optimizer = flow.optim.SGD([{"params": self.p.parameters()}], **self.others)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}
