"""The definition of a rate under a schedule, measured as in ``test_definition.py``."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Tuple

import pytest
from helpers import MODES, OfUnknownLength
from hypothesis import Phase, given, settings, strategies as st
from measured_rates import (
    LAYERWISE,
    ConstantGradient,
    Schedule,
    batches,
    check,
    measure,
    rates_by_hand,
)
from oneflow.optim import lr_scheduler

import ofengine.modes.graph
import ofengine.rates.plan
from ofengine.callbacks import LRDecayCallback

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")


# ---------------------------------------------------------------------- schedules


def _warm_restarts(lr: float, t: int) -> float:
    start, length = (0, 3) if t < 3 else (3, 6) if t < 9 else (9, 12)
    return 0.001 + (lr - 0.001) * 0.5 * (1 + math.cos(math.pi * (t - start) / length))


def _polynomial(lr: float, t: int) -> float:
    return (lr - 0.001) * (1 - min(t, 6) / 6) ** 2 + 0.001


SCHEDULES: Dict[str, Tuple[Schedule, Callable[[float, int], float]]] = {
    "StepLR": (
        lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
        lambda lr, t: lr * 0.3 ** (t // 3),
    ),
    "MultiStepLR": (
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.3),
        lambda lr, t: lr * 0.3 ** ((t >= 2) + (t >= 5)),
    ),
    "ExponentialLR": (
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.93),
        lambda lr, t: lr * 0.93**t,
    ),
    "CosineAnnealingLR": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=0.002),
        lambda lr, t: 0.002 + (lr - 0.002) * (1 + math.cos(math.pi * t / 6)) / 2,
    ),
    "CosineDecayLR": (
        lambda o: lr_scheduler.CosineDecayLR(o, decay_steps=5, alpha=0.1),
        lambda lr, t: lr * (0.9 * (1 + math.cos(math.pi * min(t, 5) / 5)) / 2 + 0.1),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2, eta_min=0.001),
        _warm_restarts,
    ),
    "PolynomialLR": (
        lambda o: lr_scheduler.PolynomialLR(o, decay_batch=6, end_learning_rate=0.001, power=2.0),
        _polynomial,
    ),
    "ConstantLR": (
        lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4),
        lambda lr, t: lr * (0.3 if t < 4 else 1),
    ),
    "LinearLR": (
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=0.9, total_iters=5),
        lambda lr, t: lr * (0.2 + 0.7 * min(t, 5) / 5),
    ),
    "LambdaLR": (
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda lr, t: lr / (1 + t),
    ),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3),
                lr_scheduler.ExponentialLR(o, gamma=0.9),
            ]
        ),
        lambda lr, t: lr * (0.1 if t < 3 else 1) * 0.9**t,
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
                lr_scheduler.ExponentialLR(o, gamma=0.8),
            ],
            milestones=[4],
            interval_rescaling=True,
        ),
        lambda lr, t: lr * (0.25 + 0.75 * t / 4) if t < 4 else lr * 0.8 ** (t - 4),
    ),
    "WarmUpLR": (
        lambda o: lr_scheduler.WarmUpLR(o, warmup_factor=0.5, warmup_iters=4),
        lambda lr, t: lr * (0.5 + 0.5 * min(t, 4) / 4),
    ),
    "constant WarmUpLR over cosine": (
        lambda o: lr_scheduler.WarmUpLR(
            lr_scheduler.CosineAnnealingLR(o, T_max=8),
            warmup_factor=0.5,
            warmup_iters=2,
            warmup_method="constant",
        ),
        lambda lr, t: lr * (0.5 if t < 2 else (1 + math.cos(math.pi * t / 8)) / 2),
    ),
    "linear WarmUpLR before cosine": (
        lambda o: lr_scheduler.WarmUpLR(
            lr_scheduler.CosineAnnealingLR(o, T_max=8),
            warmup_factor=0.5,
            warmup_iters=3,
            warmup_prefix=True,
        ),
        lambda lr, t: (
            lr * (0.5 + 0.5 * t / 3 if t < 3 else (1 + math.cos(math.pi * (t - 3) / 8)) / 2)
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_with_layerwise_rates_and_decay(mode: str, name: str) -> None:
    """schedule(lr) * lr_scale * lr_decay_scale ** events, for each of OneFlow's schedulers.

    LambdaLR and ChainedScheduler too, which OneFlow's own graphs refuse.
    """
    schedule, closed_form = SCHEDULES[name]
    task = ConstantGradient(LAYERWISE, schedule)
    decay = LRDecayCallback(every_n_batches=4)
    meter = measure(mode, task, batches(6), 2, callbacks=[decay])
    check(meter, task, rates_by_hand(task, [6, 6], every_n_batches=4))
    events_before = [0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]
    for t, events in enumerate(events_before):
        for group, options in enumerate(task.options):
            rate = closed_form(options.get("lr", 0.25), t) * options.get("lr_scale", 1)
            rate *= options.get("lr_decay_scale", 1) ** events
            assert meter.rates[t][group] == pytest.approx(rate, rel=1e-6, abs=1e-12), (t, group)


def test_lr_scale_scales_the_floor_of_a_schedule_too(mode: str) -> None:
    """``lr_scale`` comes after the schedule: ``eta_min`` is scaled with the rest."""
    task = ConstantGradient(
        [{"lr": 1.0, "lr_scale": 0.5}, {"lr": 1.0}],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=0.25),
    )
    meter = measure(mode, task, batches(5), 1)
    assert meter.rates[4] == [0.125, 0.25]


class OneSchedulePerGroup(lr_scheduler.LambdaLR):
    """A user's own subclass, with state of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.memory: List[int] = []
        super().__init__(optimizer, [lambda t: 0.5**t, lambda t: float(t % 3)])

    def step(self) -> None:
        super().step()
        self.memory.append(self.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1 + len(self.memory)


def test_a_schedule_of_the_user_s_own_and_one_per_group(mode: str) -> None:
    """Any deterministic scheduler works, a subclass that remembers its steps too."""
    task = ConstantGradient([{"lr": 1.0}, {"lr": 0.5, "lr_scale": 0.5}], OneSchedulePerGroup)
    meter = measure(mode, task, batches(5), 1)
    first = [0.5**t * (2 + t) for t in range(5)]
    second = [0.5 * (t % 3) * (2 + t) * 0.5 for t in range(5)]
    assert meter.rates == [list(pair) for pair in zip(first, second)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_interval_and_frequency(mode: str, interval: str, frequency: int) -> None:
    """The schedule moves on by one every ``frequency`` steps or epochs."""
    task = ConstantGradient(
        [{"lr": 1.0}, {"lr": 1.0, "lr_scale": 0.25}],
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5),
        {"interval": interval, "frequency": frequency},
    )
    meter = measure(mode, task, batches(3), 4, accumulate_grad_batches=2)
    steps = range(8)  # two in each epoch
    moved = [(t if interval == "step" else t // 2) // frequency for t in steps]
    assert meter.rates == [[0.5**k, 0.25 * 0.5**k] for k in moved]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedule_decay_and_accumulation_together(mode: str, interval: str) -> None:
    """Everything at once, with epochs of another length each time."""
    lengths = [5, 7, 4]
    task = ConstantGradient(
        LAYERWISE,
        lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
        {"interval": interval, "frequency": 2},
    )
    data = OfUnknownLength(*[batches(length) for length in lengths])
    decay = LRDecayCallback(every_n_batches=2, per_epoch=False)
    meter = measure(mode, task, data, 3, callbacks=[decay], accumulate_grad_batches=2)
    check(meter, task, rates_by_hand(task, lengths, 2, 2, per_epoch=False))


# ---------------------------------------------------------------------- rates that are used up


def _check_in_graph_mode(schedule: str, accumulate: int, known: bool) -> None:
    task, length = ConstantGradient(LAYERWISE, SCHEDULES[schedule][0]), 13 * accumulate
    data: Any = batches(length) if known else OfUnknownLength(batches(length))
    meter = measure("graph", task, data, 1, accumulate_grad_batches=accumulate)
    check(meter, task, rates_by_hand(task, [length], accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_has_the_rates_of_all_steps_to_come(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody knows how many there are, those of some steps are compiled in at a time."""
    monkeypatch.setattr(ofengine.modes.graph, "_TABLE_STEPS", 3)
    _check_in_graph_mode("StepLR", accumulate, known=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_has_no_more_rates_than_it_may(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ofengine.rates.plan, "_MOST_ENTRIES", 24)
    _check_in_graph_mode("ExponentialLR", accumulate, known=True)


# ---------------------------------------------------------------------- anything together

RUNS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "known": st.booleans(),
        "accumulate": st.sampled_from([1, 2, 4]),
        "every": st.integers(1, 5),
        "per_epoch": st.booleans(),
        "key": st.sampled_from(["lr_decay_scale", "lr_scale"]),
        "schedule": st.sampled_from([None, *SCHEDULES]),
        "interval": st.sampled_from(["step", "epoch"]),
        "frequency": st.integers(1, 3),
        "groups": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "lr": st.floats(1e-6, 10),
                    "lr_scale": st.floats(0.01, 4),
                    "lr_decay_scale": st.floats(0.1, 1.5),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    }
)


def _run_and_check(mode: str, run: Dict[str, Any]) -> None:
    lengths = run["lengths"]
    if run["known"]:
        lengths = [lengths[0]] * len(lengths)
        data: Any = batches(lengths[0])
    else:
        data = OfUnknownLength(*[batches(length) for length in lengths])
    schedule = None if run["schedule"] is None else SCHEDULES[run["schedule"]][0]
    scheduling = {"interval": run["interval"], "frequency": run["frequency"]}
    task = ConstantGradient(run["groups"], schedule, scheduling)
    decay = LRDecayCallback(run["every"], run["per_epoch"], run["key"])
    meter = measure(
        mode,
        task,
        data,
        len(lengths),
        callbacks=[decay],
        accumulate_grad_batches=run["accumulate"],
    )
    expected = rates_by_hand(
        task, lengths, run["accumulate"], run["every"], run["per_epoch"], run["key"]
    )
    check(meter, task, expected)


@settings(max_examples=60)
@given(run=RUNS)
def test_any_combination_in_eager_mode(run: Dict[str, Any]) -> None:
    """The definition holds for whatever groups, schedules, windows and epochs are combined."""
    _run_and_check("eager", run)


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(run=RUNS)
def test_any_combination_in_graph_mode(run: Dict[str, Any]) -> None:
    """As above, compiled."""
    _run_and_check("graph", run)


def test_both_modes_are_tested() -> None:
    """The ``mode`` fixture runs over all modes there are."""
    assert MODES == ("eager", "graph")
