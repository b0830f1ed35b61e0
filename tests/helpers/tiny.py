"""A tiny deterministic run, whose checkpoint is among the files of older versions."""

from __future__ import annotations

from typing import Any, List, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine import TaskModule


class Tiny(TaskModule):
    """Two layers in two groups, with numbers that no random generator made."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(2, width)
        self.head = nn.Linear(width, 1)
        with flow.no_grad():
            for number, parameter in enumerate(self.parameters(), 1):
                values = np.arange(parameter.numel(), dtype="float32") / 8 - number / 4
                parameter.copy_(flow.tensor(values.reshape(tuple(parameter.shape))))
        self.seen: List[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        loss = ((self.head(self.body(inputs)) - targets) ** 2).mean()
        self.log("loss_of_batch", loss, on_step=True, on_epoch=True)
        return loss

    def param_groups(self) -> Any:
        return [
            {"name": "body", "params": self.body.parameters(), "lr": 0.125, "lr_scale": 0.5},
            {"name": "head", "params": self.head.parameters(), "lr": 0.125},
        ]

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), momentum=0.5)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.seen = checkpoint["seen"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen = [*self.seen, batch_idx]


def tiny_batches() -> List[Tuple[Any, Any]]:
    """Three batches of two rows."""
    rows = np.arange(12, dtype="float32").reshape(3, 2, 2) / 4 - 1
    return [(flow.tensor(each), flow.tensor(each.sum(1, keepdims=True))) for each in rows]
