"""Of several optimizers, that one is named whose loss is not finite."""

from __future__ import annotations

from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import MODES, quiet_trainer
from oneflow import nn

from ofengine import ConfigurationError, NonFiniteError, OFEngineWarning, TaskModule
from ofengine.callbacks import ModelStatistics, TerminateOnNaN

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


def test_an_anomaly_is_told_without_a_replay() -> None:
    task = Two()
    told = rf"in {WHERE} the loss is nan, in the step of optimizer 'second'\. It is not replayed"
    with pytest.raises(NonFiniteError, match=told):
        quiet_trainer(max_epochs=1, detect_anomaly=True).fit(task, rows())
    assert all(bool(flow.isfinite(each).all()) for each in task.parameters())


def test_what_computes_a_step_on_the_side_is_refused() -> None:
    arguments: Dict[str, Any] = {"max_epochs": 1, "callbacks": ModelStatistics()}
    with pytest.raises(ConfigurationError, match=r"single optimizer.* there are 'first' and 'sec"):
        quiet_trainer(**arguments, log_every_n_steps=1).fit(Two(), ROWS)
