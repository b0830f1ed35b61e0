"""Fine-tune on real images, with a learning rate for each part of the network.

The images are scikit-learn's handwritten digits, 8 x 8 pixels, which need no download. A small
convolutional backbone learns to tell 0, 1, 2, 3 and 4 apart. Then it gets a new head and is
fine-tuned on 5, 6, 7, 8 and 9: the early layers keep most of what they know, the late layers
move more, the head learns from scratch. The fine-tuning runs in both modes, to see how far
their weights are apart.

    python examples/digits_finetune.py                 # graph mode
    python examples/digits_finetune.py --mode eager --epochs 5
    python examples/digits_finetune.py --plot curves.png
    python examples/digits_finetune.py --devices 2     # eager mode, in two processes
    python examples/digits_finetune.py --mode eager --accumulate 2     # to the same weights
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import (
    Callback,
    OFEngineError,
    TaskModule,
    Trainer,
    rank_zero_only,
    seed_everything,
)
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback, ProgressBar

BATCH_SIZE = 32
CLASSES = 5
say = rank_zero_only(print)
RATE = 0.05


# ---------------------------------------------------------------------- the tasks


def block(channels_in: int, channels_out: int) -> nn.Module:
    """Convolution, batch norm, activation. No bias before a batch norm, which cancels it."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Backbone(nn.Module):
    """Images (n, 1, 8, 8) to features (n, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.early = block(1, 16)
        self.late = nn.Sequential(
            block(16, 32), nn.MaxPool2d(2), block(32, 64), nn.MaxPool2d(2), nn.Flatten()
        )

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.late(self.early(images))


class Pretrain(TaskModule):
    """Backbone and head from scratch, all at one rate."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(256, CLASSES))
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        loss = self.loss_fn(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        correct = self(images).argmax(dim=1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Dict[str, Any]:
        optimizer = flow.optim.SGD(self.param_groups(), lr=RATE, momentum=0.9)
        steps = self.trainer.total_steps
        schedule = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=RATE / 50)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class FineTune(Pretrain):
    """A trained backbone with a new head: three groups, three rates, one schedule.

    ``lr_scale`` says how much of the head's rate a group gets; ``lr_decay_scale`` takes a further
    share of it at every decay event of ``LRDecayCallback``.
    """

    def param_groups(self) -> List[Dict[str, Any]]:
        early, late = self.backbone.early, self.backbone.late
        return [
            {"name": "early", "params": early.parameters(), "lr_scale": 0.1, "lr_decay_scale": 0.9},
            {"name": "late", "params": late.parameters(), "lr_scale": 0.3, "lr_decay_scale": 0.97},
            {"name": "head", "params": self.head.parameters()},
        ]


class Curves(Callback):
    """Keeps every step's rates and every epoch's accuracy."""

    def __init__(self) -> None:
        self.names: List[str] = []
        self.rates: List[List[float]] = []
        self.accuracies: List[float] = []

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        self.names = trainer.rates.names

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        # The plan knows the rate in both modes; optimizer.param_groups knows it in eager only.
        self.rates.append(trainer.rates.rates(trainer.global_step))

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        self.accuracies.append(trainer.callback_metrics["accuracy"])


# ---------------------------------------------------------------------- the data


def digits(first: int, count: int = CLASSES) -> Tuple[DataLoader, DataLoader]:
    """The digits from ``first`` on, labelled from 0: batches to train on, batches held out.

    Half of each digit's images is held out, always the same half.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    chosen = (data.target >= first) & (data.target < first + count)
    images = (data.images[chosen, None] / 16).astype(np.float32)  # (n, 1, 8, 8), from 0 to 1
    labels = data.target[chosen] - first
    parts = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=0)
    train_images, held_images, train_labels, held_labels = map(flow.tensor, parts)
    train = DataLoader(TensorDataset(train_images, train_labels), BATCH_SIZE, shuffle=True)
    held_out = DataLoader(TensorDataset(held_images, held_labels), len(held_labels))
    return train, held_out


# ---------------------------------------------------------------------- the run


def pretrain(arguments: argparse.Namespace) -> Dict[str, flow.Tensor]:
    """Train a backbone on 0 to 4; return its weights."""
    say(f"Backbone on digits 0-4, {arguments.mode} mode", flush=True)
    train, held_out = digits(0)
    seed_everything(arguments.seed)
    task = Pretrain()
    trainer = make_trainer(arguments, arguments.mode, [])
    trainer.fit(task, train, held_out)
    accuracy = trainer.callback_metrics["accuracy"]
    say(f"  accuracy on {len(held_out.dataset)} held-out images of 0-4: {accuracy:.2%}\n")
    return task.backbone.state_dict()


def finetune(
    arguments: argparse.Namespace, mode: str, weights: Dict[str, flow.Tensor]
) -> Tuple[FineTune, Curves]:
    """Fine-tune a backbone of these weights on 5 to 9; return the task and its curves."""
    say(f"Fine-tuning on digits 5-9, {mode} mode", flush=True)
    train, held_out = digits(5)
    seed_everything(arguments.seed)
    task = FineTune()
    task.backbone.load_state_dict(weights)
    curves = Curves()
    # The two rate callbacks are a pair: each acts in its own mode. Every ten steps.
    decay = LRDecayCallback(every_n_batches=10 * arguments.accumulate)
    callbacks = [decay, GraphLRScaleCallback(), curves]
    trainer = make_trainer(arguments, mode, callbacks)
    trainer.fit(task, train, held_out)
    before, after = curves.accuracies[0], curves.accuracies[-1]
    say(
        f"  accuracy on {len(held_out.dataset)} held-out images of 5-9: "
        f"{before:.2%} before, {after:.2%} after"
    )
    return task, curves


def make_trainer(arguments: argparse.Namespace, mode: str, callbacks: List[Callback]) -> Trainer:
    """A Trainer that leaves nothing behind on the disk."""
    return Trainer(
        mode=mode,
        device=arguments.device,
        devices=arguments.devices,
        accumulate_grad_batches=arguments.accumulate,
        max_epochs=arguments.epochs,
        seed=arguments.seed,
        num_sanity_val_steps=-1,  # all of it: the accuracy before training
        callbacks=[*callbacks, ProgressBar(leave=False)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def print_rates(task: FineTune, curves: Curves) -> None:
    """A line for each group: its name, its size, its first and last rate."""
    say(f"  {'group':8}{'weights':>8}{'first rate':>14}{'last rate':>14}")
    for name, group, first, last in zip(
        curves.names, task.param_groups(), curves.rates[0], curves.rates[-1]
    ):
        weights = sum(parameter.numel() for parameter in group["params"])
        say(f"  {name:8}{weights:8,}{first:14.2e}{last:14.2e}")
    say()


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest absolute difference between two modules' weights and running statistics."""
    others = other.state_dict()
    return max(
        float(np.abs(tensor.numpy() - others[name].numpy()).max())
        for name, tensor in one.state_dict().items()
    )


def digest(module: nn.Module) -> str:
    """What tells these weights and running statistics from all others."""
    state = module.state_dict()
    kept = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        kept.update(np.ascontiguousarray(state[name].numpy()).tobytes())
    return kept.hexdigest()


def plot(path: str, curves: Dict[str, Curves]) -> None:
    """Write the rates by step and the accuracies by epoch to ``path``, a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    mode, first = next(iter(curves.items()))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    steps = range(len(first.rates))
    for index, name in enumerate(first.names):
        left.step(steps, [rates[index] for rates in first.rates], where="post", label=name)
    left.set(yscale="log", xlabel="optimizer step", ylabel="learning rate")
    left.set_title("Rate of each parameter group")
    left.legend(title="group")
    left.grid(alpha=0.3)

    styles: List[Dict[str, Any]] = [
        {"linestyle": "-", "linewidth": 2},
        {"linestyle": "none", "marker": "o", "markersize": 8, "markerfacecolor": "none"},
    ]
    for (mode, each), style in zip(curves.items(), styles):
        right.plot(range(len(each.accuracies)), each.accuracies, label=f"{mode} mode", **style)
    right.set(ylim=(0, 1.02), xlabel="epoch (0: before fine-tuning)", ylabel="accuracy")
    right.set_title(f"Held-out images of 5-9: {first.accuracies[-1]:.2%} after fine-tuning")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(loc="lower right")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--mode", choices=["eager", "graph"], help="graph, or eager with several processes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--devices", type=positive, default=1, help="processes")
    parser.add_argument("--accumulate", type=positive, default=1, help="batches in a step")
    parser.add_argument("--epochs", type=positive, default=20, help="epochs of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE.png", help="write rate and accuracy curves")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return number


def main(argv: Optional[List[str]] = None) -> int:
    """Pretrain, fine-tune in both modes, compare; return the exit code."""
    arguments = parse(argv)
    if arguments.mode is None:
        arguments.mode = "eager" if arguments.devices > 1 else "graph"
    wanted = {"sklearn": "scikit-learn", **({"matplotlib": "matplotlib"} if arguments.plot else {})}
    for module, package in wanted.items():
        if importlib.util.find_spec(module) is None:
            print(f"This example needs {package}: pip install {package}", file=sys.stderr)
            return 1
    other = "eager" if arguments.mode == "graph" else "graph"
    try:
        weights = pretrain(arguments)
        task, curves = finetune(arguments, arguments.mode, weights)
        print_rates(task, curves)
        say(f"  the weights' digest: {digest(task)}")
        if arguments.devices > 1:
            return 0
        twin, twin_curves = finetune(arguments, other, weights)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    apart = distance(task, twin)
    verdict = "bit for bit the same" if apart == 0 else "not the same to the last bit"
    print(f"  largest difference between the two modes' weights: {apart:.1e}, {verdict}")
    if arguments.plot:
        plot(arguments.plot, {arguments.mode: curves, other: twin_curves})
        print(f"\nThe curves are in {arguments.plot}")
    return 0 if math.isfinite(apart) else 1


if __name__ == "__main__":
    sys.exit(main())
