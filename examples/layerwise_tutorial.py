"""OneFlow's cookbook on layerwise learning rates, with ofengine: MobileNetV2 on CIFAR-10.

The cookbook has two recipes. Its eager loop gives each part of the network its own ``lr`` and
multiplies that by the part's factor after every tenth batch; its graph gives every part one
``lr`` times a constant ``lr_scale``. By hand each works in one mode only. Here both work in both:

    python examples/layerwise_tutorial.py --download
    python examples/layerwise_tutorial.py --mode graph
    python examples/layerwise_tutorial.py --groups scale --mode eager
    python examples/layerwise_tutorial.py --mode graph --own-graph --limit-train-batches 100

An epoch has 782 batches and takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List, Optional

import oneflow as flow
from flowvision import datasets, transforms
from flowvision.models import mobilenet_v2
from oneflow import nn
from oneflow.optim import Optimizer
from oneflow.utils.data import DataLoader

from ofengine import OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

# ---------------------------------------------------------------------- the task


class Tutorial(TaskModule):
    """MobileNetV2 with ten classes, in three parameter groups.

    The cookbook attaches its ten-class head to ``model.classifer``: a misspelling, so that the
    head for 1000 classes stays in use. ofengine would refuse to train that, because the new
    head's parameters are in no group. Here the model is made with ten classes at once.
    """

    def __init__(self, groups: str = "decay") -> None:
        super().__init__()
        self.model = mobilenet_v2(num_classes=10)
        self.loss_fn = nn.CrossEntropyLoss()
        self.groups = groups

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        return self.loss_fn(self.model(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        correct = self.model(images).argmax(dim=1) == labels
        self.log("val_accuracy", correct.float().mean(), prog_bar=True)

    def param_groups(self) -> List[Dict[str, Any]]:
        return GROUPS[self.groups](self.model)

    def configure_optimizers(self) -> Optimizer:
        return flow.optim.SGD(self.param_groups())


def decay_groups(model: nn.Module) -> List[Dict[str, Any]]:
    """The cookbook's eager loop: a rate for each part, and its factor after every tenth batch.

    ofengine warns that the second group is empty: a pooling layer has no parameters.
    """
    parts = [model.features, model.adaptive_avg_pool2d, model.classifier]
    return [
        {"name": name, "params": part.parameters(), "lr": lr, "lr_decay_scale": factor}
        for name, part, lr, factor in zip(PARTS, parts, (1e-3, 1e-4, 1e-5), (0.9, 0.8, 0.7))
    ]


def scale_groups(model: nn.Module) -> List[Dict[str, Any]]:
    """The cookbook's graph: one rate for all parts, times a constant for each."""
    parts = [model.features, model.adaptive_avg_pool2d, model.classifier]
    return [
        {"name": name, "params": part.parameters(), "lr": 1e-3, "lr_scale": scale}
        for name, part, scale in zip(PARTS, parts, (0.9, 0.8, 0.7))
    ]


def finetune_groups(model: nn.Module) -> List[Dict[str, Any]]:
    """What one would write to fine-tune: the nearer to the input, the slower and the calmer."""
    return [
        {
            "name": "stem",
            "params": model.features[:4].parameters(),
            "lr": 1e-2,
            "lr_scale": 0.1,
            "lr_decay_scale": 0.98,
        },
        {
            "name": "blocks",
            "params": model.features[4:].parameters(),
            "lr": 1e-2,
            "lr_scale": 0.3,
            "lr_decay_scale": 0.99,
        },
        {"name": "classifier", "params": model.classifier.parameters(), "lr": 1e-2},
    ]


PARTS = ("features", "adaptive_avg_pool2d", "classifier")
GROUPS: Dict[str, Callable[[nn.Module], List[Dict[str, Any]]]] = {
    "decay": decay_groups,
    "scale": scale_groups,
    "finetune": finetune_groups,
}


# ---------------------------------------------------------------------- a graph of one's own


class GraphMobileNetV2(nn.Graph):
    """The cookbook's graph. ofengine compiles the rates into it."""

    def __init__(self, model: nn.Module, loss_fn: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.add_optimizer(optimizer)

    def build(self, x: flow.Tensor, y: flow.Tensor) -> flow.Tensor:
        y_pred = self.model(x)
        loss = self.loss_fn(y_pred, y)
        loss.backward()
        return loss


class OwnGraphTutorial(Tutorial):
    """The same task, trained by the cookbook's graph instead of the one ofengine makes."""

    def build_graph(self) -> nn.Graph:
        return GraphMobileNetV2(self.model, self.loss_fn, self.optimizer)


# ---------------------------------------------------------------------- the data


class NoData(Exception):
    """CIFAR-10 is not there; the message says what to do."""


def cifar10(
    root: str,
    train: bool,
    transform: Optional[Callable[[Any], Any]] = None,
    download: bool = False,
    checked: bool = True,
) -> Any:
    """CIFAR-10 from the folder ``root``/cifar-10-batches-py.

    Args:
        root: the data folder.
        train: the 50,000 training images, else the 10,000 test images.
        transform: what turns a PIL image into a tensor.
        download: fetch what is not there (170 MB).
        checked: compare every file's md5 sum. False takes any files of that format.

    Raises:
        NoData: the files are not there, are not complete, or cannot be fetched.
    """
    kind = datasets.CIFAR10 if checked else UncheckedCIFAR10
    folder = Path(root, kind.base_folder)
    try:
        return kind(root, train=train, transform=transform, download=download)
    except OSError as error:  # urllib's errors are OSErrors
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        if not download:
            raise NoData(f"The files of CIFAR-10 in {folder} cannot be read: {reason}.") from error
        raise NoData(
            f"CIFAR-10 could not be downloaded from {kind.url} ({reason}): get {kind.filename} "
            f"where there is a network and unpack it in {root}."
        ) from error
    except RuntimeError as error:  # how flowvision says that files are missing or damaged
        if download:
            raise NoData(f"What was downloaded into {root} is damaged: try again.") from error
        missing = "is damaged or not complete" if folder.exists() else "is not there"
        raise NoData(
            f"CIFAR-10 {missing} in {folder}: --download fetches it (170 MB), --data-dir names "
            "another folder."
        ) from error


class UncheckedCIFAR10(datasets.CIFAR10):
    """CIFAR-10 that looks for its files but not at their md5 sums."""

    train_list: ClassVar = [[name, None] for name, _ in datasets.CIFAR10.train_list]
    test_list: ClassVar = [[name, None] for name, _ in datasets.CIFAR10.test_list]
    meta: ClassVar = {**datasets.CIFAR10.meta, "md5": None}


# ---------------------------------------------------------------------- the run


def run(arguments: argparse.Namespace, train: Any, test: Any) -> Trainer:
    """Train on the dataset ``train``, validate on ``test``; print the rates; return the Trainer."""
    seed_everything(arguments.seed)  # the model's first weights
    task = (OwnGraphTutorial if arguments.own_graph else Tutorial)(arguments.groups)
    trainer = Trainer(
        mode=arguments.mode,
        device=arguments.device,
        max_epochs=arguments.epochs,
        limit_train_batches=arguments.limit_train_batches,
        limit_val_batches=arguments.limit_val_batches,
        seed=arguments.seed,
        callbacks=[LRDecayCallback(every_n_batches=10), GraphLRScaleCallback()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        task,
        DataLoader(train, batch_size=arguments.batch_size, shuffle=True),
        DataLoader(test, batch_size=arguments.batch_size),
    )
    plan, last = trainer.rates, trainer.global_step - 1
    print(f"{arguments.mode} mode, {trainer.global_step} steps")
    print(f"{'group':22}{'first rate':>12}{'last rate':>12}")
    for name in plan.names:
        print(f"{name:22}{plan.rate(name, 0):12.2e}{plan.rate(name, last):12.2e}")
    metrics = trainer.callback_metrics
    if "val_accuracy" in metrics:
        print(f"accuracy on test images: {metrics['val_accuracy']:.2%}")
    return trainer


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="eager")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--groups",
        choices=list(GROUPS),
        default="decay",
        help="the cookbook's eager recipe, its graph recipe, or one for fine-tuning",
    )
    parser.add_argument(
        "--own-graph", action="store_true", help="train with the cookbook's nn.Graph (graph mode)"
    )
    parser.add_argument("--data-dir", default="data", help="where cifar-10-batches-py is")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 (170 MB)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit-train-batches", type=int, metavar="N")
    parser.add_argument("--limit-val-batches", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.own_graph and arguments.mode != "graph":
        parser.error("--own-graph needs --mode graph")
    return arguments


def main(argv: Optional[List[str]] = None) -> int:
    """Read CIFAR-10 and train; return the exit code."""
    arguments = parse(argv)
    # flowvision's MobileNetV2 asks for an activation in place, which OneFlow does not have.
    warnings.filterwarnings("ignore", message="ReLU6 module")
    to_tensor = transforms.ToTensor()
    try:
        train = cifar10(arguments.data_dir, True, to_tensor, arguments.download)
        test = cifar10(arguments.data_dir, False, to_tensor)
        run(arguments, train, test)
    except (NoData, OFEngineError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
