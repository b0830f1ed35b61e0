"""One run on the command line alone: a task and its data, and no line about how it is trained.

The images are scikit-learn's handwritten digits, 8 x 8 pixels, which need no download.

    ofengine rates examples/command_line.py:Digits --max-epochs 8 --plot rates.png
    ofengine fit examples/command_line.py:Digits --mode graph --max_epochs 8
    ofengine test examples/command_line.py:Digits --ckpt_path last
    ofengine predict examples/command_line.py:Digits --ckpt_path last
"""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import TaskModule
from ofengine.metrics import Accuracy


class Digits(TaskModule):
    """Images (n, 1, 8, 8) to ten digits, with a lower rate for what is near the image.

    Args:
        channels: of the first convolution; the second has twice as many.
        rate: the learning rate of the head.
        stem_scale: the first convolution's share of it.
        batch_size: images of a batch.
    """

    def __init__(
        self,
        channels: int = 16,
        rate: float = 0.1,
        stem_scale: float = 0.3,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * channels, 10))
        self.accuracy = Accuracy()

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.head(self.body(self.stem(images)))

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy.update(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        return self(batch[0]).argmax(dim=1)

    def param_groups(self) -> List[Dict[str, Any]]:
        scale = self.hparams["stem_scale"]
        return [
            {"name": "stem", "params": self.stem.parameters(), "lr_scale": scale},
            {"name": "body", "params": self.body.parameters()},
            {"name": "head", "params": self.head.parameters()},
        ]

    def configure_optimizers(self) -> Dict[str, Any]:
        optimizer = flow.optim.SGD(self.param_groups(), lr=self.hparams["rate"], momentum=0.9)
        steps = self.trainer.total_steps
        schedule = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def loader(self, first: int, last: int, shuffle: bool = False) -> DataLoader:
        """The images of these numbers, from 0 to 1, and their labels."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = flow.tensor((data.images[first:last, None] / 16).astype(np.float32))
        labels = flow.tensor(data.target[first:last])
        return DataLoader(
            TensorDataset(images, labels), self.hparams["batch_size"], shuffle=shuffle
        )

    def train_dataloader(self) -> DataLoader:
        return self.loader(0, 1280, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(1280, 1536)

    def test_dataloader(self) -> DataLoader:
        return self.loader(1536, 1792)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()
