"""Compiling a graph while older graphs wait to be collected."""

from __future__ import annotations

import gc
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
