"""RecordedSchedule against stepping the real scheduler, for every scheduler of OneFlow."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from hypothesis import given, strategies as st
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import RateError
from ofengine.rates.schedule import RecordedSchedule


def optimizer_of(*lrs: float) -> Any:
    groups = [{"params": [nn.Parameter(flow.zeros(1))], "lr": lr} for lr in lrs]
    return flow.optim.SGD(groups)


def _cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.01)


class Remembering(lr_scheduler._LRScheduler):
    """A user's own: its rate depends on how often it was stepped, not on ``last_step`` alone."""

    def __init__(self, optimizer: Any) -> None:
        self.history: List[float] = []
        super().__init__(optimizer)

    def get_lr(self, base_lr: float, step: int) -> float:
        self.history.append(base_lr)
        return base_lr / (1 + len(self.history)) + 0.01 * step


SCHEDULERS: Dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5, 11], gamma=0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.93),
    "CosineAnnealingLR": _cosine,
    "CosineDecayLR": lambda o: lr_scheduler.CosineDecayLR(o, decay_steps=5, alpha=0.1),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, decay_rate=0.8),
    "WarmRestarts, limited": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 4, restart_limit=2, eta_min=0.001
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, end_learning_rate=0.01, power=2.0),
    "PolynomialLR, cycling": lambda o: lr_scheduler.PolynomialLR(o, 6, cycle=True),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR, one a group": lambda o: lr_scheduler.LambdaLR(
        o, [lambda step: 0.9**step, lambda step: 1.0 + step]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3),
            lr_scheduler.ExponentialLR(o, gamma=0.9),
        ]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), _cosine(o)], milestones=[4], interval_rescaling=[True]
    ),
    "WarmUpLR": lambda o: lr_scheduler.WarmUpLR(o, warmup_factor=0.5, warmup_iters=4),
    "WarmUpLR, constant": lambda o: lr_scheduler.WarmUpLR(
        _cosine(o), warmup_factor=0.5, warmup_iters=3, warmup_method="constant"
    ),
    "WarmUpLR, before": lambda o: lr_scheduler.WarmUpLR(
        _cosine(o), warmup_factor=0.5, warmup_iters=3, warmup_prefix=True
    ),
    "a user's own": Remembering,
}


def step_by_hand(make: Callable[[Any], Any], steps: int, ahead: int = 0) -> List[List[float]]:
    """The rates of two groups as the real scheduler writes them."""
    optimizer = optimizer_of(0.1, 0.4)
    scheduler = make(optimizer)
    for _ in range(ahead):
        scheduler.step()
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(steps):
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def everything_in(scheduler: Any) -> Dict[str, Any]:
    """The scheduler's state and what it wrote into the groups, its inner schedulers too."""
    state = {k: copy.copy(v) for k, v in vars(scheduler).items() if k != "optimizer"}
    state["schedulers"] = [everything_in(part) for part in getattr(scheduler, "schedulers", [])]
    state["groups"] = [dict(group.options) for group in scheduler.optimizer.param_groups]
    return state


@pytest.mark.parametrize("name", SCHEDULERS)
@given(positions=st.lists(st.integers(0, 40), min_size=1, max_size=8), ahead=st.integers(0, 3))
def test_it_says_what_stepping_gives(name: str, positions: List[int], ahead: int) -> None:
    """At any position, asked in any order, the rate is the real scheduler's to the last bit."""
    expected = step_by_hand(SCHEDULERS[name], 40, ahead)
    scheduler = SCHEDULERS[name](optimizer_of(0.1, 0.4))
    for _ in range(ahead):
        scheduler.step()
    recorded = RecordedSchedule(scheduler)
    for position in positions:
        for group in range(2):
            assert recorded.lr(group, position) == expected[position][group]
        assert recorded.lrs(position) == expected[position]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_original_is_left_alone(name: str) -> None:
    """Neither the scheduler nor its optimizer's groups change, and stepping it goes on as ever."""
    scheduler = SCHEDULERS[name](optimizer_of(0.1, 0.4))
    before = everything_in(scheduler)
    RecordedSchedule(scheduler).lr(1, 30)
    assert everything_in(scheduler) == before
    expected = step_by_hand(SCHEDULERS[name], 1)[1]
    scheduler.step()
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == expected


def test_far_positions_and_back() -> None:
    """A hundred thousand positions ahead, then back to the first: all are right."""
    recorded = RecordedSchedule(lr_scheduler.StepLR(optimizer_of(0.5, 1.0), 1000, gamma=0.5))
    for position in (50_000, 4095, 4096, 4097, 0, 20_479, 20_480, 49_999, 1, 8192):
        for group, lr in enumerate((0.5, 1.0)):
            assert recorded.lr(group, position) == lr * 0.5 ** (position // 1000), position


def test_a_scheduler_with_memory_survives_going_back() -> None:
    """Where the rate depends on the steps made, each position still has its own rate."""
    expected = step_by_hand(Remembering, 9000)
    recorded = RecordedSchedule(Remembering(optimizer_of(0.1, 0.4)))
    for position in (8999, 5, 4096, 4095, 0, 9000):
        assert recorded.lr(0, position) == expected[position][0]
        assert recorded.lr(1, position) == expected[position][1]


def test_a_verbose_scheduler_is_not_heard(capsys: pytest.CaptureFixture[str]) -> None:
    """Stepping ahead prints nothing, even where the scheduler is verbose."""
    scheduler = lr_scheduler.StepLR(optimizer_of(0.1), 3, verbose=True)
    capsys.readouterr()
    RecordedSchedule(scheduler).lr(0, 20)
    assert capsys.readouterr().out == ""
    assert scheduler.verbose is True


def test_a_scheduler_that_cannot_be_copied_is_explained() -> None:
    """An open file in a scheduler is an error that names its class."""

    class Chatty(lr_scheduler.StepLR):
        def __init__(self, optimizer: Any) -> None:
            self.log = open(__file__)  # noqa: SIM115
            super().__init__(optimizer, 3)

    scheduler = Chatty(optimizer_of(0.1))
    with pytest.raises(RateError, match="Chatty cannot be copied"):
        RecordedSchedule(scheduler)
    scheduler.log.close()
