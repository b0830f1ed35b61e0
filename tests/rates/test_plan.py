"""RatePlan against the definition, computed in numpy's float32 and in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from hypothesis import given, strategies as st
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import RateError, RatePlan, TaskModule
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.plan import DecayEvents
from ofengine.rates.schedule import FunctionSchedule, RecordedSchedule

Keys = Dict[str, float]

GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "lr": st.floats(0, 10),
            "lr_scale": st.one_of(st.just(1.0), st.floats(0, 5)),
            "lr_decay_scale": st.one_of(st.just(1.0), st.floats(0.1, 1.5)),
        }
    ),
    min_size=1,
    max_size=4,
)
EXPONENTIAL = "exponential"
COSINE = "cosine"


def group(index: int, keys: Keys) -> Group:
    return Group(
        name=f"g{index}",
        lr=keys["lr"],
        lr_scale=keys["lr_scale"],
        lr_decay_scale=keys["lr_decay_scale"],
        tensors=1,
        numbers=1,
        declares_scale=True,
    )


def schedule_of(kind: Optional[str], groups: Sequence[Keys]) -> Any:
    if kind is None:
        return None
    optimizer = flow.optim.SGD(
        [{"params": [nn.Parameter(flow.zeros(1))], "lr": keys["lr"]} for keys in groups]
    )
    if kind == COSINE:
        return lr_scheduler.CosineAnnealingLR(optimizer, 7)
    return lr_scheduler.ExponentialLR(optimizer, gamma=0.7)


def by_hand(
    groups: Sequence[Keys],
    kind: Optional[str],
    lengths: Sequence[int],
    accumulate: int,
    decay: DecayEvents,
    interval: str,
    frequency: int,
) -> Tuple[List[List[float]], List[List[Fraction]]]:
    """Rates of every step: in float32 as a hand-written loop has them, and exactly."""
    scheduler = schedule_of(kind, groups)
    scheduled = [keys["lr"] for keys in groups]
    factors = [1.0] * len(groups)
    rounded: List[List[float]] = []
    exact: List[List[Fraction]] = []
    cookbook = decay.key == "lr_scale"
    events = in_run = 0
    for epoch, length in enumerate(lengths):
        window: List[int] = []
        for batch in range(length):
            window.append(batch if decay.per_epoch else in_run)
            in_run += 1
            if len(window) < accumulate and batch < length - 1:
                continue
            row, exact_row = [], []
            for keys, lr, factor in zip(groups, scheduled, factors):
                scale = 1.0 if cookbook else keys["lr_scale"]
                row.append(float(np.float32(lr * factor) * np.float32(scale)))
                base = keys["lr"] if kind is None else lr
                exact_row.append(
                    Fraction(base) * Fraction(scale) * Fraction(keys[decay.key]) ** events
                )
            rounded.append(row)
            exact.append(exact_row)
            for index in window:
                if index % decay.every_n_batches == 0:
                    events += 1
                    for i, keys in enumerate(groups):
                        if kind is None:
                            scheduled[i] *= keys[decay.key]
                        else:
                            factors[i] *= keys[decay.key]
            window = []
            if kind is not None and interval == "step" and len(rounded) % frequency == 0:
                scheduler.step()
                scheduled = [g["lr"] for g in scheduler.optimizer.param_groups]
        if kind is not None and interval == "epoch" and (epoch + 1) % frequency == 0:
            scheduler.step()
            scheduled = [g["lr"] for g in scheduler.optimizer.param_groups]
    return rounded, exact


def make_plan(
    groups: Sequence[Keys],
    kind: Optional[str],
    calendar: Calendar,
    decay: DecayEvents,
    interval: str,
    frequency: int,
) -> RatePlan:
    scheduler = schedule_of(kind, groups)
    schedule = None if scheduler is None else RecordedSchedule(scheduler)
    described = [group(index, keys) for index, keys in enumerate(groups)]
    plan = RatePlan(described, calendar, schedule, interval, frequency)
    plan.set_decay(decay, "a test")
    return plan


def for_any_plan(test: Callable[..., None]) -> Callable[..., None]:
    return given(
        groups=GROUPS,
        kind=st.sampled_from([None, EXPONENTIAL, COSINE]),
        length=st.integers(1, 9),
        accumulate=st.integers(1, 4),
        decay=st.builds(
            DecayEvents,
            every_n_batches=st.integers(1, 11),
            per_epoch=st.booleans(),
            key=st.sampled_from(["lr_scale", "lr_decay_scale"]),
        ),
        interval=st.sampled_from(["step", "epoch"]),
        frequency=st.integers(1, 3),
    )(test)


@for_any_plan
def test_rates_are_the_definition(
    groups: List[Keys],
    kind: Optional[str],
    length: int,
    accumulate: int,
    decay: DecayEvents,
    interval: str,
    frequency: int,
) -> None:
    """Bit for bit what float32 gives, and within its rounding of the exact product."""
    plan = make_plan(groups, kind, Calendar(length, accumulate), decay, interval, frequency)
    rounded, exact = by_hand(groups, kind, [length] * 4, accumulate, decay, interval, frequency)
    for step, row in enumerate(rounded):
        assert plan.rates(step) == row, step
        for index, rate in enumerate(row):
            assert plan.rate(f"g{index}", step) == rate
            error = abs(Fraction(rate) - exact[step][index])
            # near 0, float32 has steps of 2 ** -149
            assert error <= exact[step][index] * Fraction(2) ** -22 + Fraction(2) ** -140


@for_any_plan
def test_tables_say_the_same_as_rates(
    groups: List[Keys],
    kind: Optional[str],
    length: int,
    accumulate: int,
    decay: DecayEvents,
    interval: str,
    frequency: int,
) -> None:
    """What is compiled into a graph is, step by step, what the plan says."""
    plan = make_plan(groups, kind, Calendar(length, accumulate), decay, interval, frequency)
    rounded, _ = by_hand(groups, kind, [length] * 4, accumulate, decay, interval, frequency)
    start, stop = min(2, len(rounded) - 1), len(rounded)
    tables, end = plan.tables(start, stop, 10**6)
    assert end == stop
    for index, (starts, values) in enumerate(tables):
        assert starts[0] == start
        assert starts == sorted(set(starts))
        assert all(first != second for first, second in zip(values, values[1:]))
        scale = np.float32(1.0 if decay.key == "lr_scale" else groups[index]["lr_scale"])
        for step in range(start, stop):
            value = [v for s, v in zip(starts, values) if s <= step][-1]
            assert float(np.float32(value) * scale) == rounded[step][index]


def test_tables_end_early_where_they_grow_too_large() -> None:
    """A table is cut after so many values, and says where."""
    keys = {"lr": 1.0, "lr_scale": 1.0, "lr_decay_scale": 1.0}
    plan = make_plan([keys, keys], EXPONENTIAL, Calendar(10), DecayEvents(), "step", 1)
    tables, end = plan.tables(0, 100, 10)
    assert end == 5
    assert [len(values) for _, values in tables] == [5, 5]


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5), accumulate=st.integers(1, 3))
def test_epochs_that_ended_otherwise_than_expected(lengths: List[int], accumulate: int) -> None:
    """Once the calendar is told, the rates of what comes after are right."""
    groups = [{"lr": 1.0, "lr_scale": 0.3, "lr_decay_scale": 0.9}]
    decay = DecayEvents(every_n_batches=3)
    calendar = Calendar(None, accumulate)
    plan = make_plan(groups, EXPONENTIAL, calendar, decay, "epoch", 1)
    for epoch, length in enumerate(lengths):
        calendar.epoch_ended(epoch, length)
    rounded, _ = by_hand(groups, EXPONENTIAL, [*lengths, 1], accumulate, decay, "epoch", 1)
    assert [plan.rates(step) for step in range(len(rounded))] == rounded


CONSTANT = {"lr": 0.5, "lr_scale": 0.25, "lr_decay_scale": 1.0}
DECAYING = {"lr": 0.5, "lr_scale": 0.25, "lr_decay_scale": 0.5}


@pytest.mark.parametrize(
    "keys, kind, interval, key, constant, by_epochs",
    [
        (CONSTANT, None, "step", "lr_decay_scale", True, False),
        (CONSTANT, None, "step", "lr_scale", False, True),
        (DECAYING, None, "step", "lr_decay_scale", False, True),
        (CONSTANT, EXPONENTIAL, "step", "lr_decay_scale", False, False),
        (CONSTANT, EXPONENTIAL, "epoch", "lr_decay_scale", False, True),
    ],
)
def test_what_a_plan_knows_of_itself(
    keys: Keys, kind: Optional[str], interval: str, key: str, constant: bool, by_epochs: bool
) -> None:
    """Whether rates change at all, and whether the length of epochs matters to them."""
    plan = make_plan([keys], kind, Calendar(4), DecayEvents(2, True, key), interval, 1)
    assert plan.is_constant() is constant
    assert plan.depends_on_epochs() is by_epochs
    assert plan.names == ["g0"]


def test_an_unknown_group_is_an_error_that_names_those_there_are() -> None:
    """Asking for a group that is not there says which are."""
    plan = make_plan([CONSTANT, CONSTANT], None, Calendar(4), DecayEvents(), "step", 1)
    with pytest.raises(RateError, match=r"'backbone'.*\['g0', 'g1'\]"):
        plan.rate("backbone", 0)


def test_decay_can_be_set_twice_alike_but_not_otherwise() -> None:
    """A pair of callbacks may agree; where they do not, it is an error that names them."""
    plan = make_plan([DECAYING], None, Calendar(4), DecayEvents(2), "step", 1)
    plan.set_decay(DecayEvents(2), "another")
    with pytest.raises(RateError, match=r"another and a third disagree"):
        plan.set_decay(DecayEvents(3), "a third")
    assert [plan.rate("g0", step) for step in range(5)] == [0.125, 0.0625, 0.0625, 0.03125, 0.03125]


def test_asking_for_rates_again_or_backwards_changes_nothing() -> None:
    """A plan is a function of the step: the order of the questions does not matter."""
    forwards = make_plan([DECAYING], COSINE, Calendar(4), DecayEvents(2), "step", 1)
    backwards = make_plan([DECAYING], COSINE, Calendar(4), DecayEvents(2), "step", 1)
    steps = range(30)
    expected = [forwards.rates(step) for step in steps]
    assert [backwards.rates(step) for step in reversed(steps)] == expected[::-1]
    assert [forwards.rates(step) for step in steps] == expected


def test_what_rates_returns_belongs_to_the_caller() -> None:
    optimizer = flow.optim.SGD([flow.nn.Parameter(flow.ones(1))], lr=0.1)
    made = group(0, {"lr": 0.1, "lr_scale": 1.0, "lr_decay_scale": 1.0})
    for schedule in (None, FunctionSchedule([0.1], lambda position: 1 / (1 + position))):
        plan = RatePlan([made], Calendar(batches_per_epoch=9), schedule)
        plan.watch(optimizer)
        for step in range(3):
            before = plan.rates(step)
            plan.rates(step)[0] = 7.0
            assert plan.rates(step) == before != [7.0]
            plan.write(step)
            assert optimizer.param_groups[0]["lr"] == before[0]
        optimizer.param_groups[0]["lr"] = 0.1


@pytest.mark.parametrize("recorded", [False, True])
def test_the_step_before_a_change_keeps_its_rates(recorded: bool) -> None:
    """They are what ``LearningRateMonitor`` logs after the change."""
    schedule: Any = None
    if recorded:
        optimizer = flow.optim.SGD([flow.nn.Parameter(flow.ones(1))], lr=0.5)
        schedule = RecordedSchedule(flow.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
    made = group(0, {"lr": 0.5, "lr_scale": 1.0, "lr_decay_scale": 1.0})
    plan = RatePlan([made], Calendar(batches_per_epoch=9), schedule)
    before = plan.rates(2)
    plan.set_lr("g0", 2.0, 3)
    plan.set_lr("g0", 4.0, 3)
    assert plan.rates(2) == before
    used = plan.rates(3)
    assert used == [2.0 if recorded else 4.0]  # half of it where the schedule halves
    plan.set_lr("g0", 1.0, 4)
    assert plan.rates(3) == used
    if recorded:
        with pytest.raises(RateError, match=r"not known any more.*set_lr"):
            plan.rates(1)


class Task(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.body(batch)).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"name": "body", "params": self.body.parameters(), "lr": 0.5, "lr_scale": 0.5},
            {"params": self.head.parameters(), "lr_decay_scale": 0.5},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.25)
        scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_a_trainer_has_the_plan_of_its_run(mode: str) -> None:
    """``trainer.rates`` knows every rate by the group's name, in both modes."""
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    trainer.fit(Task(), [flow.ones(2, 2)] * 3)
    assert trainer.rates.names == ["body", "group_1"]
    body = [trainer.rates.rate("body", t) for t in range(6)]
    assert body == [0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]
    # the events follow batch 0 of either epoch, the steps 0 and 3
    head = [trainer.rates.rate("group_1", t) for t in range(6)]
    assert head == [0.25, 0.125, 0.0625, 0.0625, 2**-6, 2**-6]


def test_scheduler_and_groups_are_left_as_a_loop_by_hand_leaves_them() -> None:
    """After ``fit`` the scheduler stands where its loop would have left it, lr_scale apart."""
    trainer = quiet_trainer(max_epochs=2)
    task = Task()
    trainer.fit(task, [flow.ones(2, 2)] * 3)
    assert trainer.lr_scheduler.last_step == 6
    by_hand_lrs = [0.5 * 0.5**3, 0.25 * 0.5**3]
    assert trainer.lr_scheduler.get_last_lr() == by_hand_lrs
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.0625, 0.03125 * 0.25]
