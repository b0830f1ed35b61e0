"""A GAN: two optimizers, each with its own rates, schedule and clipping, one run.

A generator learns to draw points from eight Gaussians on a circle, a discriminator to tell its
points from theirs. Each has an optimizer of its own, by name; `training_step` is called for each
and told which. The generator steps after every second step of the discriminator, and its layers
have rates of their own. Eager mode and graph mode come to the same weights, bit for bit.

    python examples/gan.py                      # graph mode
    python examples/gan.py --mode eager
    python examples/gan.py --plot gan.png       # what was generated, as a picture
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from typing import Any, Dict, List, Optional

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim.lr_scheduler import CosineAnnealingLR
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.rates import layer_decay

GAUSSIANS, SPREAD = 8, 0.1
BATCH_SIZE, NOISE = 128, 8


def net(inputs: int, outputs: int) -> nn.Module:
    """A perceptron of two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, outputs),
    )  # fmt: skip


class Gan(TaskModule):
    """A generator of points and a discriminator, with the loss of the first GAN."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.generator, self.discriminator = net(NOISE, 2), net(2, 1)
        self.steps = steps

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> flow.Tensor:
        real = batch[0]
        made = self.generator(flow.randn(real.shape[0], NOISE, device=real.device))
        if optimizer_name == "discriminator":
            # softplus(-x) is the cross-entropy of "real", softplus(x) that of "made".
            loss = nn.functional.softplus(-self.discriminator(real)).mean()
            loss = loss + nn.functional.softplus(self.discriminator(made)).mean()
        else:
            loss = nn.functional.softplus(-self.discriminator(made)).mean()
        self.log(f"{optimizer_name}_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Dict[str, Any]:
        groups = layer_decay(self.generator, 0.8, stages=["0", "2", "4"])  # first slowest
        generator = flow.optim.Adam(groups, lr=2e-3, betas=(0.5, 0.999))
        discriminator = flow.optim.Adam(
            self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9), weight_decay=1e-4
        )
        return {
            "discriminator": discriminator,
            "generator": {
                "optimizer": generator,
                "lr_scheduler": CosineAnnealingLR(generator, self.steps),
                "every_n_batches": 2,
                "gradient_clip_val": 1.0,
            },
        }


def centres() -> np.ndarray:
    """Where the Gaussians are, of shape (8, 2)."""
    angles = 2 * math.pi * np.arange(GAUSSIANS) / GAUSSIANS
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def points(count: int, seed: int) -> np.ndarray:
    """So many points of the Gaussians, of shape (count, 2)."""
    generator = np.random.default_rng(seed)
    chosen = centres()[generator.integers(GAUSSIANS, size=count)]
    return (chosen + SPREAD * generator.standard_normal((count, 2))).astype("float32")


def picture(made: np.ndarray, columns: int = 61, rows: int = 27) -> str:
    """The points as text, the denser the darker; an x is the middle of a Gaussian."""
    edges = [np.linspace(-1.6, 1.6, rows + 1), np.linspace(-1.6, 1.6, columns + 1)]
    counts, _, _ = np.histogram2d(-made[:, 1], made[:, 0], bins=edges)
    shades = " .:+*#"
    most = max(float(np.percentile(counts[counts > 0], 95)), 1.0) if counts.any() else 1.0
    cells = [
        [shades[min(math.ceil(n / most * (len(shades) - 1)), len(shades) - 1)] for n in row]
        for row in counts
    ]
    for x, y in centres():
        cells[int((1.6 - y) / 3.2 * rows)][int((x + 1.6) / 3.2 * columns)] = "x"
    return "\n".join("".join(row).rstrip() for row in cells)


def hits(made: np.ndarray) -> List[float]:
    """The share of the points that are within three spreads of each Gaussian."""
    distance = np.linalg.norm(made[:, None] - centres()[None], axis=2)
    near = distance.min(axis=1) < 3 * SPREAD
    return [float((near & (distance.argmin(axis=1) == i)).mean()) for i in range(GAUSSIANS)]


def plot(path: str, made: np.ndarray) -> None:
    """Draw the generated points over real ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.scatter(*points(len(made), 1).T, s=4, color="0.8", label="real")
    axes.scatter(*made.T, s=4, label="generated")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def train(arguments: argparse.Namespace) -> Gan:
    """Fit a GAN."""
    seed_everything(arguments.seed)
    data = DataLoader(
        TensorDataset(flow.tensor(points(arguments.batches * BATCH_SIZE, 0))),
        batch_size=BATCH_SIZE, shuffle=True,
    )  # fmt: skip
    gan = Gan(steps=arguments.epochs * math.ceil(arguments.batches / 2))
    trainer = Trainer(
        mode=arguments.mode,
        device=arguments.device,
        max_epochs=arguments.epochs,
        seed=arguments.seed,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(gan, data)
    return gan


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batches", type=int, default=50, help="batches in an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="the picture; needs matplotlib")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Train and draw; return the exit code."""
    arguments = parse(argv)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    try:
        gan = train(arguments)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    with flow.no_grad():
        noise = np.random.default_rng(2).standard_normal((4000, NOISE)).astype("float32")
        made = gan.generator(flow.tensor(noise, device=gan.device)).numpy()
    print(picture(made))
    shares = hits(made)
    print(f"{sum(shares):.0%} of the points are near one of the {GAUSSIANS} Gaussians (x), "
          f"{min(shares):.0%} to {max(shares):.0%} near each.")  # fmt: skip
    if arguments.plot:
        plot(arguments.plot, made)
        print(f"written: {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
