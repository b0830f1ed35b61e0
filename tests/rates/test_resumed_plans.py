"""A plan that is resumed, without training: for any groups, schedule and place."""

from __future__ import annotations

import json
from typing import Any, Callable, Tuple

import oneflow as flow
import pytest
from hypothesis import given, settings, strategies as st
from oneflow import nn
from resumed_rates import (
    KINDS,
)

from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.optimizers import Optimization, make_schedule
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.resume import plan_state, resume_plan

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")


@st.composite
def plans(draw: Any) -> Tuple[Callable[..., Tuple[RatePlan, Optimization]], int, int]:
    """(what makes a plan, its optimizer steps, the step of the checkpoint).

    All base rates and scales of the plan can be multiplied by a number each.
    """
    keys = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "lr": st.floats(1e-4, 10),
                    "lr_scale": st.one_of(st.just(1.0), st.floats(0, 5)),
                    "lr_decay_scale": st.one_of(st.just(1.0), st.floats(0.1, 1.5)),
                }
            ),
            min_size=1,
            max_size=3,
        )
    )
    kind = draw(st.sampled_from([k for k in KINDS if k not in ("one a group", "oneflow WarmupLR")]))
    batches, accumulate = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    epochs = draw(st.integers(1, 4))
    interval = draw(st.sampled_from(["step", "epoch"]))
    frequency = draw(st.integers(1, 2))
    decay = DecayEvents(
        draw(st.integers(1, 4)), draw(st.booleans()),
        draw(st.sampled_from(["lr_scale", "lr_decay_scale"])),
    )  # fmt: skip
    total = epochs * -(-batches // accumulate)

    def make(more: float = 1.0, scale: float = 1.0) -> Tuple[RatePlan, Optimization]:
        optimizer = flow.optim.SGD(
            [{"params": [nn.Parameter(flow.zeros(1))], "lr": each["lr"] * more} for each in keys]
        )
        schedule = KINDS[kind].make
        made = Optimization(
            optimizer, None if schedule is None else schedule(optimizer), interval, frequency
        )
        groups = [
            Group(
                name=f"g{index}",
                lr=each["lr"] * more,
                lr_scale=each["lr_scale"] * scale,
                lr_decay_scale=each["lr_decay_scale"],
                tensors=1,
                numbers=1,
                declares_scale=True,
            )
            for index, each in enumerate(keys)
        ]
        rates = make_schedule(made, [g.name for g in groups], [g.lr for g in groups])
        calendar = Calendar(batches, accumulate)
        plan = RatePlan(groups, calendar, rates, interval, frequency)
        plan.set_decay(decay, "test")
        plan.stop = total
        return plan, made

    return make, total, draw(st.integers(0, total - 1))


@settings(max_examples=200)
@given(plans(), st.data())
def test_a_resumed_plan_gives_the_uninterrupted_plan_s_rates(drawn: Any, data: Any) -> None:
    """For any groups, schedule and place; with rates set, and a metric observed, on the way."""
    make, total, place = drawn
    plan, made = make()
    for step in range(place):
        plan.rates(step)
        if data.draw(st.booleans()):
            plan.observe(data.draw(st.sampled_from([1.0, 2.0])))
        if step and data.draw(st.integers(0, 3)) == 0:
            group = data.draw(st.sampled_from(plan.names))
            plan.set_lr(group, data.draw(st.floats(0, 1)), step)
    state = json.loads(json.dumps(plan_state(plan, made, place)))
    resumed, its_made = make()
    assert resume_plan(resumed, its_made, state, "checkpoint") == []
    for step in range(place, total):
        assert resumed.rates(step) == plan.rates(step)
    assert json.loads(json.dumps(plan_state(resumed, its_made, place))) == state


@settings(max_examples=200)
@given(plans(), st.floats(0.1, 4), st.floats(0.1, 4), st.sampled_from(["checkpoint", "config"]))
def test_changed_numbers_count_by_the_policy(
    drawn: Any, more: float, scale: float, policy: str
) -> None:
    """All base rates and scales multiplied: the old plan's rates go on, or the new one's do."""
    make, total, place = drawn
    old, made = make()
    state = json.loads(json.dumps(plan_state(old, made, place)))

    new, _ = make(more, scale)
    resumed, its_made = make(more, scale)
    lines = resume_plan(resumed, its_made, state, policy)
    for step in range(place, total):
        assert resumed.rates(step) == (old if policy == "checkpoint" else new).rates(step)
    differs = [old.rates(step) != new.rates(step) for step in range(place, total)]
    assert bool(lines) == any(differs)
