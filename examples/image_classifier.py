"""A classifier of images with everything that a run usually has around it.

The images are scikit-learn's handwritten digits, 8 x 8 pixels, which need no download. They are
mixed with each other while they are trained on (CutMix, by flowvision's `Mixup`). Accuracy and F1
are counted over whole epochs. The best moment is kept, training ends where it gets no better, and a
moving average of the weights is tested beside the best ones. The run's folder has the metrics three
times: as a table, for TensorBoard, and as JSON lines, and with them the rates, the gradients and
activations of every layer, and what the machine does; the classes of the test images are predicted
into a file. Callbacks that freeze layers are in gradual_unfreezing.py, those that give layers rates
of their own in layerwise_tutorial.py. Eager mode and graph mode come to the same weights, bit for
bit.

    python examples/image_classifier.py                  # graph mode
    python examples/image_classifier.py --mode eager --epochs 20
    python examples/image_classifier.py --plot confusion.png
    tensorboard --logdir logs                            # rates, losses, images a second, memory
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from flowvision.data import Mixup
from flowvision.loss.cross_entropy import SoftTargetCrossEntropy
from oneflow import nn
from oneflow.optim.lr_scheduler import CosineAnnealingLR
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelStatistics,
    ModelSummary,
    PredictionWriter,
    ProgressBar,
    TerminateOnNaN,
    Throughput,
    Timer,
)
from ofengine.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from ofengine.metrics import Accuracy, ConfusionMatrix, F1Score

CLASSES = 10
BATCH_SIZE = 32
CUTMIX = Mixup(
    mixup_alpha=0.0, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.0, num_classes=CLASSES
)
PACKAGES = {"sklearn": "scikit-learn", "tensorboardX": "tensorboardX"}


class Classifier(TaskModule):
    """A small convolutional network, and what is counted of it.

    Args:
        width: channels of the first convolution.
        rate: the learning rate at the beginning; it falls to 0 along a cosine.
    """

    def __init__(self, width: int = 16, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *self.block(1, width), *self.block(width, 2 * width), nn.MaxPool2d(2),
            *self.block(2 * width, 4 * width), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(16 * width, CLASSES),
        )  # fmt: skip
        self.loss_of_mixed = SoftTargetCrossEntropy()
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = Accuracy()
        self.f1 = F1Score(num_classes=CLASSES)
        self.confusion = ConfusionMatrix(num_classes=CLASSES)
        self.example_input_array = flow.zeros(1, 1, 8, 8)  # the summary shows shapes and FLOPs

    @staticmethod
    def block(channels_in: int, channels_out: int) -> List[nn.Module]:
        """Convolution, batch norm, activation. No bias before a batch norm, which cancels it."""
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    def forward(self, images: flow.Tensor) -> flow.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, shares = batch  # of mixed images: how much of each class is in it
        return self.loss_of_mixed(self(images), shares)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.accuracy.update(scores, labels)
        self.f1.update(scores, labels)
        self.log("val_loss", self.loss(scores, labels))
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        self.log("val_f1", self.f1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.accuracy.update(scores, labels)
        self.f1.update(scores, labels)
        self.confusion.update(scores, labels)
        self.log_dict({"test_accuracy": self.accuracy, "test_f1": self.f1})

    def predict_step(self, batch: Any, batch_idx: int) -> Dict[str, flow.Tensor]:
        images, labels = batch
        return {"digit": self(images).argmax(dim=1), "label": labels}

    def configure_optimizers(self) -> Dict[str, Any]:
        rate = self.hparams["rate"]
        optimizer = flow.optim.SGD(self.param_groups(), lr=rate, momentum=0.9, weight_decay=1e-4)
        schedule = CosineAnnealingLR(optimizer, self.trainer.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class KeepMatrix(Callback):
    """Keeps the confusion matrix of the newest test: it is no number that a logger could take."""

    matrix: np.ndarray

    def on_test_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        self.matrix = task.confusion.compute()
        task.confusion.reset()


def mixed(samples: Sequence[Tuple[flow.Tensor, flow.Tensor]]) -> Tuple[flow.Tensor, flow.Tensor]:
    """A batch and its classes' shares; in every other one, images have a piece of another."""
    images = flow.stack([image for image, _ in samples])
    labels = flow.stack([label for _, label in samples])
    return CUTMIX(images, labels)


def digits() -> Tuple[DataLoader, DataLoader, DataLoader]:
    """Batches of 1,280 images to train on, 256 to validate, 261 to test; always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)  # (1797, 1, 8, 8), from 0 to 1
    labels = data.target
    parts = []
    for size in (1280, 256):
        part, images, part_labels, labels = train_test_split(
            images, labels, train_size=size, stratify=labels, random_state=0
        )
        parts.append(TensorDataset(flow.tensor(part), flow.tensor(part_labels)))
    parts.append(TensorDataset(flow.tensor(images), flow.tensor(labels)))
    train, validation, test = parts
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=mixed),
        DataLoader(validation, 64),
        DataLoader(test, 64),
    )


def run(arguments: argparse.Namespace) -> Tuple[Classifier, np.ndarray]:
    """Train and test; return the task at its best and its confusion matrix."""
    train, validation, test = digits()
    seed_everything(arguments.seed)
    task = Classifier()
    best = ModelCheckpoint(
        monitor="val_accuracy", mode="max", filename="{epoch}-{val_accuracy:.3f}", save_last=True
    )
    # Validation looks at the training weights, for these are what a checkpoint's best will be.
    average = EMAWeightAveraging(decay=0.95, evaluate=False)
    matrix, timer = KeepMatrix(), Timer()
    writer = PredictionWriter(f"{arguments.logs}/image_classifier/predictions")
    loggers = [
        each(arguments.logs, name="image_classifier")  # of one name: all in one folder
        for each in (CSVLogger, TensorBoardLogger, JSONLinesLogger)
    ]
    trainer = Trainer(
        mode=arguments.mode,
        device=arguments.device,
        max_epochs=arguments.epochs,
        seed=arguments.seed,
        log_every_n_steps=10,
        logger=loggers,
        callbacks=[
            best,
            EarlyStopping("val_loss", patience=4),
            average,
            LearningRateMonitor(),
            ModelStatistics(every_n_steps=40, quantities=("norm", "std")),  # once in an epoch
            TerminateOnNaN(),
            DeviceStatsMonitor(),
            Throughput(),
            timer,
            writer,
            matrix,
            ProgressBar(),  # these two are there by themselves where none are given
            ModelSummary(max_depth=2),
        ],
    )
    trainer.fit(task, train, validation)
    average.copy_to(task)
    (averaged,) = trainer.test(task, test)
    (metrics,) = trainer.test(task, test, ckpt_path="best")
    trainer.predict(task, test, ckpt_path="best", return_predictions=False)
    say("the moving average", averaged)
    say("the best checkpoint", metrics)
    print(f"the best checkpoint is {best.best_model_path}")
    print(f"its predictions are in {writer.folder}")
    print(f"logged in {trainer.log_dir}, {len(trainer.history)} rows")
    trained, validated = timer.time_elapsed(), timer.time_elapsed("validate")
    print(f"trained for {trained:.1f} s, of which validation took {validated:.1f} s")
    return task, matrix.matrix


def say(whose: str, metrics: Dict[str, float]) -> None:
    """Print how well they did in the test."""
    print(f"test of {whose}: accuracy {metrics['test_accuracy']:.2%}, F1 {metrics['test_f1']:.4f}")


def digest(module: nn.Module) -> str:
    """What tells these weights and running statistics from all others."""
    state = module.state_dict()
    kept = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        kept.update(np.ascontiguousarray(state[name].numpy()).tobytes())
    return kept.hexdigest()


def plot(path: str, matrix: np.ndarray) -> None:
    """Draw the confusion matrix of the test images to ``path``, a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5.2), constrained_layout=True)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        text = str(matrix[row, column])
        axes.text(column, row, text, ha="center", va="center", color=color)
    right = matrix.trace() / matrix.sum()
    axes.set(xlabel="taken for", ylabel="digit", xticks=range(CLASSES), yticks=range(CLASSES))
    axes.set_title(f"{matrix.sum()} test images, {right:.1%} right")
    figure.colorbar(image, label="share of the digit's images")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", metavar="FOLDER", default="logs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the confusion matrix")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Train, test, draw; return the exit code."""
    arguments = parse(argv)
    wanted = {**PACKAGES, **({"matplotlib": "matplotlib"} if arguments.plot else {})}
    for module, package in wanted.items():
        if importlib.util.find_spec(module) is None:
            print(f"This example needs {package}: pip install {package}", file=sys.stderr)
            return 1
    try:
        task, matrix = run(arguments)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"the weights' digest: {digest(task)}")
    if arguments.plot:
        plot(arguments.plot, matrix)
        print(f"The picture is {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
