"""WarmupLR: OneFlow's linear warm-up, over groups of unequal rates too, in both modes."""

from __future__ import annotations

from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine.rates import WarmupLR

SCHEDULERS = flow.optim.lr_scheduler


class Two(TaskModule):
    """Two groups whose gradient is 1 everywhere, so that each step shows the rate."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.first = nn.Parameter(flow.zeros(1))
        self.second = nn.Parameter(flow.zeros(1))
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.first + self.second).sum() + batch.sum() * 0

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.first], "lr": 1.0}, {"params": [self.second], "lr": 0.25}]
        optimizer = flow.optim.SGD(groups)
        return {"optimizer": optimizer, "lr_scheduler": self.make(optimizer)}


def by_hand(lr: float, steps: int) -> List[float]:
    """Four steps from 0.1 of the rate to the cosine's rate at step 4, then the cosine's."""

    def cosine(step: int) -> float:
        return lr * 0.5 * (1 + np.cos(np.pi * step / 10))

    start, end = 0.1 * lr, cosine(4)
    return [start + (end - start) * t / 4 if t < 4 else cosine(t) for t in range(steps)]


def test_groups_of_unequal_rates_warm_up_to_their_own_schedule(mode: str) -> None:
    task = Two(lambda o: WarmupLR(SCHEDULERS.CosineDecayLR(o, 10), 0.1, 4))
    trainer = quiet_trainer(mode=mode, max_steps=9)
    trainer.fit(task, [flow.ones(1)] * 9)
    for group, weight, lr in (("group_0", task.first, 1.0), ("group_1", task.second, 0.25)):
        rates = [trainer.rates.rate(group, step) for step in range(9)]
        np.testing.assert_allclose(rates, by_hand(lr, 9), rtol=1e-7)
        np.testing.assert_allclose(-weight.numpy(), [sum(rates)], rtol=1e-6)


def test_over_equal_rates_it_is_oneflows_own() -> None:
    def rates(make: Any) -> List[float]:
        optimizer = flow.optim.SGD([nn.Parameter(flow.zeros(1))], lr=0.3)
        scheduler = make(SCHEDULERS.CosineDecayLR(optimizer, 20))
        seen = []
        for _ in range(25):
            seen.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return seen

    ours = rates(lambda s: WarmupLR(s, 0.2, 6))
    theirs = rates(lambda s: SCHEDULERS.WarmupLR(s, 0.2, 6, "linear"))
    assert ours == theirs


def test_oneflows_refusal_says_what_to_use_instead(mode: str) -> None:
    task = Two(lambda o: SCHEDULERS.WarmupLR(SCHEDULERS.CosineDecayLR(o, 10), 0.1, 4, "linear"))
    with pytest.raises(RateError, match=r"ofengine\.rates\.WarmupLR"):
        quiet_trainer(mode=mode, max_steps=2).fit(task, [flow.ones(1)] * 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s, o: WarmupLR(s, 0.1, 0), "warmup_iters"),
        (lambda s, o: WarmupLR(s, 1.5, 4), "warmup_factor"),
        (lambda s, o: WarmupLR(SCHEDULERS.LambdaLR(o, lambda t: 1.0)), "LambdaLR"),
        (lambda s, o: WarmupLR(o), "SGD"),
    ],
)
def test_bad_arguments_are_refused(make: Any, says: str) -> None:
    optimizer = flow.optim.SGD([nn.Parameter(flow.zeros(1))], lr=0.3)
    with pytest.raises(RateError, match=says):
        make(SCHEDULERS.CosineDecayLR(optimizer, 20), optimizer)
