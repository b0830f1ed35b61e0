"""A run that is resumed goes on bit for bit as if it had never stopped, from any point."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from helpers import MODES, resuming
from helpers.resuming import (
    Augmented,
    Endless,
    Net,
    assert_same_run,
    check_exact,
    choose,
    collate,
    run,
    shuffled,
    some_slow,
)
from oneflow.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from oneflow.utils.data import DataLoader

from ofengine import Callback
from ofengine.callbacks import EarlyStopping, EMAWeightAveraging, GradualUnfreezing

FEW_KINDS = ("batch", "epoch_end")


@pytest.fixture
def points(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a batch and the end of an epoch, or from a point of each kind.

    Where these are few, all batches are of one size; the tests below without it have two.
    """
    if request.param == "few":
        monkeypatch.setattr(resuming, "KINDS", FEW_KINDS)
        monkeypatch.setattr(resuming, "EVEN", True)


def few(test: Callable[..., None]) -> Callable[..., None]:
    """From few points in graph mode, and, in the slow tests, from one of each kind in each mode."""
    both = [pytest.param("of each kind", mode, marks=pytest.mark.slow) for mode in MODES]
    asked = [("few", "graph"), *both]
    chosen = pytest.mark.parametrize(("points", "mode"), asked, indirect=["points"])(test)
    return pytest.mark.usefixtures("points")(chosen)


def test_from_a_point_of_each_kind(mode: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode)


@pytest.mark.parametrize(("mode", "other"), [("eager", "graph"), ("graph", "eager")])
def test_across_the_modes(
    mode: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "KINDS", (*FEW_KINDS, "validating"))
    check_exact(tmp_path, mode, other)


# Whether a run has a seed has to do with its data, and not with its mode.
EVERYWHERE = [("eager", "eager", None), ("eager", "graph", 7), ("graph", "eager", None),
              ("graph", "graph", 7)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "other", "seed"), EVERYWHERE)
def test_from_every_point_in_and_across_the_modes(
    mode: str, other: str, seed: Any, tmp_path: Path
) -> None:
    check_exact(tmp_path, mode, other, None, seed=seed)


# ---------------------------------------------------------------------- how batches are made


@few
@pytest.mark.parametrize("other", MODES)
@pytest.mark.parametrize("accumulate", some_slow([2, 3], 3))
def test_from_within_an_accumulation_window(
    mode: str, other: str, accumulate: int, tmp_path: Path
) -> None:
    # 5 batches an epoch: the last window is a smaller one.
    check_exact(tmp_path, mode, other, accumulate, accumulate_grad_batches=accumulate)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "other", "seed"), EVERYWHERE)
def test_from_everywhere_with_accumulation(
    mode: str, other: str, seed: Any, tmp_path: Path
) -> None:
    check_exact(tmp_path, mode, other, None, accumulate_grad_batches=2, seed=seed)


@few
@pytest.mark.parametrize("accumulate", some_slow([1, 2], 2))
def test_data_of_unknown_length(mode: str, accumulate: int, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, data=Endless, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("seed", some_slow([None, 7], 7))
def test_augmentation_in_worker_processes(seed: Any, tmp_path: Path) -> None:
    whole = run("eager", data=shuffled(workers=2), seed=seed)
    saving = run("eager", data=shuffled(workers=2), seed=seed, save_to=tmp_path)
    assert_same_run(saving, whole, 0, "saving changed the run")
    assert saving.saves is not None
    chosen = [f for f in choose(saving.saves.files, 1) if "batch" in f.name or "epoch" in f.name]
    assert len(chosen) == 3
    for path in chosen:
        resumed = run("eager", data=shuffled(workers=2), seed=seed, resume_from=path)
        assert_same_run(resumed, whole, saving.saves.rows_before[path], path.name)


@pytest.mark.slow
def test_augmentation_in_another_number_of_worker_processes(tmp_path: Path) -> None:
    # What a worker draws is a function of the batch, not of the worker.
    whole = run("eager", data=shuffled(workers=1), seed=7, save_to=tmp_path)
    assert whole.saves is not None
    path = next(each for each in whole.saves.files if "003-batch" in each.name)
    resumed = run("eager", data=shuffled(workers=3), seed=7, resume_from=path)
    assert_same_run(resumed, whole, whole.saves.rows_before[path], path.name)


DATA_ARGUMENTS: Dict[str, Dict[str, Any]] = {
    "some batches": {"limit_train_batches": 3},
    "a share of the batches": {"limit_train_batches": 0.5},
    "the same batches again and again": {"overfit_batches": 2},
    "validation in between": {"val_check_interval": 2},
    "validation at a share": {"val_check_interval": 0.5, "seed": 3},
    "validation every other epoch": {"check_val_every_n_epoch": 2},
    "no sanity check": {"num_sanity_val_steps": 0},
    "logs of every step": {"log_every_n_steps": 1},
}


@few
@pytest.mark.parametrize(
    "name", some_slow(DATA_ARGUMENTS, "the same batches again and again", "validation in between")
)
def test_arguments_of_data(mode: str, name: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, **DATA_ARGUMENTS[name])


@pytest.mark.slow
def test_lists_of_batches_are_not_gone_through_again(tmp_path: Path) -> None:
    batches = [collate([Augmented(18, 0)[i] for i in range(n, n + 4)]) for n in range(0, 12, 4)]
    check_exact(tmp_path, "eager", data=lambda _: batches)


def test_batches_that_were_done_are_not_loaded_again(tmp_path: Path) -> None:
    class Counts(Augmented):
        loaded = 0

        def __getitem__(self, index: int) -> Any:
            Counts.loaded += 1
            return super().__getitem__(index)

    def data(seed: int) -> Any:
        return DataLoader(Counts(20, 0.1), batch_size=4, collate_fn=collate)

    saved = run("eager", data=data, max_epochs=1, save_to=tmp_path).saves
    assert saved is not None
    path = [each for each in saved.files if "batch" in each.name][2]
    Counts.loaded = 0
    run("eager", data=data, max_epochs=1, resume_from=path)
    assert Counts.loaded == 2 * 4  # of 5 batches, 3 were done


# ---------------------------------------------------------------------- optimizers and rates


@few
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(mode: str, algorithm: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)


def plateau(optimizer: Any) -> Any:
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.2)
    return {"scheduler": scheduler, "monitor": "val"}


def plateau_by_step(optimizer: Any) -> Any:
    scheduler = ReduceLROnPlateau(optimizer, patience=1, factor=0.5, threshold=0.2)
    return {"scheduler": scheduler, "monitor": "train_step", "interval": "step", "frequency": 2}


@few
@pytest.mark.parametrize("scheduler", some_slow([plateau, plateau_by_step], plateau))
def test_reduce_lr_on_plateau(mode: str, scheduler: Any, tmp_path: Path) -> None:
    whole = check_exact(
        tmp_path, mode, task=lambda: Net(scheduler=scheduler), max_epochs=4, log_every_n_steps=1
    )
    rates = {row[6] for row in whole.rows if row[0] == "batch"}
    assert len(rates) > 1  # it has lowered some


def by_epoch(optimizer: Any) -> Any:
    return {"scheduler": CosineAnnealingLR(optimizer, 3), "interval": "epoch"}


@few
@pytest.mark.parametrize("data", some_slow([shuffled(), Endless], Endless))
def test_a_schedule_by_epochs(mode: str, data: Any, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, task=lambda: Net(scheduler=by_epoch), data=data, max_epochs=3)


class SetsRates(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (2, 7):
            trainer.set_lr("head", 0.3 / trainer.global_step)


@few
def test_rates_that_hooks_set(mode: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, callbacks=lambda: [SetsRates()])


# ---------------------------------------------------------------------- callbacks


@few
def test_gradual_unfreezing(mode: str, tmp_path: Path) -> None:
    check_exact(
        tmp_path, mode, callbacks=lambda: [GradualUnfreezing({0: ["head"], 1: ["body"]})],
        max_epochs=3,
    )  # fmt: skip


@few
def test_averaged_weights(mode: str, tmp_path: Path) -> None:
    whole = check_exact(
        tmp_path, mode, callbacks=lambda: [EMAWeightAveraging(decay=0.8, every_n_steps=2)]
    )
    assert whole.states[0]["count"] > 0


@few
@pytest.mark.parametrize("on_train", some_slow([False, True], True))
def test_early_stopping(mode: str, on_train: bool, tmp_path: Path) -> None:
    def callbacks() -> List[Callback]:
        return [
            EarlyStopping("train_epoch" if on_train else "val", min_delta=0.3, patience=2,
                          check_on_train_epoch_end=on_train)
        ]  # fmt: skip

    whole = check_exact(tmp_path, mode, callbacks=callbacks, max_epochs=9)
    assert 1 < whole.trainer.current_epoch < 9  # it did stop, and not at once


@few
def test_layers_that_hooks_froze_or_put_into_eval_mode(mode: str, tmp_path: Path) -> None:
    class Freezes(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            if trainer.current_epoch == 1:
                task.norm.eval()
                task.body.bias.requires_grad_(False)

    check_exact(tmp_path, mode, callbacks=lambda: [Freezes()], max_epochs=3)


@pytest.mark.slow
def test_early_stopping_between_validation_and_the_end_of_the_epoch(tmp_path: Path) -> None:
    # What is logged in the epoch too is looked at once, whatever the moment of the resumption: an
    # epoch has five batches, and no more moments of any other kind.
    def callbacks() -> List[Callback]:
        return [EarlyStopping("val", min_delta=0.3, patience=3)]

    arguments = {"callbacks": callbacks, "max_epochs": 9, "val_check_interval": 2}
    whole = check_exact(tmp_path, "eager", "", 5, **arguments)
    assert 1 < whole.trainer.current_epoch < 9


class FailsOnce(Augmented):
    """Draws for a sample and fails, once, at the look that has this number."""

    def __init__(self, at: int) -> None:
        super().__init__(18, 0.1)
        self.looks, self.at = 0, at

    def __getitem__(self, index: int) -> Any:
        self.looks += 1
        sample = super().__getitem__(index)
        if self.looks == self.at:
            raise OSError("the disk is away")
        return sample


@pytest.mark.parametrize("seed", [None, 7])
def test_a_run_whose_epoch_began_without_a_batch_begins_it_again(
    mode: str, seed: Any, tmp_path: Path
) -> None:
    def fails(start: int) -> DataLoader:
        made = shuffled()(start)
        vars(made)["dataset"] = FailsOnce(19)
        return made

    class KeepsItself(Callback):
        fires_last = True

        def on_exception(self, trainer: Any, task: Any, error: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "failed.safetensors")

    whole = run(mode, seed=seed)
    with pytest.raises(Exception, match="the disk is away"):
        run(mode, data=fails, callbacks=lambda: [KeepsItself()], seed=seed)
    failed = tmp_path / "failed.safetensors"
    resumed = run(mode, resume_from=failed, seed=seed)
    assert_same_run(resumed, whole, 7, "the first batch of epoch 1")
