"""Metrics, stops, signals: what one process and several ranks decide."""

from __future__ import annotations

import os
import signal
from typing import Any, Callable, List, Optional

from oneflow.utils.data import DataLoader
from rank_basics import Net, Place, Predicts, Result, Weighed, case, dataset, fitted, slow_case

from ofengine import Callback, RankError, TaskModule
from ofengine.callbacks import ModelCheckpoint
from ofengine.metrics import AUROC, Accuracy, ConfusionMatrix, F1Score, Mean, MeanSquaredError


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


def ended_by_a_signal(place: Place, task: TaskModule, loader: Any, **options: Any) -> Result:
    """All end after the same batch, and rank 0 saves."""
    trainer = place.trainer(callbacks=[Signals(), ModelCheckpoint()], **options)
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
