"""A state under a right checksum, with anything in it changed: all of it is taken, or nothing."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple, Type

import attrs
import numpy as np
import oneflow as flow
import pytest
from helpers import bits, fill_deterministically, quiet_trainer
from helpers.mutations import mutated
from helpers.resuming import plain
from oneflow import nn
from oneflow.optim import Optimizer
from oneflow.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, OFEngineError, TaskModule
from ofengine.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    TerminateOnNaN,
)
from ofengine.checkpoint import Checkpoint, read, write
from ofengine.data.generators import global_states, states_in
from ofengine.loggers import CSVLogger

DATA = TensorDataset(flow.arange(14, dtype=flow.float32).reshape(7, 2))


class Rich(TaskModule):
    """Something of everything that a checkpoint keeps."""

    def __init__(self, plateau: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.register_buffer("aside", flow.zeros(2), persistent=False)
        self.own = np.random.default_rng(3)
        self.plateau = plateau
        self.noted: List[int] = []
        self.optimizer_of_run = flow.optim.Adam(self.param_groups())
        self.second = flow.optim.SGD([self.head.bias], lr=0.1, momentum=0.5)
        fill_deterministically(self, 5, 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.head(self.drop(self.norm(self.body(batch[0]))))
        loss = (out**2).mean() + self.aside.sum()
        self.log("loss_of_step", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.body(batch[0]).mean())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.aside.add_(0.25)
        self.own.random()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.noted.append(batch_idx)
        self.head.bias.grad = flow.ones(1)
        self.second.step()
        self.head.bias.grad = None

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"name": "body", "params": [*self.body.parameters(), *self.norm.parameters()],
             "lr": 0.1, "lr_scale": 0.5, "lr_decay_scale": 0.9},
            {"name": "head", "params": [self.head.weight], "lr": 0.05},
        ]  # fmt: skip

    def configure_optimizers(self) -> Any:
        self.head.bias.requires_grad_(False)
        made = self.optimizer_of_run
        if self.plateau:
            scheduler = ReduceLROnPlateau(made, patience=0, factor=0.5)
            return {
                "optimizer": made,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "val", "interval": "epoch"},
            }
        return {"optimizer": made, "lr_scheduler": CosineAnnealingLR(made, 40)}

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["noted"] = {"batches": self.noted, "first": self.noted[0]}

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.noted = [int(each) for each in checkpoint["noted"]["batches"]]
        self.noted[0] = checkpoint["noted"]["first"] * 1


class Pair(Rich):
    """The same with two optimizers, one of which steps in every second batch."""

    def __init__(self, plateau: bool) -> None:
        super().__init__(plateau)
        body, head = self.param_groups()
        self.optimizer_of_run = flow.optim.Adam([body])
        self.second_of_run = flow.optim.SGD([head], momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int, name: str) -> Any:  # type: ignore[override]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        return {"body": made, "head": {"optimizer": self.second_of_run, "every_n_batches": 2}}


class Careless(Callback):
    """Loads its state as a user might write it, piece by piece."""

    def __init__(self) -> None:
        self.count, self.table = 0, {"a": [1.0]}

    def state_dict(self) -> Dict[str, Any]:
        return {"count": self.count, "table": {"b": [2.0, 3.0]}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.table["a"].append(4.0)
        self.count = state["count"] + 1
        self.table["a"][0] = state["table"]["b"][1] / 2

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.count += 1


class SavesAt(Callback):
    """Saves in one hook, at one step."""

    fires_last = True

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.batches_seen == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


@attrs.frozen
class Setting:
    """One way to train :class:`Rich`, and where it was saved."""

    folder: Path
    mode: str
    plateau: bool
    accumulate: int
    seed: Any
    kind: Type[Rich] = Rich

    def make(self, epochs: int, *also: Callback) -> Any:
        """(trainer, task, callbacks, training data, validation data)."""
        callbacks = [
            EarlyStopping("val", patience=50), EMAWeightAveraging(0.9), TerminateOnNaN(50),
            ModelCheckpoint(self.folder / "kept", monitor="val", save_on_exception=False),
            Careless(), *also,
        ]  # fmt: skip
        trainer = quiet_trainer(
            mode=self.mode, max_epochs=epochs, callbacks=callbacks, seed=self.seed,
            logger=CSVLogger(self.folder / "logs"), accumulate_grad_batches=self.accumulate,
            num_sanity_val_steps=0, log_every_n_steps=1, gradient_clip_val=1.0, eval_mode="eager",
        )  # fmt: skip
        generator = flow.Generator("cpu")
        generator.manual_seed(2)
        train = DataLoader(DATA, batch_size=2, shuffle=True, generator=generator)
        validation = DataLoader(DATA, batch_size=4, shuffle=True, generator=generator)
        return trainer, self.kind(self.plateau), callbacks, train, validation

    def saved(self, hook: str, step: int) -> Checkpoint:
        """A checkpoint of the run in ``hook`` after so many batches."""
        path = self.folder / "saved.safetensors"
        trainer, task, _, train, validation = self.make(2, SavesAt(hook, step, path))
        trainer.fit(task, train, validation)
        return read(path)


def everything(task: Rich, callbacks: List[Any], train: Any, validation: Any) -> Dict[str, str]:
    """All that a refused checkpoint must leave alone."""
    files = callbacks[3]
    drawn = [global_states(), states_in(task, None), states_in(None, train)]
    drawn.append(states_in(None, validation))
    return {
        "weights": repr(bits(task)),
        "tensors": repr(task.aside.numpy()),
        "task": repr(task.noted),
        "optimizers": repr([plain(each.state_dict()["state"])
                            for each in vars(task).values() if isinstance(each, Optimizer)]),
        "rates": repr([group["lr"] for group in task.second.param_groups]),
        "callbacks": repr([plain(each.state_dict()) for each in callbacks if each is not files]),
        "files": repr([files.best_model_path, files.best_k_models, files.last_model_path]),
        "their attributes": repr(callbacks[4].table),
        "generators": repr(plain(drawn)),
    }  # fmt: skip


class Trial:
    """Resumes from one changed state after the other, and counts what comes of it."""

    def __init__(self, setting: Setting, original: Checkpoint) -> None:
        self.setting, self.original = setting, original
        self.taken = 0
        self.refused = 0
        self.wrong: List[str] = []

    def run(self, numbers: range) -> None:
        """Try these changes."""
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for number in numbers:
                    self._try(number)
        finally:
            logging.disable(logging.NOTSET)

    def _try(self, number: int) -> None:
        assert self.original.state is not None
        state, words = mutated(self.original.state, number)
        try:
            path = write(self.setting.folder / "changed", self.original.weights, state)
        except OFEngineError:
            return  # no file can hold that
        trainer, task, callbacks, train, validation = self.setting.make(2)
        for each in callbacks:
            each.setup(trainer, task, "validate")
        random.seed(number)
        np.random.seed(number)
        flow.manual_seed(number)
        before = everything(task, callbacks, train, validation)
        try:
            trainer.fit(task, train, validation, ckpt_path=path)
        except OFEngineError as error:
            self.refused += 1
            text = str(error)
            after = everything(task, callbacks, train, validation)
            changed = [part for part in before if before[part] != after[part]]
            if changed:
                self.wrong.append(f"{', '.join(changed)} changed, {words}: {text}")
            elif "\n" in text or not text.endswith((".", ")")):
                self.wrong.append(f"no sentence, {words}: {text!r}")
        except BaseException as error:
            self.wrong.append(f"{type(error).__name__}, {words}: {error!r:.300}")
        else:
            self.taken += 1


MOMENTS: Dict[str, Tuple[Any, ...]] = {
    "in a window": ("on_train_batch_end", 5, False, 2, None),
    "validating": ("on_validation_batch_end", 4, True, 1, 3),
    "at the end of an epoch": ("on_train_epoch_end", 4, True, 1, None),
    "at the end": ("on_train_end", 8, False, 1, 3),
    "of several optimizers": ("on_train_batch_end", 7, True, 1, 3, Pair),
}


def trial(name: str, mode: str, folder: Path) -> Trial:
    hook, step, *given = MOMENTS[name]
    setting = Setting(folder, mode, *given)
    return Trial(setting, setting.saved(hook, step))


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Iterator[None]:
    state: Any = np.random.get_state()
    yield
    np.random.set_state(state)


def test_a_change_of_the_state_is_refused_whole_or_taken_whole(tmp_path: Path) -> None:
    tried = trial("in a window", "eager", tmp_path)
    tried.run(range(40))
    assert not tried.wrong, "\n".join(tried.wrong[:10])
    assert tried.refused > 20
    assert tried.taken > 1  # some changes are as good as what was there


@pytest.mark.slow
def test_in_graph_mode(tmp_path: Path) -> None:
    tried = trial("in a window", "graph", tmp_path)
    tried.run(range(900_000, 900_020))
    assert not tried.wrong, "\n".join(tried.wrong[:10])


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_more_changes_at_each_moment(name: str, tmp_path: Path) -> None:
    tried = trial(name, "eager", tmp_path)
    start = 100_000 * list(MOMENTS).index(name) + 10_000
    tried.run(range(start, start + 150))
    assert not tried.wrong, "\n".join(tried.wrong[:30])
