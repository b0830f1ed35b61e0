"""What one process and several ranks train, to be compared bit for bit.

Each case is a function of a :class:`Place` that trains and returns what must be equal everywhere.
Run as a program, one rank goes through all of them and writes down what it got.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from ofengine import (
    Callback,
    ConfigurationError,
    RankError,
    TaskModule,
    Trainer,
    in_memory_loader,
)
from ofengine.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LRDecayCallback,
    ModelCheckpoint,
    PredictionWriter,
)
from ofengine.cli.set_lr import change_rates
from ofengine.loggers import CSVLogger
from ofengine.metrics import AUROC, Accuracy, ConfusionMatrix, F1Score, Mean, MeanSquaredError

Result = Dict[str, Any]
CASES: Dict[str, Callable[[Place], Result]] = {}
CLOSE: Dict[str, float] = {}
SLOW: Set[str] = set()
"""Those that add least to the others."""


def case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    CASES[function.__name__] = function
    return function


def close_case(most: float) -> Callable[[Any], Any]:
    """One process comes this close to it; ranks are equal to each other to the bit."""

    def close(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
        CLOSE[function.__name__] = most
        return case(function)

    return close


def slow_case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    SLOW.add(function.__name__)
    return case(function)


class Place:
    """Where a case runs: in one of ``size`` ranks, or alone, in the place of all of them."""

    def __init__(self, size: int, alone: bool, folder: Path, shared: Path) -> None:
        self.size, self.alone, self.folder, self.shared = size, alone, folder, shared

    def each(self, batches: int) -> int:
        """``batches`` of each rank, in the batches that this process goes through."""
        return batches * self.size if self.alone else batches

    def trainer(self, accumulate: int = 1, **options: Any) -> Trainer:
        given = {
            "accumulate_grad_batches": self.each(accumulate),
            "device": "cpu",
            "max_epochs": 2,
            "seed": 5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(self.folder),
        }
        return Trainer(**{**given, **options})


def numbers(samples: int = 46) -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, 6)).astype(np.float32)
    return x, rng.integers(0, 3, samples)


def dataset(samples: int = 46) -> Any:
    x, y = numbers(samples)
    return TensorDataset(flow.tensor(x), flow.tensor(y))


class Net(TaskModule):
    """Two layers, a third that some batches use, and one that none does."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0) -> None:
        super().__init__()
        flow.manual_seed(1)
        self.optimizer_name = optimizer
        self.first = nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 3)
        self.sometimes = nn.Linear(6, 3)
        self.never = nn.Linear(2, 2)

    def scores(self, x: Any) -> Any:
        scores = self.second(self.dropout(self.first(x).relu()))
        return scores + self.sometimes(x) if float(x[0, 0].numpy()) > 0.3 else scores

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.scores(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.scores(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(dim=-1) == y).to(flow.float32).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adamw":
            return flow.optim.AdamW(self.parameters(), lr=0.02)
        return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def weights(task: nn.Module) -> Dict[str, np.ndarray]:
    return {name: np.array(each.numpy()) for name, each in task.state_dict().items()}


def fitted(task: Net, trainer: Trainer, train: Any, val: Any = None, **options: Any) -> Result:
    trainer.fit(task, train, val, **options)
    return {
        "weights": weights(task),
        "metrics": dict(trainer.callback_metrics),
        "steps": trainer.global_step,
        "seen": trainer.batches_seen,
    }


# ---------------------------------------------------------------------- optimizers and rates


@case
def sgd_with_momentum_shuffled(place: Place) -> Result:
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    return fitted(Net(), place.trainer(max_epochs=3), loader)


@case
def adamw_with_all_that_goes_with_it(place: Place) -> Result:
    class Layerwise(Net):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.first.parameters(), "lr": 0.02, "name": "a", "lr_scale": 0.5},
                {"params": [*self.second.parameters(), *self.sometimes.parameters(),
                            *self.never.parameters()], "lr": 0.02, "name": "b",
                 "lr_decay_scale": 0.9},
            ]  # fmt: skip
            optimizer = flow.optim.AdamW(groups, lr=0.02)
            cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {"optimizer": optimizer, "lr_scheduler": cosine}

    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    callbacks = [LRDecayCallback(every_n_batches=place.each(2)), EMAWeightAveraging(decay=0.9)]
    trainer = place.trainer(accumulate=2, gradient_clip_val=0.5, callbacks=callbacks)
    result = fitted(Layerwise("adamw", dropout=0.3), trainer, loader, loader)
    rates = [trainer.rates.rates(step) for step in range(trainer.global_step)]
    return {**result, "rates": rates}


@slow_case
def a_frozen_layer_and_clipping_by_value(place: Place) -> Result:
    task = Net()
    task.first.requires_grad_(False)
    trainer = place.trainer(gradient_clip_val=0.01, gradient_clip_algorithm="value")
    return fitted(task, trainer, DataLoader(dataset(), batch_size=4))


def by_schedule(task: Any) -> Any:
    """What ``configure_optimizers`` returns where weight decay and momentum move."""
    optimizer = flow.optim.AdamW(task.parameters(), lr=0.02, weight_decay=0.1)
    return {
        "optimizer": optimizer,
        "weight_decay_schedule": lambda step: 0.1 + 0.2 * step,
        "momentum_schedule": lambda step: 0.8 + 0.03 * (step % 5),
    }


@slow_case
def weight_decay_and_momentum_by_schedule(place: Place) -> Result:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            return by_schedule(self)

    trainer = place.trainer(accumulate=2, gradient_clip_val=0.05)
    return fitted(Scheduled(), trainer, DataLoader(dataset(), batch_size=4, shuffle=True))


@slow_case
def float64(place: Place) -> Result:
    x, y = numbers()
    data = TensorDataset(flow.tensor(x.astype(np.float64)), flow.tensor(y))
    task = Net()
    task.first.double(), task.second.double(), task.sometimes.double()  # never stays float32
    return fitted(task, place.trainer(), DataLoader(data, batch_size=4))


@slow_case
def plateau_and_early_stopping(place: Place) -> Result:
    class OnPlateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = flow.optim.SGD(self.parameters(), lr=0.4)
            plateau = flow.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }

    stopping = EarlyStopping(monitor="val_loss", patience=2)
    trainer = place.trainer(max_epochs=30, callbacks=[stopping])
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    result = fitted(OnPlateau(), trainer, loader, DataLoader(dataset(), batch_size=9))
    return {**result, "epochs": trainer.current_epoch, "state": stopping.state_dict()}


class Normed(Net):
    """With a batch norm that is called twice in a step, in eval mode in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=0.3)
        self.other_norm = nn.BatchNorm1d(6)

    def scores(self, x: Any) -> Any:
        if self.training:
            self.norm(self.first(x) + 1.0)
            self.norm.eval()
            self.norm(self.first(x))  # by the running statistics, which it leaves alone
            self.norm.train()
        return self.second(self.norm(self.first(self.other_norm(x))).relu())


@case
def batch_norms(place: Place) -> Result:
    """Each batch by its own statistics; the running ones see the batches of all."""
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    return fitted(Normed(), place.trainer(), loader, loader)


class Synced(TaskModule):
    """With a batch norm of images that is called twice in a step, and one of vectors."""

    def __init__(self) -> None:
        super().__init__()
        flow.manual_seed(1)
        self.images = nn.BatchNorm2d(3, momentum=0.3)
        self.vectors = nn.BatchNorm1d(8, affine=False)
        self.untracked = nn.BatchNorm1d(8, track_running_stats=False)
        self.layer = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def scores(self, x: Any) -> Any:
        images = self.images(self.images(x.reshape(-1, 3, 2, 1)) * 2.0 + 1.0)
        return self.last(self.untracked(self.vectors(self.layer(images.reshape(-1, 6))).relu()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.scores(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.scores(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@close_case(3e-6)
def batch_norms_of_all_ranks(place: Place) -> Result:
    """As one process with batches as large as all ranks' together; in the end one has some."""
    data, task = dataset(4 * place.size * 3 + 4), Synced()
    batch = 4 * place.size if place.alone else 4
    trainer = place.trainer(
        accumulate_grad_batches=1, sync_batchnorm=True, num_sanity_val_steps=0, max_epochs=3
    )
    val = DataLoader(data, batch_size=5)  # some normalize by a batch there too
    result = fitted(task, trainer, DataLoader(data, batch_size=batch, shuffle=True), val)
    assert type(task.images) is nn.BatchNorm2d and "forward" not in vars(task.images)
    del result["seen"]
    return result


@slow_case
def batch_norms_that_some_ranks_call_alone(place: Place) -> Result:
    """All raise, wherever the steps are at odds; a process that is alone cannot be."""
    if place.alone:
        return {"calls": "RankError", "losses": "RankError"}

    class Uneven(Synced):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.what == "calls" and self.trainer.global_rank:
                self.vectors.eval()
            loss = super().training_step(batch, batch_idx)
            return self.last.weight.sum() if self.trainer.global_rank else loss

    raised = {}
    for what in ("calls", "losses"):
        task = Uneven()
        task.what = what
        try:
            place.trainer(sync_batchnorm=True).fit(task, DataLoader(dataset(), batch_size=4))
        except RankError as error:
            assert "differ in their batch norms" in str(error)
            raised[what] = type(error).__name__
    return raised


# ---------------------------------------------------------------------- data


@case
def fewer_batches_than_ranks(place: Place) -> Result:
    return fitted(Net(), place.trainer(), DataLoader(dataset(3), batch_size=4))


@slow_case
def a_list_of_batches(place: Place) -> Result:
    x, y = numbers(10)
    batches = [(flow.tensor(x[i : i + 2]), flow.tensor(y[i : i + 2])) for i in range(0, 10, 2)]
    return fitted(Net(), place.trainer(), batches, batches)


@slow_case
def limits_are_for_each_rank(place: Place) -> Result:
    loader = DataLoader(dataset(), batch_size=3, shuffle=True)
    options = {"limit_train_batches": place.each(2), "limit_val_batches": place.each(1)}
    options["val_check_interval"] = place.each(1)
    return fitted(Net(), place.trainer(**options), loader, loader)


@slow_case
def in_memory(place: Place) -> Result:
    return fitted(Net(), place.trainer(), in_memory_loader(dataset(), 4, shuffle=True))


class Noisy(Dataset):
    """Noise from numpy's global generator."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> Any:
        return np.random.standard_normal(6).astype(np.float32), index % 3


@slow_case
def workers_that_draw(place: Place) -> Result:
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=1)
    return fitted(Net(), place.trainer(max_epochs=1), loader)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        x, y = numbers(19)
        yield from zip(x, y)


@case
def a_stream_of_unknown_length(place: Place) -> Result:
    return fitted(Net(), place.trainer(accumulate=2), DataLoader(Stream(), batch_size=2))


class Backwards(BatchSampler):
    """A sampler with a generator of its own, which nobody seeds."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(None if "--rank" in sys.argv else 7)

    def __iter__(self) -> Iterator[List[int]]:
        for start in self.random.permutation(9).tolist():
            yield [start + 1, start]

    def __len__(self) -> int:
        return 9


@slow_case
def a_sampler_that_nobody_seeds(place: Place) -> Result:
    sampler = Backwards()
    if not place.alone and place.trainer().global_rank == 0:
        sampler.random.seed(7)  # rank 0's counts
    return fitted(Net(), place.trainer(), DataLoader(dataset(), batch_sampler=sampler))


# ---------------------------------------------------------------------- metrics and evaluation


@case
def batches_of_unequal_weight(place: Place) -> Result:
    train = DataLoader(dataset(), batch_size=4, shuffle=True)
    return fitted(Weighed(), place.trainer(2), train)


@case
def two_loaders_at_once_in_windows_by_epoch(place: Place) -> Result:
    class Both(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second = batch
            return super().training_step(first, batch_idx) + self.scores(second[0]).mean()

        def on_after_optimizer_step(self) -> None:
            with flow.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(min=-0.5, max=0.5)

    options = {"batch_size": 4, "shuffle": True}
    loaders = [DataLoader(dataset(), **options), DataLoader(dataset(18), **options)]
    windows = {0: place.each(1), 1: place.each(2)}
    trainer = place.trainer(accumulate_grad_batches=windows, max_epochs=2)
    return fitted(Both(), trainer, loaders)


@slow_case
def two_loaders_are_evaluated(place: Place) -> Result:
    trainer = place.trainer()
    loaders = [DataLoader(dataset(11), batch_size=4), DataLoader(dataset(3), batch_size=4)]
    results = [trainer.validate(Net(), loaders), trainer.test(Net(), loaders[0])]
    return {"results": results}


@slow_case
def predictions_of_two_loaders(place: Place) -> Result:
    class Predicts(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return {"scores": self.scores(x), "of": (batch_idx >= 0, y)}

    loaders = [DataLoader(dataset(11), batch_size=2), DataLoader(dataset(3), batch_size=4)]
    predicted = place.trainer().predict(Predicts(), loaders)
    return {
        "predicted": [
            [[each["scores"].numpy(), *each["of"][:1], each["of"][1].numpy()] for each in every]
            for every in predicted
        ]
    }


class Predicts(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"scores": self.scores(x), "of": [y, "odd" if len(x) % 2 else "even"]}


@case
def predictions_in_files(place: Place) -> Result:
    """Each that one process writes, of its contents; of the last batches nothing is predicted."""

    class Little(Predicts):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return super().predict_step(batch, batch_idx) if len(batch[0]) == 4 else None

    loaders = [DataLoader(dataset(11), batch_size=2), DataLoader(dataset(6), batch_size=4)]
    for interval, task in (("epoch", Predicts()), ("batch", Predicts()), ("epoch", Little())):
        writer = PredictionWriter(place.folder, interval)
        trainer = place.trainer(callbacks=[writer])
        trainer.predict(task, loaders, return_predictions=False)
    files = {}
    for path in sorted(place.folder.rglob("*.npz")):
        with np.load(path) as arrays:
            files[str(path.relative_to(place.folder))] = dict(arrays)
    assert len(files) == 2 + 6 + 2 + 1 and writer.folder == place.folder / "version_2"
    return files


@case
def what_each_rank_gives(place: Place) -> Result:
    """And what a folder that nobody can write to does to all."""
    trainer, file = place.trainer(), place.folder / "file"
    file.write_text("")
    given = trainer.gather({"rank": trainer.global_rank, "of": (flow.ones(2), "x", None)})
    assert [each["rank"] for each in given] == list(range(trainer.world_size))
    trainer = place.trainer(callbacks=[PredictionWriter(file / "folder")])
    try:
        trainer.predict(Predicts(), DataLoader(dataset(11), batch_size=2))
    except ConfigurationError as error:
        assert "cannot write" in str(error)
        return {"of": given[-1]["of"][0].numpy(), "rest": list(given[-1]["of"][1:])}
    return {}


@slow_case
def what_is_read_at_every_batch(place: Place) -> Result:
    class Reads(Callback):
        rank_zero_only = True

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert "train_loss_step" in trainer.callback_metrics  # on rank 0 alone

    loader = DataLoader(dataset(), batch_size=4)
    return fitted(Net(), place.trainer(callbacks=[Reads()]), loader, loader)


class Counting(Net):
    """Metrics of all kinds (whole numbers, sums in float64, rows), used in each way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.acc, self.f1, self.matrix = Accuracy(), F1Score(num_classes=3), ConfusionMatrix(3)
        self.errors = {"mse": MeanSquaredError(squared=False)}
        self.areas = [AUROC(num_classes=3)]
        self.between, self.callback_mean = Mean(), Mean()
        self.matrices: List[Any] = []

    def count(self, batch: Any, stage: str) -> None:
        x, y = batch
        scores = self.scores(x).detach()
        self.acc(scores, y)
        self.f1(scores, y)
        self.errors["mse"](scores[:, 0], x[:, 0])
        self.areas[0](scores.softmax(dim=1), y)
        self.log(f"{stage}_acc", self.acc, on_step=stage == "train", on_epoch=True)
        counted = {"f1": self.f1, "rmse": self.errors["mse"], "area": self.areas[0]}
        named = {f"{stage}_{name}": metric for name, metric in counted.items()}
        self.log_dict(named, on_step=False, on_epoch=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count(batch, "train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.count(batch, "val")
        self.matrix(self.scores(batch[0]), batch[1])

    test_step = validation_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.callback_mean.update(outputs["loss"], weight=len(batch[0]))

    def on_train_epoch_end(self) -> None:
        self.between.update(1.0 / (3 + self.trainer.current_epoch))
        self.matrices.append([self.callback_mean.compute(), self.between.compute()])

    def on_validation_epoch_end(self) -> None:
        self.matrices.append(self.matrix.compute())
        self.matrix.reset()


@case
def metrics_that_count(place: Place) -> Result:
    class Looks(Callback):
        """Rank 0 alone looks, and where the others are must not matter."""

        rank_zero_only = True

        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            assert 0.0 <= task.acc.compute() <= 1.0

    class Own(Callback):
        def __init__(self) -> None:
            self.mean, self.means = Mean(), []

        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            self.mean.reset()

        def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
            self.mean(outputs["loss"] / 3.0)

        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            self.means.append(self.mean.compute())

    task, own, data = Counting(), Own(), dataset(50)
    options = {"log_every_n_steps": 2, "val_check_interval": place.each(3)}
    options["num_sanity_val_steps"] = place.each(1)
    trainer = place.trainer(callbacks=[own, Looks()], **options)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    result = fitted(task, trainer, loader, DataLoader(data, batch_size=7))
    kept = [each.compute() for each in (task.between, task.callback_mean, own.mean)]
    result = {**result, "matrices": task.matrices, "own": own.means, "kept": kept}
    loaders = [DataLoader(dataset(11), batch_size=4), DataLoader(dataset(9), batch_size=9)]
    return {**result, "results": place.trainer().test(task, loaders)}


@slow_case
def a_metric_that_all_reset_within_an_epoch(place: Place) -> Result:
    """Every third round each rank reads and resets it; a process alone, where a round ends."""

    class Resets(Callback):
        def __init__(self) -> None:
            self.mean, self.area, self.seen = Mean(), AUROC(num_classes=3), []

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.mean(outputs["loss"])
            self.area(batch[0][:, :3].softmax(dim=1), batch[1])
            if (batch_idx + 1) % place.each(3) == 0:
                self.seen.append([self.mean.compute(), self.area.compute()])
                self.mean.reset()
                self.area.reset()

    resets = Resets()
    loader = DataLoader(dataset(50), batch_size=4, shuffle=True)
    result = fitted(Counting(), place.trainer(callbacks=[resets]), loader)
    return {**result, "seen": resets.seen, "left": resets.mean.compute()}


# ---------------------------------------------------------------------- ends


@slow_case
def a_stop_that_all_ask_for(place: Place) -> Result:
    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.should_stop = batch_idx >= place.each(3) - 1

    loader = DataLoader(dataset(), batch_size=4)
    return fitted(Net(), place.trainer(callbacks=[Stops()]), loader)


@case
def a_stop_that_one_asks_for(place: Place) -> Result:
    """All stop one batch later; a process that is alone is asked then."""

    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            at = place.each(3) - 1 if place.alone else 1
            trainer.should_stop = trainer.should_stop or (
                batch_idx >= at and trainer.global_rank == trainer.world_size - 1
            )

    loader = DataLoader(dataset(), batch_size=4)
    return fitted(Net(), place.trainer(callbacks=[Stops()]), loader)


@slow_case
def steps_are_limited(place: Place) -> Result:
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    return fitted(Net(), place.trainer(max_epochs=-1, max_steps=9), loader)


class Skips(Callback):
    """Leaves out the rest of each epoch from another round on; ``of_each`` counts batches of it."""

    def __init__(self, of_each: Callable[[int], int], *at: int) -> None:
        self.at = [of_each(each) for each in at]

    def on_train_batch_start(
        self, trainer: Any, task: Any, batch: Any, batch_idx: int
    ) -> Optional[int]:
        epoch = trainer.current_epoch
        return -1 if epoch < len(self.at) and batch_idx == self.at[epoch] else None


class Weighed(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": batch[0].abs().sum() * len(batch[0])}


@case
def epochs_that_are_left(place: Place) -> Result:
    """In a window, in a round that not all ranks have a batch for, and at once."""
    loader = DataLoader(dataset(4 * (5 * place.size + 1)), batch_size=4, shuffle=True)
    skips = Skips(place.each, 3, 5, 0)
    return fitted(Weighed(), place.trainer(2, callbacks=[skips], max_epochs=4), loader)


class Gathers(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.gather(0)

    def on_predict_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.gather(0)


@slow_case
def a_stop_that_one_asks_for_where_all_leave_the_rest_out(place: Place) -> Result:
    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            is_last = trainer.global_rank == trainer.world_size - 1
            trainer.should_stop = is_last and batch_idx == place.each(2) - 1

    loader = DataLoader(dataset(), batch_size=4)
    callbacks = [Stops(), Gathers(), Skips(place.each, 2)]
    result = fitted(Net(), place.trainer(callbacks=callbacks), loader)
    assert result["steps"] == 2
    return {key: result[key] for key in ("weights", "steps", "seen")}


class Signals(Callback):
    """SIGTERM to the last rank, in its second step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def ended_by_a_signal(place: Place, task: TaskModule, loader: Any) -> Result:
    """All end after the same batch, and rank 0 saves."""
    trainer = place.trainer(callbacks=[Signals(), ModelCheckpoint()])
    try:
        trainer.fit(task, loader)
    except SystemExit as end:
        saved = [path.name for path in place.folder.rglob("*.safetensors")]
        return {"code": end.code, "saved": len(saved), "steps": trainer.global_step > 1}
    return {}


@case
def a_signal_to_one_rank(place: Place) -> Result:
    return ended_by_a_signal(place, Net(), DataLoader(dataset(), batch_size=4))


@case
def ranks_that_do_different_things(place: Place) -> Result:
    """All raise; a process that is alone cannot be at odds with itself."""
    if place.alone:
        return dict.fromkeys(("verbs", "data", "skips", "gather"), "RankError")
    trainer, raised = place.trainer(), {}
    verb = trainer.validate if trainer.global_rank else trainer.test
    loader = DataLoader(dataset(), batch_size=4)
    samples = 46 if trainer.global_rank else 30
    other = DataLoader(dataset(samples), batch_size=4)
    skips = [] if trainer.global_rank else [Skips(place.each, 1)]
    odd = DataLoader(dataset(4 * (place.size + 1)), batch_size=4)
    for name, call in (
        ("verbs", lambda: verb(Net(), loader)),
        ("data", lambda: place.trainer().fit(Net(), other)),
        ("skips", lambda: place.trainer(callbacks=skips).fit(Net(), loader)),
        ("gather", lambda: place.trainer(callbacks=[Gathers()]).predict(Predicts(), odd)),
    ):
        try:
            call()
        except RankError as error:
            raised[name] = type(error).__name__
    return raised


# ---------------------------------------------------------------------- files


class SavesAt(Callback):
    """Saves when so many batches of all ranks are done."""

    fires_last = True

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def resumable(place: Place, callbacks: Any = (), path: Optional[Path] = None) -> Result:
    loader = DataLoader(dataset(), batch_size=3, shuffle=True)
    trainer = place.trainer(accumulate=2, callbacks=list(callbacks), max_epochs=2)
    task = Counting("adamw", dropout=0.2)
    result = fitted(task, trainer, loader, loader, ckpt_path=path)
    return {**result, "matrices": task.matrices[-1], "mean": task.callback_mean.compute()}


@case
def whole(place: Place) -> Result:
    return resumable(place)


@slow_case
def resumed_from_the_same(place: Place) -> Result:
    """After three rounds, in the middle of a window."""
    path = place.folder / "own.safetensors"
    resumable(place, [SavesAt(3 * place.size, path)])
    return resumable(place, path=path)


@case
def saved_for_the_other(place: Place) -> Result:
    """Alone after a batch in the middle of a round; the other goes on from it."""
    done = 2 * place.size + 1 if place.alone else 3 * place.size
    name = "alone" if place.alone else "ranks"
    resumable(place, [SavesAt(done, place.shared / f"{name}.safetensors")])
    return {}


@case
def resumed_from_the_other(place: Place) -> Result:
    path = place.shared / f"{'ranks' if place.alone else 'alone'}.safetensors"
    return resumable(place, path=path)


@slow_case
def resumed_without_a_seed(place: Place) -> Result:
    """As the run that never stopped: ranks have taken a seed, which the checkpoint keeps."""
    if place.alone:
        return {"equal": True}
    results = []
    for stops in (False, True):
        path = place.folder / "unseeded.safetensors"
        for resume in [False, True] if stops else [False]:
            task = Net(dropout=0.2)
            flow.manual_seed(4 if resume else 3)
            callbacks = [SavesAt(3 * place.size, path)] if stops and not resume else []
            trainer = place.trainer(seed=None, callbacks=callbacks)
            loader = DataLoader(dataset(), batch_size=3, shuffle=True)
            trainer.fit(task, loader, ckpt_path=path if resume else None)
        results.append(weights(task))
    one, other = results
    return {"equal": all((one[name] == other[name]).all() for name in one)}


@case
def files_and_best(place: Place) -> Result:
    checkpoint = ModelCheckpoint(monitor="val_loss", save_last=True)
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    trainer = place.trainer(logger=True, callbacks=[checkpoint], log_every_n_steps=2)
    result = fitted(Net(), trainer, loader, loader)
    best = trainer.validate(Net(), loader, ckpt_path="best")
    rows = (place.folder / "ofengine_logs/version_0/metrics.csv").read_text()
    left = sorted(str(p.relative_to(place.folder)) for p in place.folder.rglob("*.*"))
    name = Path(checkpoint.best_model_path).name
    return {**result, "best": best, "rows": rows, "files": left, "name": name}


class Cheats(Normed):
    """Where there are several ranks, the last trains with another loss from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        ranks = self.trainer.world_size
        is_last = ranks > 1 and self.trainer.global_rank == ranks - 1
        return loss * 2.0 if is_last and self.trainer.global_step > 1 else loss


@slow_case
def the_proof(place: Place) -> Result:
    """Of a task that is the same on ranks, its batches uneven."""
    if place.alone:
        return {"rows": [(5, ""), (3, ""), (3, ""), (3, "")]}
    trainer = place.trainer(callbacks=[LRDecayCallback(every_n_batches=2)])
    loader = DataLoader(dataset(4 * 3 * place.size + 1), batch_size=4, shuffle=True)
    report = trainer.prove(Normed(), loader, steps=5)
    assert report.equal, report
    assert report.rows[0].name == f"{place.size} ranks"
    return {"rows": [(each.steps, each.error) for each in report.rows]}


@slow_case
def the_proof_of_a_task_that_cheats(place: Place) -> Result:
    if place.alone:
        return {"first": {"loss": 3, "weights": 3, "metrics": 3}}
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    row = place.trainer().prove(Cheats(), loader, steps=4).rows[0]
    assert row.difference is not None and row.difference.step == 3
    assert row.difference.parameter is not None and row.difference.distance > 0.0
    assert f"The loss of batch {place.size - 1} in that round" in row.difference.origin
    return {"first": {name: step for name, step in row.first.items() if step is not None}}


def rates_found(place: Place, task: TaskModule, loader: Any, max_lr: float = 30.0) -> Result:
    """What the finder finds up to the last step and where it stops before, and a fit after it."""
    found = []
    trainer = place.trainer(2)
    for threshold in (None, 1.1):
        each = trainer.lr_find(
            task, loader, num_steps=9, min_lr=0.1, max_lr=max_lr, early_stop_threshold=threshold
        )
        found.append([each.rates, each.losses, each.suggestion(1), each.stopped_early])
    trainer.fit(task, loader)
    return {"found": found, "weights": weights(task)}


@case
def rates_that_are_found(place: Place) -> Result:
    """Epochs of an odd number of rounds, the last of which not all ranks have a batch for."""
    result = rates_found(place, Net(dropout=0.2), DataLoader(dataset(50), 4, shuffle=True))
    assert [each[3] for each in result["found"]] == [False, True]
    return result


class AsksForARate(Callback):
    """As `ofengine set-lr` does, of rank 0 in its third step: all obey behind the fourth."""

    fires_last = True

    def __init__(self, place: Place, path: Path) -> None:
        self.place, self.path = place, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.place.alone:
            if trainer.global_step == 4 and not trainer.rates.changes:
                trainer.set_lr(trainer.rates.names[0], 0.01)
        elif trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero:
                change_rates(Path(trainer.log_dir), {"all": 0.01}, None)
                while not trainer._run.orders.wanted:
                    time.sleep(0.01)


@case
def a_rate_that_is_changed_from_outside(place: Place) -> Result:
    """At the same step on all ranks; again at that step where the run is resumed from before."""
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    path = place.folder / "before.safetensors"
    trainer = place.trainer(callbacks=[AsksForARate(place, path)], logger=CSVLogger(place.folder))
    result = fitted(Net(), trainer, loader)
    if not place.alone:
        again = place.trainer(logger=CSVLogger(place.folder))
        resumed = fitted(Net(), again, loader, ckpt_path=path)
        assert all((resumed["weights"][n] == w).all() for n, w in result["weights"].items())
        assert again.rates.changes == [(4, "group_0", 0.01)], again.rates.changes
    return {"weights": result["weights"], "changes": trainer.rates.changes}


def run_case(name: str, place: Place) -> Result:
    place.folder.mkdir(parents=True, exist_ok=True)
    flow.manual_seed(0)
    return CASES[name](place)


def main(folder: Path, names: List[str]) -> None:
    from ofengine.launch.environment import read

    world = read()
    assert world is not None
    results: Dict[str, Any] = {}
    for name in names:
        place = Place(world.world_size, False, folder / "ranks" / name, folder)
        results[name] = run_case(name, place)
    (folder / f"results_{world.rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
