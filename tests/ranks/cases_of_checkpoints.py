"""Checkpoints, shared state, proofs and rates: what several ranks keep and find."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, List, Optional

import numpy as np
import oneflow as flow
from cases_of_batches import Normed
from cases_of_decisions import Counting, ended_by_a_signal
from flowvision.transforms import Compose, RandomHorizontalFlip, ToTensor
from oneflow.utils.data import DataLoader
from rank_basics import Net, Place, Result, case, dataset, fitted, numbers, slow_case, weights

from ofengine import Callback, ImageArrays, TaskModule, in_memory_loader
from ofengine.callbacks import LRDecayCallback, ModelCheckpoint
from ofengine.checkpoint.file import as_read, read
from ofengine.cli.set_lr import change_rates
from ofengine.loggers import CSVLogger


class SavesAt(Callback):
    """Saves when so many batches of all ranks are done."""

    fires_last = True

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class OfRankZero(Callback):
    """Counts on rank 0 alone, also in tensors; the others are told at the end."""

    rank_zero_only = True

    def __init__(self) -> None:
        self.state: Any = {"total": flow.zeros(()), "parts": (1, {"row": flow.zeros(2)})}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.state["total"] += 1
        self.state["parts"][1]["row"][1] += 0.5

    def state_dict(self) -> Any:
        return dict(self.state)

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@case
def a_state_with_tensors_of_rank_zero(place: Place) -> Result:
    callback = OfRankZero()
    loader = DataLoader(dataset(24), batch_size=4)
    trainer = place.trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(Net(), loader)
    # The other ranks have it as a file gives it: arrays for tensors, lists for tuples.
    state = callback.state if trainer.global_rank else as_read(callback.state_dict())
    one, kept = state["parts"]
    assert isinstance(state["parts"], list) and isinstance(state["total"], np.ndarray)
    batches = [float(state["total"]), *kept["row"].tolist()]
    return {"one": one, "of all ranks": [each * place.size / place.each(1) for each in batches]}


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


class FlippedBeside(Net):
    """Of two loaders' batches, images that were flipped are the first."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (images, labels), other = batch
        loss = super().training_step((images.flatten(1), labels), batch_idx)
        return loss + 0.1 * self.scores(other[0]).mean()


@case
def flips_of_one_of_two_loaders(place: Place) -> Result:
    """Drawn in the main process from the generator that a step draws from; resumed, too."""

    def fit(callbacks: Any = (), path: Optional[Path] = None) -> Result:
        x, y = numbers(38)
        pixels = (100 + 20 * x).clip(0, 255).astype(np.uint8).reshape(-1, 2, 3, 1)
        transform = Compose([RandomHorizontalFlip(), ToTensor()])
        flipped = in_memory_loader(ImageArrays(pixels, y, transform), 3, shuffle=True)
        loaders = [flipped, DataLoader(dataset(14), batch_size=3, shuffle=True)]
        trainer = place.trainer(accumulate=2, callbacks=list(callbacks))
        return fitted(FlippedBeside(dropout=0.2), trainer, loaders, ckpt_path=path)

    result, path = fit(), place.folder / "flips.safetensors"
    if not place.alone:
        fit([SavesAt(3 * place.size, path)])
        resumed = fit(path=path)
        assert all((resumed["weights"][n] == w).all() for n, w in result["weights"].items())
    return result


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


class KeepsItsPart(Callback):
    """Notes how many numbers the optimizer keeps on this rank after a step; saves in a window."""

    fires_last = True

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path, self.kept = batches, path, 0
        self.parts: List[int] = []
        """That of each rank."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.kept = kept_numbers(trainer.optimizer)
        if trainer.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.parts = trainer.gather(self.kept)


def kept_numbers(optimizer: Any) -> int:
    states = [each for each in optimizer._state.values() if isinstance(each, dict)]
    return sum(int(each.numel()) for kept in states for each in kept.values())


def sharded(place: Place, optimizer: str, after: int, **options: Any) -> Result:
    """Each rank keeps a part of the state while it trains; checkpoints have the whole of it."""
    place.folder.mkdir(parents=True, exist_ok=True)
    path = place.folder / f"{optimizer}.safetensors"
    results = []
    for ckpt_path in (None, path):
        note = KeepsItsPart(after * place.size, path)
        strategy = "auto" if place.alone else "zero"
        saver = ModelCheckpoint(dirpath=place.folder / optimizer, save_last=True)
        trainer = place.trainer(strategy=strategy, callbacks=[note, saver], **options)
        loader = DataLoader(dataset(), batch_size=4, shuffle=True)
        task = Counting(optimizer, dropout=0.2)
        result = fitted(task, trainer, loader, loader, ckpt_path=ckpt_path)
        whole = kept_numbers(trainer.optimizer)
        assert sum(note.parts) == whole
        assert place.alone or max(note.parts) <= 0.6 * whole
        results.append({**result, "numbers": whole})
    kept = []
    for each in (path, place.folder / optimizer / "last.safetensors"):
        checkpoint = read(each)
        assert checkpoint.state is not None
        state = {key: checkpoint.state["optimizer"][key] for key in ("steps", "states")}
        kept.append({"weights": checkpoint.weights, **state})
    return {"results": results, "kept": kept}


@case
def a_state_that_is_shared_out(place: Place) -> Result:
    return sharded(place, "adamw", 3, accumulate=2, gradient_clip_val=0.5)


@slow_case
def a_momentum_that_is_shared_out(place: Place) -> Result:
    return {name: sharded(place, name, 2) for name in ("sgd", "adagrad")}


@slow_case
def a_signal_while_the_state_is_shared_out(place: Place) -> Result:
    """Rank 0 saves while the others end; what it saves can be gone on from."""
    options = {} if place.alone else {"strategy": "zero"}
    loader = DataLoader(dataset(), batch_size=4)
    result = ended_by_a_signal(place, Net("adamw"), loader, **options)
    (path,) = place.folder.rglob("*.safetensors")
    trainer = place.trainer(**options)
    return {**result, "resumed": fitted(Net("adamw"), trainer, loader, ckpt_path=path)["weights"]}


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
