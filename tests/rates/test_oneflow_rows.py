"""How OneFlow 0.9.0 by itself treats rates, fact by fact, and that the engine does right there.

A test ``test_oneflow_...`` pins what OneFlow does in a few lines without the engine, so that a
version that changes it is noticed; the test ``test_engine_...`` after it shows that both modes
then do the same, or refuse before training.

Not tested here: the multi-tensor update pass, which exists on CUDA alone; and that many groups
cost no time, of which only the equality of the results is asked.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import largest_difference, quiet_trainer, weights_of
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import Callback, OFEngineWarning, RateError, TaskModule

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


# ---------------------------------------------------------------------- lr_scale in eager mode

OPTIMIZERS: Dict[str, Make] = {
    "SGD": lambda g: flow.optim.SGD(g, lr=0.5),
    "Adam": lambda g: flow.optim.Adam(g, lr=0.5),
    "AdamW": lambda g: flow.optim.AdamW(g, lr=0.5),
    "RMSprop": lambda g: flow.optim.RMSprop(g, lr=0.5),
    "Adagrad": lambda g: flow.optim.Adagrad(g, lr=0.5, initial_accumulator_value=0.1),
    "Adadelta": lambda g: flow.optim.Adadelta(g, lr=0.5),
    "LAMB": lambda g: flow.optim.LAMB(g, lr=0.5),
}


class WithOptimizer(Task):
    def __init__(self, name: str) -> None:
        super().__init__([{"lr_scale": 0.25}, {}])
        self.name = name

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.name]([{"params": [p], **o} for p, o in zip(self.p, self.options)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_oneflow_ignores_lr_scale_in_eager_and_applies_it_in_graph_mode(name: str) -> None:
    """Every optimizer: the scaled group moves as far as the other one, or a quarter as far."""

    def moved(steps: Callable[..., List[List[float]]]) -> List[float]:
        model = Weights(2)
        groups = [{"params": [model.p[0]], "lr_scale": 0.25}, {"params": [model.p[1]]}]
        return steps(model, OPTIMIZERS[name](groups))[0]

    scaled, free = moved(eager_steps)
    assert scaled == free != 0
    scaled, free = moved(graph_steps)
    assert scaled == pytest.approx(0.25 * free, rel=1e-6)
    assert free != 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_engine_applies_lr_scale_in_both_modes(mode: str, name: str) -> None:
    """A quarter as far, whatever the optimizer."""
    ((scaled, free),) = engine_steps(mode, WithOptimizer(name))
    assert scaled == pytest.approx(0.25 * free, rel=1e-6)
    assert free != 0


# ---------------------------------------------------------------------- lr of a group


def test_oneflow_multiplies_lr_of_a_group_with_lr_scale_in_graph_mode() -> None:
    """The cookbook's text says that a group's ``lr`` has no effect there."""
    model = Weights(3)
    optimizer = sgd(model, {"lr": 0.5, "lr_scale": 0.25}, {"lr": 2.0}, {})
    assert graph_steps(model, optimizer, 2) == [[0.125, 2.0, 1.0]] * 2


def test_engine_multiplies_lr_of_a_group_with_lr_scale(mode: str) -> None:
    task = Task([{"lr": 0.5, "lr_scale": 0.25}, {"lr": 2.0}, {}])
    assert engine_steps(mode, task, 2) == [[0.125, 2.0, 1.0]] * 2


# ---------------------------------------------------------------------- the floor of a schedule


def floor_at_once(optimizer: Any) -> Any:
    """At step 1 at its floor of 0.25, and back at the top at step 2."""
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=1, eta_min=0.25)


def test_oneflow_scales_the_floor_by_lr_scale_but_not_by_lr() -> None:
    """In a graph lr_scale comes after the schedule; lr * scale as lr leaves the floor."""
    model = Weights(2)
    optimizer = sgd(model, {"lr_scale": 0.5}, {"lr": 0.5})
    steps = graph_steps(model, optimizer, 3, floor_at_once(optimizer))
    np.testing.assert_allclose(steps, [[0.5, 0.5], [0.125, 0.25], [0.5, 0.5]], rtol=1e-6)


@SHORT
def test_engine_scales_the_floor_by_lr_scale_but_not_by_lr(mode: str) -> None:
    """One convention in both modes: schedule(lr) * lr_scale."""
    steps = engine_steps(mode, Task([{"lr_scale": 0.5}, {"lr": 0.5}], floor_at_once), 3)
    assert steps == [[0.5, 0.5], [0.125, 0.25], [0.5, 0.5]]


# ---------------------------------------------------------------------- changes after compiling


def test_oneflow_ignores_changes_after_a_graph_was_compiled() -> None:
    """``lr``, ``lr_scale`` and ``requires_grad`` are frozen into the graph, silently."""
    model = Weights(3)
    optimizer = sgd(model, {}, {"lr_scale": 1.0}, {})

    def meddle() -> None:
        optimizer.param_groups[0]["lr"] = 8.0
        optimizer.param_groups[1]["lr_scale"] = 8.0
        model.p[2].requires_grad_(False)

    assert graph_steps(model, optimizer, 3, meddle=meddle) == [[1.0] * 3] * 3


def test_oneflow_never_moves_a_python_scheduler_or_the_groups_lr_in_graph_mode() -> None:
    """Stepping a scheduler changes nothing, and the native one leaves ``lr`` where it was."""
    model = Weights(1)
    optimizer = sgd(model, {})
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert graph_steps(model, optimizer, 3, meddle=scheduler.step) == [[1.0]] * 3
    model = Weights(1)
    optimizer = sgd(model, {})
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert graph_steps(model, optimizer, 3, scheduler) == [[1.0], [0.5], [0.25]]
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.last_step == 0


def test_oneflow_prefers_initial_lr_to_lr_in_a_graph_alone() -> None:
    """A group that has both: a graph takes the one, eager mode the other."""
    both = {"lr": 0.5, "initial_lr": 0.25}
    model = Weights(1)
    assert graph_steps(model, sgd(model, both)) == [[0.25]]
    model = Weights(1)
    assert eager_steps(model, sgd(model, both)) == [[0.5]]


def test_engine_refuses_lr_written_by_hand(mode: str) -> None:
    """With the group's name and the call that does it in both modes."""

    def meddle(trainer: Any, task: Any) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 8.0

    with pytest.raises(RateError, match=r"'group_0'.*from 1 to 8.*trainer\.set_lr\('group_0', 8\)"):
        engine_steps(mode, Task([{}]), 3, meddle)


def test_engine_has_a_call_that_changes_lr(mode: str) -> None:
    """``trainer.set_lr`` from the next step on, times lr_scale."""

    def meddle(trainer: Any, task: Any) -> None:
        if trainer.global_step == 2:
            trainer.set_lr("group_0", 8.0)

    steps = engine_steps(mode, Task([{"lr_scale": 0.25}, {}]), 4, meddle)
    assert steps == [[0.25, 1.0]] * 2 + [[2.0, 1.0]] * 2


def test_engine_treats_a_changed_lr_scale_alike_in_both_modes() -> None:
    """Refused in both or the same rates in both: never one without the other."""

    def meddle(trainer: Any, task: Any) -> None:
        trainer.optimizer.param_groups[0]["lr_scale"] = 8.0

    outcomes: List[Any] = []
    for mode in ("eager", "graph"):
        try:
            outcomes.append(engine_steps(mode, Task([{"lr_scale": 0.5}]), 3, meddle))
        except RateError:
            outcomes.append(RateError)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] in (RateError, [[0.5]] * 3)


def test_engine_honours_requires_grad_between_epochs(mode: str) -> None:
    """A parameter that a hook freezes stops in both modes."""

    def meddle(trainer: Any, task: Any) -> None:
        task.p[1].requires_grad_(False)

    steps = engine_steps(mode, Task([{}, {}]), 1, meddle, max_epochs=3)
    assert steps == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]


def test_engine_takes_lr_where_a_group_has_initial_lr_too(mode: str) -> None:
    """Both modes take what eager OneFlow takes."""
    assert engine_steps(mode, Task([{"lr": 0.5, "initial_lr": 0.25}])) == [[0.5]]


@SHORT
def test_engine_says_the_rates_of_graph_mode_where_the_groups_do_not(mode: str) -> None:
    """``trainer.rates`` is what is applied, in both modes, unlike ``param_groups``."""
    said: List[List[float]] = []
    task = Task([{"lr_scale": 0.5}], lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    steps = engine_steps(mode, task, 3, lambda trainer, _: said.append(trainer.rates.rates(2)))
    assert steps == [[0.5], [0.25], [0.125]]
    assert said == [[0.125]] * 3


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


# ---------------------------------------------------------------------- groups that are wrong


def test_oneflow_accepts_a_misspelt_key_and_a_negative_scale() -> None:
    """Silently: the first does nothing, the second climbs."""
    model = Weights(2)
    optimizer = sgd(model, {"lr_scael": 0.5}, {"lr_scale": -1.0})
    assert graph_steps(model, optimizer) == [[1.0, -1.0]]


def test_engine_refuses_a_misspelt_key_and_a_negative_scale(mode: str) -> None:
    refused(mode, Task([{"lr_scael": 0.5}]), r"'group_0'.*'lr_scael'.*did you mean 'lr_scale'")
    refused(mode, Task([{}, {"lr_scale": -1.0}]), r"'group_1' has lr_scale=-1\.0")


def test_oneflow_steps_a_parameter_in_two_groups_twice_in_eager_mode() -> None:
    model = Weights(1)
    optimizer = flow.optim.SGD([{"params": [model.p[0]]}, {"params": [model.p[0]]}], lr=1.0)
    assert eager_steps(model, optimizer) == [[2.0]]


TWICE = """
import oneflow as flow
from oneflow import nn

class Twice(nn.Graph):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 1)
        groups = [{"params": self.model.parameters()}, {"params": [self.model.bias]}]
        self.add_optimizer(flow.optim.SGD(groups, lr=1.0))

    def build(self, x):
        loss = self.model(x).sum()
        loss.backward()
        return loss

print("begun", flush=True)
Twice()(flow.ones(1, 2))
print("survived", flush=True)
"""


def test_oneflow_aborts_the_process_for_a_parameter_in_two_groups_in_graph_mode() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert "begun" in done.stdout
    assert "survived" not in done.stdout
    assert done.returncode < 0, done.stderr  # ended by a signal


class TwoGroups(Task):
    def configure_optimizers(self) -> Any:
        return flow.optim.SGD([{"params": self.p.parameters()}, {"params": [self.p[0]]}], lr=1.0)


def test_engine_refuses_a_parameter_in_two_groups(mode: str) -> None:
    """And names it, in the process that lives on."""
    refused(mode, TwoGroups([{}]), r"'p\.0' is twice in groups 'group_0' and 'group_1'")


def test_oneflow_accepts_an_empty_group_and_forgets_a_parameter_in_none() -> None:
    """In both modes; the forgotten one never trains, silently."""
    for steps in (eager_steps, graph_steps):
        model = Weights(2)
        optimizer = flow.optim.SGD([{"params": [model.p[0]]}, {"params": []}], lr=1.0)
        assert steps(model, optimizer) == [[1.0, 0.0]]


class Forgetful(Task):
    def configure_optimizers(self) -> Any:
        return flow.optim.SGD([{"params": [self.p[0]]}], lr=1.0)


class Empty(Task):
    def configure_optimizers(self) -> Any:
        return flow.optim.SGD([{"params": self.p.parameters()}, {"params": []}], lr=1.0)


def test_engine_refuses_a_parameter_in_no_group_and_warns_of_an_empty_one(mode: str) -> None:
    refused(mode, Forgetful([{}, {}]), r"no group.*'p\.1'")
    with pytest.warns(OFEngineWarning, match="'group_1' is empty"):
        assert engine_steps(mode, Empty([{}, {}])) == [[1.0, 1.0]]


# ---------------------------------------------------------------------- clipping


def clipping(groups: Sequence[Sequence[int]], parameters: Any) -> Any:
    limit = {"clip_grad_max_norm": 1.0, "clip_grad_norm_type": 2.0}
    members = [{"params": [parameters[i] for i in group], **limit} for group in groups]
    return flow.optim.SGD(members, lr=1.0)


ONE_GROUP, TWO_GROUPS = [[0, 1]], [[0], [1]]
# Four gradients of 1: clipped together to length 1 each is 1/2, two and two 1/sqrt(2).
CLIPPED = [(ONE_GROUP, 0.5), (TWO_GROUPS, 0.5**0.5)]


@pytest.mark.parametrize("groups, expected", CLIPPED, ids=["one group", "two groups"])
def test_oneflow_clips_each_group_alone(groups: List[List[int]], expected: float) -> None:
    """By ``clip_grad_max_norm``, in both modes: splitting a group changes the clipping."""
    model = Weights(2)
    optimizer = clipping(groups, model.p)
    model(ones()).backward()
    optimizer.clip_grad()
    optimizer.step()
    np.testing.assert_allclose(model.first(), -expected, rtol=2e-6)
    model = Weights(2)
    (steps,) = graph_steps(model, clipping(groups, model.p))
    np.testing.assert_allclose(steps, expected, rtol=2e-6)


class Clipped(Task):
    def __init__(self, groups: List[List[int]]) -> None:
        super().__init__([{}, {}])
        self.groups = groups

    def configure_optimizers(self) -> Any:
        members = [{"params": [self.p[i] for i in group]} for group in self.groups]
        return flow.optim.SGD(members, lr=1.0)


@pytest.mark.parametrize("groups", [ONE_GROUP, TWO_GROUPS], ids=["one group", "two groups"])
def test_engine_clips_all_groups_together(mode: str, groups: List[List[int]]) -> None:
    """By ``gradient_clip_val``: splitting a group changes nothing."""
    (steps,) = engine_steps(mode, Clipped(groups), gradient_clip_val=1.0)
    np.testing.assert_allclose(steps, 0.5, rtol=2e-6)


# ---------------------------------------------------------------------- decoupled weight decay


class Decaying(Task):
    """AdamW over weights of 1 and a gradient of 0: only weight decay moves them."""

    def __init__(self) -> None:
        super().__init__([{"lr_scale": 0.25}, {}])
        for parameter in self.p:
            parameter.data.fill_(1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch * 0.0, batch_idx)

    def configure_optimizers(self) -> Any:
        groups = [{"params": [p], **o} for p, o in zip(self.p, self.options)]
        return flow.optim.AdamW(groups, lr=0.5, weight_decay=0.5)


def test_oneflow_scales_the_weight_decay_of_adamw_by_lr_scale_in_graph_mode() -> None:
    """1 - lr * lr_scale * weight_decay, as eager mode has it with lr * lr_scale for lr."""
    model = Weights(2)
    for parameter in model.p:
        parameter.data.fill_(1.0)
    groups = [{"params": [model.p[0]], "lr_scale": 0.25}, {"params": [model.p[1]]}]
    PlainGraph(model, flow.optim.AdamW(groups, lr=0.5, weight_decay=0.5))(ones() * 0)
    assert model.first() == [0.9375, 0.75]


def test_engine_scales_the_weight_decay_of_adamw_by_lr_scale(mode: str) -> None:
    assert engine_steps(mode, Decaying()) == [[0.0625, 0.25]]


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
