"""Five small programs, each a task and the loop that one would write by hand for it.

What is computed stands once, in the task's methods; the loop by hand calls them with OneFlow alone.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
from helpers import fill_deterministically
from oneflow import nn

from ofengine import TaskModule

Batches = List[Any]


class Program(TaskModule):
    """What the programs have in common."""

    def batches(self) -> Batches:
        """The training data, the same each time."""
        raise NotImplementedError

    def by_hand(self) -> List[float]:
        """Train with OneFlow's own eager loop; the losses."""
        made = self.configure_optimizers()
        optimizer, factor = made["optimizer"], made["lr_scheduler"]
        rates = [group["lr"] for group in optimizer.param_groups]
        losses = []
        for number, batch in enumerate(self.batches()):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor(number)
            loss = self.training_step(batch, number)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.numpy()))
            self.after(batch)
        return losses

    def after(self, batch: Any) -> None:
        """What follows a step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after(batch)


def randoms(seed: int, *shape: int) -> Any:
    return flow.tensor(np.random.RandomState(seed).randn(*shape).astype("f4"))


def integers(seed: int, most: int, *shape: int) -> Any:
    return flow.tensor(np.random.RandomState(seed).randint(0, most, shape).astype("i8"))


class Classifier(Program):
    """Convolutions and batch norms over images; momentum, a slower backbone, step decay."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        )  # fmt: skip
        self.head = nn.Linear(12, 5)
        fill_deterministically(self, spread=0.4)

    def batches(self) -> Batches:
        return [(randoms(seed, 6, 3, 8, 8), integers(seed, 5, 6)) for seed in range(6)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        features = self.backbone(images).mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.head(features), labels)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.backbone.parameters(), "lr": 0.01},
            {"params": self.head.parameters(), "lr": 0.1},
        ]
        optimizer = flow.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 0.5 ** (step // 2)}


class WideAndDeep(Program):
    """Click prediction: a linear part over crossed features, a deep one over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Embedding(40, 1)
        self.deep = nn.Embedding(20, 4)
        self.tower = nn.Sequential(
            nn.Linear(3 * 4 + 5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)
        )
        fill_deterministically(self, spread=0.3)

    def batches(self) -> Batches:
        return [
            {
                "dense": randoms(seed, 8, 5),
                "crossed": integers(seed + 50, 40, 8, 4),
                "sparse": integers(seed + 60, 20, 8, 3),
                "clicked": integers(seed + 70, 2, 8, 1).to(flow.float32),
            }
            for seed in range(6)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        wide = self.wide(batch["crossed"]).sum(dim=1)
        deep = self.deep(batch["sparse"]).flatten(1)
        score = wide + self.tower(flow.cat([deep, batch["dense"]], dim=1))
        return nn.functional.binary_cross_entropy_with_logits(score, batch["clicked"])

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.wide.parameters(), "lr": 0.05},
            {"params": [*self.deep.parameters(), *self.tower.parameters()], "lr": 0.01},
        ]
        return {"optimizer": flow.optim.Adagrad(groups), "lr_scheduler": lambda step: 1.0}


class Seq2Seq(Program):
    """A recurrent encoder and a decoder with attention over it, by teacher forcing."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(15, 6), nn.Embedding(12, 6)
        self.encoder = nn.GRU(6, 8, batch_first=True)
        self.cell = nn.GRUCell(6 + 8, 8)
        self.out = nn.Linear(16, 12)
        fill_deterministically(self, spread=0.3)

    def batches(self) -> Batches:
        return [(integers(seed, 15, 4, 5), integers(seed + 30, 12, 4, 4)) for seed in range(5)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        source, target = batch
        memory, state = self.encoder(self.source(source))
        state, words, loss = state[0], self.target(target), 0.0
        for place in range(3):
            weights = flow.softmax(flow.bmm(memory, state.unsqueeze(2)).squeeze(2), dim=1)
            context = flow.bmm(weights.unsqueeze(1), memory).squeeze(1)
            state = self.cell(flow.cat([words[:, place], context], dim=1), state)
            scores = self.out(flow.cat([state, context], dim=1))
            loss = loss + nn.functional.cross_entropy(scores, target[:, place + 1])
        return loss / 3

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 1 / (1 + step)}


class DCGAN(Program):
    """A generator; its discriminator is beside the task and steps in a hook by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        discriminator = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, bias=False)
        )
        for net in (self.generator, discriminator):
            fill_deterministically(net, spread=0.3)
        self.beside = (discriminator, flow.optim.SGD(discriminator.parameters(), lr=0.05))

    def batches(self) -> Batches:
        return [(randoms(seed, 4, 4, 1, 1), randoms(seed + 90, 4, 1, 8, 8)) for seed in range(5)]

    def judged(self, images: Any, real: float) -> Any:
        scores = self.beside[0](images).flatten()
        wanted = flow.ones_like(scores) * real
        return nn.functional.binary_cross_entropy_with_logits(scores, wanted)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.judged(self.generator(batch[0]), 1.0)

    def after(self, batch: Any) -> None:
        noise, images = batch
        _, optimizer = self.beside
        with flow.no_grad():
            made = self.generator(noise)
        optimizer.zero_grad(set_to_none=True)
        (self.judged(images, 1.0) + self.judged(made, 0.0)).backward()
        optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.5)
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 1.0}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        parts = self.mix(self.before(x)).reshape(batch, length, 3, 2, width // 2)
        query, key, value = (parts[:, :, part].permute(0, 2, 1, 3) for part in range(3))
        scores = flow.matmul(query, key.permute(0, 1, 3, 2)) / math.sqrt(width // 2)
        hidden = flow.triu(flow.ones(length, length), diagonal=1) > 0
        scores = scores.masked_fill(hidden, -1e9)
        mixed = flow.matmul(flow.softmax(scores, dim=-1), value)
        x = x + self.project(mixed.permute(0, 2, 1, 3).reshape(batch, length, width))
        return x + self.mlp(self.after(x))


class GPT2(Program):
    """A decoder of two blocks; the head is the tied embedding. AdamW, warm-up and cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm = nn.LayerNorm(8)
        fill_deterministically(self, spread=0.2)

    def batches(self) -> Batches:
        return [integers(seed, 20, 3, 7) for seed in range(6)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.words(batch[:, :-1]) + self.places(flow.arange(6))
        scores = flow.matmul(self.norm(self.blocks(x)), self.words.weight.t())
        return nn.functional.cross_entropy(scores.reshape(-1, 20), batch[:, 1:].reshape(-1))

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups: List[Dict[str, Any]] = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        factor: Callable[[int], float] = lambda step: (  # noqa: E731
            (step + 1) / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 6)
        )
        return {"optimizer": flow.optim.AdamW(groups, lr=1e-2), "lr_scheduler": factor}
