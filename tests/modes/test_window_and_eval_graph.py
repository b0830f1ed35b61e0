"""A validation that is compiled in the middle of an eager accumulation window."""

from __future__ import annotations

from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer
from oneflow import nn

from ofengine import TaskModule


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


@pytest.mark.parametrize("eval_mode", ["eager", "graph"])
def test_its_gradients_are_all_there(mode: str, eval_mode: str) -> None:
    numbers = np.random.RandomState(0)
    batches: List[Any] = [flow.tensor(numbers.randn(4, 3).astype("f4")) for _ in range(6)]
    hand = Net()
    optimizer = hand.configure_optimizers()
    for first in (0, 3):
        for batch in batches[first : first + 3]:
            (hand.training_step(batch, 0) / 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    task = Net()
    trainer = quiet_trainer(
        mode=mode, eval_mode=eval_mode, max_epochs=1, accumulate_grad_batches=3,
        val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, batches, batches[:1])
    assert_same_weights(task, hand)
