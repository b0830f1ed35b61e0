"""How OneFlow 0.9.0 by itself treats rates, fact by fact, and that the engine does right there.

A test ``test_oneflow_...`` pins what OneFlow does in a few lines without the engine, so that a
version that changes it is noticed; the test ``test_engine_...`` after it shows that both modes
then do the same, or refuse before training.

Not tested here: the multi-tensor update pass, which exists on CUDA alone. Schedulers are in
``test_oneflow_schedulers.py``.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import run_python
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
    refused,
    sgd,
)

from ofengine import OFEngineWarning, RateError

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
    done = run_python("-c", TWICE, timeout=60)
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
