"""Compiling a graph: older graphs wait to be collected, and of makers of tensors nobody warns."""

from __future__ import annotations

import gc
import warnings
from typing import Any, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import GraphModeError, TaskModule


class Line(TaskModule):
    """Notes whether garbage is collected while its step is traced."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.collects: List[bool] = []
        self.fails = fails

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.collects.append(gc.isenabled())
        loss = self.layer(batch).mean()
        return loss.item() if self.fails else loss


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_no_old_graph_is_collected_in_the_middle_of_a_compilation(
    enabled: bool, fails: bool
) -> None:
    """OneFlow's graphs reset what they share when they are deleted, and break the new one."""
    task = Line(fails)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        trainer = quiet_trainer(mode="graph", max_epochs=1)
        if fails:
            with pytest.raises(GraphModeError):
                trainer.fit(task, [flow.ones(1, 2)])
        else:
            trainer.fit(task, [flow.ones(1, 2)])
        assert task.collects == [False]
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


class Makes(TaskModule):
    """Makes tensors, and a loss, where it steps, which for OneFlow are modules of no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def made(self, x: Any) -> Any:
        new = flow.zeros(1, 2) + flow.ones(1, 2) + flow.full((1, 2), 2.0)
        return x + new + flow.zeros_like(x) + flow.full_like(x, 3.0) + x.new_ones((1, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.layer(self.made(batch))
        return {"loss": nn.MSELoss()(scores, flow.ones(1, 1)), "weight": 3}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.layer(self.made(batch)).mean())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nobody_warns_of_tensors_that_a_traced_step_makes(accumulate: int) -> None:
    data = [flow.ones(1, 2)] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(mode="graph", max_epochs=1, accumulate_grad_batches=accumulate)
        trainer.fit(Makes(), data, data)
    assert [str(each.message) for each in caught if "nn.Graph" in str(each.message)] == []


def test_what_else_oneflow_warns_of_is_told_while_a_step_is_traced() -> None:
    class Warns(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            nn.modules.module.warnings.warn("of another thing")
            warnings.warn("of the user's", stacklevel=1)
            return super().training_step(batch, batch_idx)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(mode="graph", max_epochs=1).fit(Warns(), [flow.ones(1, 2)])
    told = {str(each.message): each.filename for each in caught}
    assert told["of another thing"] == told["of the user's"] == __file__
    assert nn.modules.module.warnings is warnings
