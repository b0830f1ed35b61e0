"""Gradual unfreezing: a new head trains first, and the layers below it join epoch by epoch.

The recipe is ULMFiT's. A small convolutional network learns to tell the handwritten digits 0
to 4 apart (scikit-learn's, 8 x 8 pixels, no download). It gets a new head for 5 to 9, and
while that is random, the layers below it stay frozen, so that its first gradients do not
spoil what they know. They join from the top down, each at a lower rate than the one above
(layer decay); a preview of these rates is printed before.
In graph mode each joining compiles the graph anew, with the optimizer's state carried over.

    python examples/gradual_unfreezing.py                 # graph mode
    python examples/gradual_unfreezing.py --mode eager --every-n-epochs 1
    python examples/gradual_unfreezing.py --plot unfreezing.png
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any, Dict, List, Optional, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.callbacks import GradualUnfreezing
from ofengine.rates import layer_decay

BATCH_SIZE = 32
RATE = 0.05
CLASSES = 5


def block(channels_in: int, channels_out: int) -> nn.Module:
    """Convolution, batch norm, activation; halves the image's sides."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class Net(nn.Module):
    """Images (n, 1, 8, 8) to the scores of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(1, 16)
        self.middle = block(16, 32)
        self.top = block(32, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.head(self.top(self.middle(self.stem(images))).flatten(1))


class Digits(TaskModule):
    """One rate for the whole network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        return self.loss_fn(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        correct = self.net(images).argmax(dim=1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=RATE, momentum=0.9)


class FineTune(Digits):
    """A group for each layer; each has half the rate of the one above it."""

    def param_groups(self) -> List[Dict[str, Any]]:
        return layer_decay(self.net, decay=0.5, stages=["stem", "middle", "top", "head"])


class Curves(Callback):
    """Keeps each step's rates, 0 for a group that is frozen, and each epoch's accuracy."""

    def __init__(self) -> None:
        self.rates: Dict[str, List[float]] = {}
        self.accuracies: List[float] = []

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        self.rates = {name: [] for name in trainer.rates.names}

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        rates = trainer.rates.rates(trainer.global_step)
        for curve, rate, group in zip(self.rates.values(), rates, trainer.optimizer.param_groups):
            trains = any(parameter.requires_grad for parameter in group.parameters)
            curve.append(rate if trains else 0.0)

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        self.accuracies.append(trainer.callback_metrics["accuracy"])


def digits(first: int) -> Tuple[DataLoader, DataLoader]:
    """Training and held-out batches of the five digits from ``first`` on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (data.target >= first) & (data.target < first + CLASSES)
    images = flow.tensor((data.images[chosen][:, None] / 16).astype("float32"))
    labels = flow.tensor((data.target[chosen] - first).astype("int64"))
    cut = len(images) * 3 // 4
    return (
        DataLoader(TensorDataset(images[:cut], labels[:cut]), batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(TensorDataset(images[cut:], labels[cut:]), batch_size=BATCH_SIZE),
    )


def run(arguments: argparse.Namespace) -> Curves:
    """Pretrain, replace the head, fine-tune."""
    common: Dict[str, Any] = {
        "mode": arguments.mode,
        "device": arguments.device,
        "seed": arguments.seed,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    seed_everything(arguments.seed)
    net = Net()
    print("Pretraining on 0 to 4")
    Trainer(max_epochs=3, **common).fit(Digits(net), *digits(0))

    net.head = nn.Linear(64, CLASSES)
    curves = Curves()
    # From the last group, the head, to the first. {0: ["head"], 2: ["layer_2"], ...} would
    # say the same by name.
    unfreezing = GradualUnfreezing(every_n_epochs=arguments.every_n_epochs)
    print("Fine-tuning on 5 to 9")
    trainer = Trainer(
        max_epochs=4 * arguments.every_n_epochs, callbacks=[unfreezing, curves], **common
    )
    task, (train, held_out) = FineTune(net), digits(5)
    print(trainer.preview(task, train), end="\n\n")  # what each layer will train at, once it does
    trainer.fit(task, train, held_out)
    return curves


def plot(path: str, curves: Curves) -> None:
    """Draw accuracy by epoch over the rates by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    epochs = len(curves.accuracies)
    above.plot(range(1, epochs + 1), curves.accuracies, marker="o", color="black")
    above.set_ylabel("held-out accuracy")
    for name, rates in curves.rates.items():
        epoch = [epochs * step / len(rates) for step in range(len(rates))]
        below.plot(epoch, rates, drawstyle="steps-post", label=name)
    below.set_xlabel("epoch")
    below.set_ylabel("learning rate (0: frozen)")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--every-n-epochs", type=int, default=2, help="epochs until the next layer joins"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", metavar="FILE", default="gradual_unfreezing.png", help="the picture"
    )
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Train and draw; return the exit code."""
    arguments = parse(argv)
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            print(f"This example needs {package}: pip install {package}", file=sys.stderr)
            return 1
    try:
        curves = run(arguments)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    print("\nepoch  accuracy  training")
    per_epoch = len(curves.rates["head"]) // len(curves.accuracies)
    for epoch, accuracy in enumerate(curves.accuracies):
        training = [name for name, rates in curves.rates.items() if rates[epoch * per_epoch]]
        print(f"{epoch:5}  {accuracy:8.1%}  {', '.join(training)}")
    plot(arguments.plot, curves)
    print(f"\nAccuracy and rates are in {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
