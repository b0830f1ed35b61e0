"""Several validation sets at once: how well a network does where images are not as in training.

The images are scikit-learn's handwritten digits, 8 x 8 pixels, which need no download. A data
module prepares them once, splits them, and hands out three validation loaders: the held-out images
as they are, with noise, and shifted by a pixel. A list of loaders is all it takes: each metric is
counted for each of them, as `accuracy/dataloader_idx_0` and so on. The best checkpoint is that of
the noisy images, and the data module is asked again for `validate` and `predict`. Eager mode and
graph mode come to the same weights, bit for bit.

    python examples/several_validation_sets.py                # graph mode
    python examples/several_validation_sets.py --mode eager
    python examples/several_validation_sets.py --augment      # noise and shifts in training, too
    python examples/several_validation_sets.py --plot accuracies.png
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim.lr_scheduler import CosineAnnealingLR
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, DataModule, OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.callbacks import ModelCheckpoint
from ofengine.metrics import Accuracy, Mean

CLASSES = 10
BATCH_SIZE = 32
SETS = ["clean", "noisy", "shifted"]  # the validation loaders, in their order


# ---------------------------------------------------------------------- the data


def noisy(images: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """Images (n, 1, 8, 8) with noise of a standard deviation of 0.3, cut to 0 and 1."""
    return (images + 0.3 * draw.normal(size=images.shape)).clip(0, 1)


def shifted(images: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """Each image (1, 8, 8) moved by one pixel up or down and one to the left or right."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    corners = 2 * draw.randint(2, size=(len(images), 2))
    return np.stack([each[:, y : y + 8, x : x + 8] for each, (y, x) in zip(padded, corners)])


class Digits(DataModule):
    """Half of the digits to train on; the other half to validate, in three forms.

    Args:
        folder: where the prepared images are kept.
        augment: train on noisy and shifted images besides.
    """

    def __init__(self, folder: str, augment: bool = False) -> None:
        self.file = Path(folder) / "digits.npz"
        self.augment = augment

    def prepare_data(self) -> None:
        """Once a machine, however many ranks: here a download would be, and what takes long."""
        from sklearn.datasets import load_digits

        if not self.file.exists():
            data = load_digits()
            images = (data.images[:, None] / 16).astype(np.float32)  # (1797, 1, 8, 8), 0 to 1
            self.file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self.file, images=images, labels=data.target)

    def setup(self, stage: str) -> None:
        """On each rank, before each verb: read the images, and split them always the same way."""
        with np.load(self.file) as file:
            images, labels = file["images"], file["labels"]
        draw = np.random.RandomState(0)
        order = draw.permutation(len(images))
        train, held_out = order[::2], order[1::2]
        self.train = [(images[train], labels[train])]
        if self.augment:
            self.train += [(f(images[train], draw), labels[train]) for f in (noisy, shifted)]
        clean, labels = images[held_out], labels[held_out]
        draw = np.random.RandomState(1)
        forms = [clean, noisy(clean, draw), shifted(clean, draw)]
        self.held_out = [self.dataset([(form, labels)]) for form in forms]

    def teardown(self, stage: str) -> None:
        """After each verb, after an error too: let go of the images."""
        self.train, self.held_out = [], []

    @staticmethod
    def dataset(parts: Sequence[Tuple[np.ndarray, np.ndarray]]) -> TensorDataset:
        """Images and labels of all parts, as tensors."""
        images, labels = (np.concatenate(each) for each in zip(*parts))
        return TensorDataset(flow.tensor(images.astype(np.float32)), flow.tensor(labels))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(self.train), BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> List[DataLoader]:
        return [DataLoader(each, 128) for each in self.held_out]

    def predict_dataloader(self) -> List[DataLoader]:
        return self.val_dataloader()


# ---------------------------------------------------------------------- the task


class Classifier(TaskModule):
    """A small convolutional network, validated on each loader for itself."""

    def __init__(self, width: int = 16, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(8 * width, CLASSES),
        )  # fmt: skip
        self.loss_fn = nn.CrossEntropyLoss()
        self.accuracy = Accuracy()
        self.mean_loss = Mean()

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        return self.loss_fn(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # One object serves all loaders: its sums begin anew with each of them.
        images, labels = batch
        scores = self(images)
        self.accuracy.update(scores, labels)
        self.mean_loss.update(self.loss_fn(scores, labels), len(labels))
        self.log("accuracy", self.accuracy, prog_bar=True)
        self.log("val_loss", self.mean_loss)

    def predict_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> Dict[str, Any]:
        optimizer = flow.optim.SGD(self.param_groups(), lr=self.hparams["rate"], momentum=0.9)
        schedule = CosineAnnealingLR(optimizer, self.trainer.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Curves(Callback):
    """Keeps the accuracy on each validation set, epoch by epoch; the first is before training."""

    def __init__(self) -> None:
        self.accuracies: List[List[float]] = []

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        metrics = trainer.callback_metrics
        names = [f"accuracy/dataloader_idx_{number}" for number in range(len(SETS))]
        self.accuracies.append([metrics[name] for name in names])


# ---------------------------------------------------------------------- the run


def run(arguments: argparse.Namespace) -> Tuple[Classifier, List[List[float]]]:
    """Train, validate, predict; return the best weights' task and the accuracies by epoch."""
    seed_everything(arguments.seed)
    task = Classifier()
    data = Digits(arguments.logs, arguments.augment)
    curves = Curves()
    best = ModelCheckpoint(
        monitor=f"accuracy/dataloader_idx_{SETS.index('noisy')}", mode="max", filename="{epoch}"
    )
    trainer = Trainer(
        mode=arguments.mode,
        device=arguments.device,
        max_epochs=arguments.epochs,
        seed=arguments.seed,
        num_sanity_val_steps=-1,  # all of it: the accuracies before training
        callbacks=[best, curves],
        default_root_dir=arguments.logs,
    )
    trainer.fit(task, datamodule=data)
    accuracies = list(curves.accuracies)

    print(f"\nBest on {SETS[1]} images: {best.best_model_path}")
    each_metrics = trainer.validate(task, datamodule=data, ckpt_path="best")
    each_predicted = trainer.predict(task, datamodule=data)  # of these weights, too
    clean = np.concatenate([batch.numpy() for batch in each_predicted[0]])
    print(f"{'images':10}{'accuracy':>10}{'loss':>8}{'predicted as clean ones':>26}")
    for number, (name, metrics, batches) in enumerate(zip(SETS, each_metrics, each_predicted)):
        accuracy = metrics[f"accuracy/dataloader_idx_{number}"]
        loss = metrics[f"val_loss/dataloader_idx_{number}"]
        same = (np.concatenate([batch.numpy() for batch in batches]) == clean).mean()
        print(f"{name:10}{accuracy:>10.2%}{loss:>8.4f}{same:>26.2%}")
    return task, accuracies


def digest(module: nn.Module) -> str:
    """What tells these weights from all others."""
    state = module.state_dict()
    kept = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        kept.update(np.ascontiguousarray(state[name].numpy()).tobytes())
    return kept.hexdigest()


def plot(path: str, accuracies: List[List[float]]) -> None:
    """Draw the accuracy on each set by epoch to ``path``, a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), constrained_layout=True)
    for name, curve in zip(SETS, zip(*accuracies)):
        axes.plot(range(len(curve)), curve, marker="o", label=name)
    axes.set(xlabel="epoch (0: before training)", ylabel="accuracy", ylim=(0, 1.02))
    axes.set_title("Accuracy on each validation set")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right", title="images")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--augment", action="store_true", help="train on noise and shifts, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", metavar="FOLDER", default="logs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the accuracies by epoch")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Train, validate, predict, draw; return the exit code."""
    arguments = parse(argv)
    wanted = {"sklearn": "scikit-learn", **({"matplotlib": "matplotlib"} if arguments.plot else {})}
    for module, package in wanted.items():
        if importlib.util.find_spec(module) is None:
            print(f"This example needs {package}: pip install {package}", file=sys.stderr)
            return 1
    try:
        task, accuracies = run(arguments)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"the weights' digest: {digest(task)}")
    if arguments.plot:
        plot(arguments.plot, accuracies)
        print(f"The picture is {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
