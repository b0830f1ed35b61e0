"""``return [optimizer], [scheduler]``: a port from Lightning means an epoch a step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn
from oneflow_steps import engine_steps
from test_flowvision_schedulers import Task, returning

from ofengine import (
    ConfigurationError,
    GraphModeError,
    OFEngineWarning,
    RateError,
    TaskModule,
)

Returned = Callable[[Any], Any]


def step_lr(optimizer: Any) -> Any:
    return flow.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


BY_EPOCH: Dict[str, Returned] = {
    "as a pair": lambda o: ([o], [step_lr(o)]),
    "a dict in the pair": lambda o: ([o], [{"scheduler": step_lr(o)}]),
}
BY_STEP: Dict[str, Returned] = {
    "an interval in the pair": lambda o: (
        [o],
        [{"scheduler": step_lr(o), "interval": "step"}],
    ),
    "a function in the pair": lambda o: ([o], [lambda step: 0.5**step]),
    "a dict": lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
    "no list": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o)}},
}
SAYS = "the scheduler moves on by epoch"


def moved(mode: str, returned: Returned) -> List[float]:
    """The rates of two epochs of two steps: the gradient is one."""
    steps = engine_steps(mode, returning(Task(({"lr": 1.0},)), returned), 2, max_epochs=2)
    return [row[0] for row in steps]


@pytest.mark.parametrize("form", BY_EPOCH)
def test_a_listed_scheduler_moves_on_by_epoch_and_says_so(
    mode: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ofengine")
    np.testing.assert_array_equal(moved(mode, BY_EPOCH[form]), [1.0, 1.0, 0.5, 0.5])
    assert [SAYS in each.message for each in caplog.records].count(True) == 1


@pytest.mark.parametrize("form", BY_STEP)
def test_all_others_move_on_by_step_and_say_nothing(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ofengine")
    np.testing.assert_array_equal(moved("eager", BY_STEP[form]), [1.0, 0.5, 0.25, 0.125])
    assert SAYS not in caplog.text


class Faded(TaskModule):
    """Six epochs of four steps, by a schedule that was made for epochs, or for steps."""

    def __init__(self, schedule: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.schedule = nn.Linear(1, 1), schedule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


SCHEDULERS = flow.optim.lr_scheduler
MADE_FOR_EPOCHS: Dict[str, Returned] = {
    "StepLR": lambda o: SCHEDULERS.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: SCHEDULERS.MultiStepLR(o, [1, 2, 3, 4], 0.1),
    "ExponentialLR": lambda o: SCHEDULERS.ExponentialLR(o, 0.5),
    "LambdaLR": lambda o: SCHEDULERS.LambdaLR(o, lambda epoch: 0.5**epoch),
    "a function": lambda o: lambda epoch: 0.5**epoch,
}
MADE_FOR_STEPS: Dict[str, Returned] = {
    "a slower one": lambda o: SCHEDULERS.ExponentialLR(o, 0.9),
    "to the end": lambda o: SCHEDULERS.CosineAnnealingLR(o, 24),
    "by step as asked": lambda o: {"scheduler": step_lr(o), "interval": "step"},
    "by epoch as asked": lambda o: {"scheduler": step_lr(o), "interval": "epoch"},
}


@pytest.mark.parametrize("form", MADE_FOR_EPOCHS)
def test_a_schedule_that_has_faded_by_half_of_the_run_is_told(form: str) -> None:
    data = [flow.ones(1, 1)] * 4
    with pytest.warns(OFEngineWarning, match="at step 12 of 24 no rate is above .*'epoch'"):
        quiet_trainer(max_epochs=6).fit(Faded(MADE_FOR_EPOCHS[form]), data)


@pytest.mark.parametrize("form", MADE_FOR_STEPS)
def test_all_other_schedules_are_not(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        quiet_trainer(max_epochs=6).fit(Faded(MADE_FOR_STEPS[form]), [flow.ones(1, 1)] * 4)


def test_a_scheduler_tells_the_rates_that_train(mode: str) -> None:
    told: List[float] = []

    class Tells(Faded):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            told.extend(self.lr_schedulers().get_last_lr())
            assert self.lr_schedulers().gamma == 0.5

    by_epoch = {"interval": "epoch"}
    task = Tells(lambda o: {"scheduler": SCHEDULERS.ExponentialLR(o, 0.5), **by_epoch})
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    trainer.fit(task, [flow.ones(1, 1)] * 2)
    assert told == [1.0, 1.0, 0.5, 0.5]
    with pytest.raises(ConfigurationError, match="leave it out"):
        task.lr_schedulers().step()


class Plateau(Faded):
    """Logs what is watched from the second epoch on."""

    def __init__(self, beside: Dict[str, Any], options: Dict[str, Any]) -> None:
        super().__init__(self.plateau)
        self.beside, self.options = beside, options

    def plateau(self, optimizer: Any) -> Any:
        scheduler = SCHEDULERS.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"scheduler": scheduler, **self.options} if self.options else scheduler

    def configure_optimizers(self) -> Any:
        return {**super().configure_optimizers(), **self.beside}

    def on_train_epoch_end(self) -> None:
        if self.current_epoch:
            self.log("watched", 1.0)


def test_a_metric_that_was_not_logged_is_told_or_waited_for(mode: str, tmp_path: Path) -> None:
    data, watched = [flow.ones(1, 1)], {"monitor": "watched"}
    with pytest.raises(RateError, match=r"there is 'loss'\. Where .* add 'frequency'"):
        quiet_trainer(mode=mode, max_epochs=4).fit(Plateau(watched, {}), data)
    task = Plateau({}, {**watched, "strict": False})
    first = quiet_trainer(mode=mode, max_epochs=1)
    with pytest.warns(OFEngineWarning, match="left the rates as they were"):
        first.fit(task, data)
    first.save_checkpoint(tmp_path / "c")
    trainer = quiet_trainer(mode=mode, max_epochs=4)
    trainer.fit(task, data, ckpt_path=tmp_path / "c")
    assert trainer.rates.rate("group_0", 4) == 0.25  # the first of three looks has no better one


def test_a_list_of_schedulers_is_refused() -> None:
    with pytest.raises(RateError, match="is a list of schedulers: write one"):
        quiet_trainer(max_epochs=1).fit(Faded(lambda o: [step_lr(o)]), [flow.ones(1, 1)])


def test_a_scheduler_is_not_asked_for_its_rate_within_a_compiled_step() -> None:
    class Asks(Faded):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean() * self.lr_schedulers().get_last_lr()[0]

    with pytest.raises(GraphModeError, match="lr_scheduler cannot be used inside"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Asks(step_lr), [flow.ones(1, 1)] * 2)
