"""A small GAN with everything that a part of a run may have: two optimizers, scales, a schedule."""

from __future__ import annotations

from typing import Any, Dict, List

import oneflow as flow
from oneflow import nn
from oneflow.optim.lr_scheduler import StepLR

from helpers.resuming import Net

softplus = nn.functional.softplus


class Duel(Net):
    """Learns rows of four numbers from rows of four; the discriminator steps twice as often.

    Batch norm, dropout, layerwise rates with decay, clipping in one, a schedule in the other.
    """

    every_n_batches = 2

    def __init__(self) -> None:
        super().__init__()
        del self.body, self.norm, self.head
        self.generator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), self.first, nn.Linear(8, 4)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), self.second, nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        loss = self.loss_of(batch[0], optimizer_name)
        self.log(f"{optimizer_name}_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "twice": loss * 2}

    def loss_of(self, real: Any, name: str) -> Any:
        made = self.generator(real.flip(0))
        if name == "generator":
            return softplus(-self.discriminator(made)).mean()
        return (
            softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(made)).mean()
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.discriminator(self.generator(batch[0])).mean())

    def generator_groups(self) -> List[Dict[str, Any]]:
        first, norm, _, _, last = self.generator
        return [
            {"name": "first", "params": [*first.parameters(), *norm.parameters()],
             "lr": 0.02, "lr_scale": 0.3, "lr_decay_scale": 0.9},
            {"name": "last", "params": last.parameters(), "lr": 0.02},
        ]  # fmt: skip

    def configure_optimizers(self) -> Any:
        critic = flow.optim.Adam(self.discriminator.parameters(), lr=0.03, betas=(0.5, 0.9))
        return {
            "discriminator": {"optimizer": critic, "lr_scheduler": StepLR(critic, 3, 0.5)},
            "generator": {
                "optimizer": flow.optim.Adam(self.generator_groups(), betas=(0.0, 0.99)),
                "every_n_batches": self.every_n_batches,
                "gradient_clip_val": 0.05,
            },
        }
