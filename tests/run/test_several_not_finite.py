"""Of several optimizers, that one is named whose loss is not finite."""

from __future__ import annotations

from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, bits, fill_deterministically, quiet_trainer
from helpers.duels import Duel
from helpers.resuming import shuffled
from oneflow import nn

from ofengine import NonFiniteError, OFEngineWarning, TaskModule
from ofengine.callbacks import TerminateOnNaN

ROWS = [flow.ones(2, 2) for _ in range(4)]


class Two(TaskModule):
    """The loss of the second optimizer is NaN where a batch holds a two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        if optimizer_name == "first":
            return self.first(batch).mean()
        return self.second(batch).mean() * (1.0 - (batch - 1.0).abs().sum()).sqrt()

    def configure_optimizers(self) -> Any:
        return {
            name: flow.optim.SGD(getattr(self, name).parameters(), lr=0.1)
            for name in ("first", "second")
        }


def rows() -> List[Any]:
    return [*ROWS[:2], flow.ones(2, 2) * 2, ROWS[3]]


WHERE = r"optimizer step 2 \(from 0; epoch 0, batch 2\)"


@pytest.mark.parametrize("mode", MODES)
def test_the_warning_and_the_error_name_it(mode: str) -> None:
    message = rf"the loss of {WHERE} is nan, in the step of optimizer 'second', and after"
    both = (
        pytest.warns(OFEngineWarning, match=message),
        pytest.raises(NonFiniteError, match=message),
    )
    with both[0], both[1]:
        quiet_trainer(mode=mode, max_epochs=1).fit(Two(), rows())
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=TerminateOnNaN())
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(Two(), rows())


def test_an_anomaly_is_replayed_in_the_step_of_its_optimizer(mode: str) -> None:
    task = Two()
    told = (
        rf"in the step of optimizer 'second': in {WHERE} the loss is nan\. Replayed operation by "
        r"operation: NaN arose first at .*sqrt\(\)` in the forward of Two.*before that step"
    )
    with pytest.raises(NonFiniteError, match=told):
        quiet_trainer(mode=mode, max_epochs=1, detect_anomaly=True).fit(task, rows())
    assert all(bool(flow.isfinite(each).all()) for each in task.parameters())
    assert all(each.requires_grad and each.grad is None for each in task.parameters())


class Overflows(Two):
    """The update of the first optimizer is what breaks the weights; the second would see them."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        both = self.first(batch).mean(), self.second(self.first(batch) + batch).mean()
        return both[optimizer_name == "second"]

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made["first"].param_groups[0]["lr"] = 3e38
        return made


def test_an_update_that_breaks_the_weights_is_told_of_its_own_optimizer(mode: str) -> None:
    task = Overflows()
    told = r"in the step of optimizer 'first': .* and then .*first.*it comes from the update"
    with pytest.raises(NonFiniteError, match=told):
        trainer = quiet_trainer(mode=mode, max_epochs=1, detect_anomaly=True)
        trainer.fit(task, [flow.ones(2, 2) * 100])
    assert all(bool(flow.isfinite(each).all()) for each in task.parameters())


def test_looking_for_anomalies_changes_no_bit(mode: str) -> None:
    made = []
    for detects in (False, True):
        task = Duel()
        fill_deterministically(task, 1, 0.5)
        np.random.seed(0)
        flow.manual_seed(0)
        trainer = quiet_trainer(mode=mode, max_epochs=2, seed=4, detect_anomaly=detects)
        trainer.fit(task, shuffled()(3))
        made.append(bits(task))
    assert made[0] == made[1]
