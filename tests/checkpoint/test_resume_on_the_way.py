"""A resumed run that ends before it is where the run before was leaves that one's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ofengine import Callback, TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.checkpoint import read
from ofengine.checkpoint.snapshot import MOMENTS

BATCHES, STOPPED_AFTER = 6, 4


class Noise(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(flow.ones(1))

    def training_step(self, batch: Any) -> Any:
        return (self.scale * (batch[0] if isinstance(batch, (list, tuple)) else batch)).mean()

    def validation_step(self, batch: Any) -> None:
        self.log("val", batch.mean())

    def param_groups(self) -> Any:
        return [{"params": [self.scale], "lr": 0.125}]


def drawn() -> Any:
    return np.random.rand(2).astype("float32")


class Held(Dataset):
    """Draws from numpy's global generator for each item."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return drawn()


class Streamed(IterableDataset):
    """The same, of unknown length; breaks at an item of the first pass where it is told to."""

    def __init__(self) -> None:
        self.breaks_at: Optional[int] = None

    def __iter__(self) -> Iterator[Any]:
        for index in range(BATCHES):
            if index == self.breaks_at:
                self.breaks_at = None
                raise OSError("the disk is gone")
            yield drawn()


class Breaks:
    """A batch sampler that breaks at a batch of the first pass where it is told to."""

    def __init__(self) -> None:
        self.breaks_at: Optional[int] = None

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[List[int]]:
        for index in range(BATCHES):
            if index == self.breaks_at:
                self.breaks_at = None
                raise OSError("the disk is gone")
            yield [index]


class Stops(Callback):
    """Ends the run by Ctrl-C after some batches, or in the validation after them."""

    def __init__(self, hook: Optional[str]) -> None:
        if hook is not None:
            setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any) -> None:
        if trainer.batches_seen == STOPPED_AFTER:
            raise KeyboardInterrupt


class Losses(Callback):
    """Losses and validated values, by the batches that were seen."""

    def __init__(self) -> None:
        self.seen: Dict[Tuple[str, int], bytes] = {}

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
        self.seen["loss", trainer.batches_seen] = outputs["loss"].numpy().tobytes()

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self.seen["val", trainer.batches_seen] = np.float64(
            trainer.callback_metrics["val"]
        ).tobytes()


def fit(
    folder: Path, kind: str, hook: Optional[str] = None, breaks_at: Optional[int] = None
) -> Dict[Tuple[str, int], bytes]:
    np.random.seed(0)
    if kind == "streamed":  # a batch is read ahead, so only training draws
        breaking: Any = Streamed()
        train, validation = DataLoader(breaking, batch_size=1), [flow.ones(1, 2)]
    else:
        breaking = Breaks()
        train, validation = DataLoader(Held(), batch_sampler=breaking), DataLoader(Held())
    breaking.breaks_at = breaks_at
    losses = Losses()
    trainer = quiet_trainer(
        max_epochs=1, val_check_interval=2, seed=None, default_root_dir=folder,
        callbacks=[losses, Stops(hook), ModelCheckpoint(folder, save_last=True)],
    )  # fmt: skip
    trainer.fit(Noise(), train, validation, ckpt_path="last")
    return losses.seen


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("kind", ["streamed", "held"])
def test_what_ends_it_on_the_way_is_as_if_it_had_not_been(
    kind: str, hook: str, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", kind)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(folder, kind, hook)
    before = {each.name: each.read_bytes() for each in folder.glob("*.safetensors")}
    assert before
    for breaks_at in (0, 2, STOPPED_AFTER - 1):
        with pytest.raises(OSError, match="the disk is gone"):
            fit(folder, kind, breaks_at=breaks_at)
        assert {each.name: each.read_bytes() for each in folder.glob("*.safetensors")} == before
    rest = fit(folder, kind)
    assert rest
    assert rest == {moment: whole[moment] for moment in rest}
    assert ("val", STOPPED_AFTER) in rest


# ---------------------------------------------------------------------- half a batch


class Spoiled(Dataset):
    """Its item 9 cannot be had the first time; each may draw before."""

    def __init__(self, draws: bool) -> None:
        self.draws, self.spoiled = draws, False

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        item = drawn() if self.draws else np.full(2, index, dtype="float32")
        if index == 9 and self.spoiled:
            self.spoiled = False
            raise OSError("the disk is gone")
        return item


class Passing(IterableDataset):
    """The same, of unknown length."""

    def __init__(self, draws: bool) -> None:
        self.items = Spoiled(draws)

    def __iter__(self) -> Iterator[Any]:
        return map(self.items.__getitem__, range(len(self.items)))


@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("kind", ["held", "passing"])
def test_half_a_batch_is_told_where_making_one_draws(
    kind: str, draws: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data: Any = Spoiled(draws) if kind == "held" else Passing(draws)

    def run() -> Trainer:
        trainer = quiet_trainer(
            max_epochs=1, default_root_dir=tmp_path,
            callbacks=ModelCheckpoint(tmp_path, save_last=True),
        )  # fmt: skip
        trainer.fit(Noise(), DataLoader(data, batch_size=2), ckpt_path="last")
        return trainer

    getattr(data, "items", data).spoiled = True
    with pytest.raises(OSError, match="the disk is gone"):
        run()
    recwarn.clear()
    assert run().global_step == 6
    told = [str(each.message) for each in recwarn if "was being made" in str(each.message)]
    assert len(told) == draws


# ---------------------------------------------------------------------- nothing to do


class Rows(Dataset):
    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return np.full(2, index + 1, dtype="float32")


class Dropped(Noise):
    """A weighted loss of dropout, whose masks are drawn on the way."""

    def training_step(self, batch: Any) -> Any:
        loss = nn.functional.dropout(self.scale * batch, 0.5).square().mean()
        return {"loss": loss, "weight": batch.sum()}


class StopsWithin(Callback):
    """Ends the run in an open window of its second epoch, or lets it go on; saves at its end."""

    fires_last = True

    def __init__(self, stops: bool, path: Path) -> None:
        self.stops, self.path = stops, path

    def on_train_start(self, trainer: Any, task: Any) -> None:
        trainer.should_stop = trainer.should_stop and self.stops

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.batches_seen == BATCHES + 2:
            trainer.should_stop = self.stops

    def on_train_end(self, trainer: Any, task: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at_end", [True, False])
def test_sittings_with_nothing_to_do_lose_nothing(mode: str, at_end: bool, tmp_path: Path) -> None:
    def sitting(number: int, stops: bool, path: Optional[Path] = None) -> Path:
        files = tmp_path / f"{number}-end.safetensors", tmp_path / f"{number}-after.safetensors"
        trainer = quiet_trainer(
            mode=mode, max_epochs=2, seed=7, accumulate_grad_batches=4,
            callbacks=StopsWithin(stops, files[0]),
        )  # fmt: skip
        trainer.fit(Dropped(), DataLoader(Rows(), batch_size=1, shuffle=True), ckpt_path=path)
        trainer.save_checkpoint(files[1])
        return files[0 if at_end else 1]

    whole = read(sitting(0, stops=False)).weights["scale"].tobytes()
    cut = sitting(0, stops=True)
    again = sitting(2, True, sitting(1, True, cut))
    first, last = read(cut).state, read(again).state
    assert first is not None
    assert last is not None
    assert first["random_at_pass"]
    assert first["gradients"]
    assert first["weights"]["batches"] == 2
    for part in MOMENTS:
        np.testing.assert_equal(last[part], first[part], part)
    for number, path in ((3, cut), (4, again)):
        assert read(sitting(number, False, path)).weights["scale"].tobytes() == whole


# ---------------------------------------------------------------------- nothing left to do


class StopsAt(Callback):
    """Asks the run to end after so many batches, and again; or not to."""

    def __init__(self, batches: Optional[int]) -> None:
        self.batches = batches

    def on_fit_start(self, trainer: Any, task: Any) -> None:
        trainer.should_stop = trainer.should_stop and self.batches is not None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.batches_seen == self.batches


@pytest.mark.parametrize("limits", [{"max_steps": 4}, {"batches": 3, "accumulate_grad_batches": 4}])
def test_a_run_that_had_nothing_left_to_do_leaves_its_epoch_to_the_next(
    limits: Dict[str, Any], mode: str, tmp_path: Path
) -> None:
    rows = flow.tensor((np.arange(12, dtype="float32") ** 2).reshape(12, 1))

    def fit(path: Any = None, **limits: Any) -> Any:
        stops = StopsAt(limits.pop("batches", None))
        trainer = quiet_trainer(mode=mode, max_epochs=2, seed=1, callbacks=stops, **limits)
        task = Noise()
        trainer.fit(task, DataLoader(TensorDataset(rows), batch_size=2, shuffle=True), None, path)
        return trainer, task.scale.numpy().tobytes()

    rest = {name: each for name, each in limits.items() if name == "accumulate_grad_batches"}
    path, (whole, weights) = None, fit(**rest)
    for sitting in range(3):
        stopped, _ = fit(path, **limits)
        assert stopped.batches_seen < whole.batches_seen
        path = stopped.save_checkpoint(tmp_path / f"{sitting}.safetensors")
        assert fit(path, **rest)[1] == weights, sitting
