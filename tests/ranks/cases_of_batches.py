"""Optimizers, layers and data: what one process and several ranks train."""

from __future__ import annotations

import sys
from typing import Any, Iterator, List

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset
from rank_basics import (
    Net,
    Place,
    Predicts,
    Result,
    Weighed,
    case,
    close_case,
    dataset,
    fitted,
    numbers,
    slow_case,
)

from ofengine import Callback, ConfigurationError, RankError, TaskModule, in_memory_loader
from ofengine.callbacks import EarlyStopping, EMAWeightAveraging, LRDecayCallback, PredictionWriter


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


@case
def zeros_of_both_signs_and_the_smallest_numbers(place: Place) -> Result:
    """The gradients of a step, as bytes: -0 equals 0."""
    found: Result = {}

    class Products(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Parameter(flow.zeros(600))
            self.broad = nn.Parameter(flow.zeros(600, dtype=flow.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (x,) = batch
            products = (self.broad * x).sum()
            return products.to(flow.float32) + (self.narrow * x.to(flow.float32)).sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.parameters(), lr=1.0)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for name, each in self.named_parameters():
                found[name] = each.grad.numpy().tobytes()

    rng = np.random.default_rng(2)
    x = rng.choice([-0.0, 0.0, 1e-39, -1e-39, 3e-45, 0.25, -1.5], (12, 600))
    task = Products()
    loader = DataLoader(TensorDataset(flow.tensor(x)), batch_size=1)
    place.trainer(max_epochs=1, max_steps=1).fit(task, loader)
    return found


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


class LogsUpdates(Callback):
    """Logs around each update what is alike on all ranks, and on rank 0 alone a value more."""

    def on_before_optimizer_step(self, trainer: Any, task: Any, *_: Any) -> None:
        task.log("before", 3.0 - trainer.global_step, on_step=True, on_epoch=True)
        norm = sum((each.grad**2).sum() for each in task.parameters() if each.grad is not None)
        task.log("norm", norm, on_step=False, on_epoch=True)
        if trainer.is_global_zero:
            task.log("of_rank_0", flow.tensor(1.0), on_step=False, on_epoch=True)

    def on_before_zero_grad(self, trainer: Any, task: Any, *_: Any) -> None:
        task.log("zero_grad", flow.tensor(float(trainer.global_step)), on_epoch=True)

    def on_after_optimizer_step(self, trainer: Any, task: Any) -> None:
        task.log("after", flow.tensor(2.0**trainer.global_step), on_step=True, on_epoch=True)


@case
def what_is_logged_around_updates(place: Place) -> Result:
    """Also of a window that ends with a smaller batch, or with ranks that have none."""
    found: Result = {}
    for samples, accumulate in ((20, 1), (18, 1), (22, 1), (30, 2)):
        loader = DataLoader(dataset(samples), batch_size=4)
        trainer = place.trainer(accumulate, callbacks=[LogsUpdates()])
        found[f"{samples} by {accumulate}"] = fitted(Net(), trainer, loader)
    return found


@slow_case
def what_is_read_at_every_batch(place: Place) -> Result:
    class Reads(Callback):
        rank_zero_only = True

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert "train_loss_step" in trainer.callback_metrics  # on rank 0 alone

    loader = DataLoader(dataset(), batch_size=4)
    return fitted(Net(), place.trainer(callbacks=[Reads()]), loader, loader)
