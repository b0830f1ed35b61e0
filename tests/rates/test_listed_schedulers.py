"""``return [optimizer], [scheduler]``: a port from Lightning means an epoch a step."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from oneflow_steps import engine_steps
from test_flowvision_schedulers import Task, returning

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
