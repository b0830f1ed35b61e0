"""A file holds the moment of the save, whatever training does to what it was told meanwhile."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from helpers.stopping import Mean, check_stopping, run_once
from oneflow.utils.data import DataLoader, Sampler, TensorDataset

from ofengine import Callback, CheckpointError
from ofengine.callbacks import ModelCheckpoint, _checkpoint_saving
from ofengine.checkpoint import read, write
from ofengine.data.structure import copied
from ofengine.loggers import Logger

N = 12
DATA = TensorDataset(flow.arange(N, dtype=flow.float32))
MODES = ["eager", "graph"]


class Live:
    """What it keeps of the batches it has seen, and says so itself and not in a copy."""

    def __init__(self) -> None:
        self.state: Dict[str, Any] = {
            "list": [],
            "array": np.zeros(1),
            "tensor": flow.zeros(1),
            "nested": {"pair": ([], OrderedDict(value=np.zeros(1)))},
        }

    def see(self) -> None:
        self.state["list"].append(len(self.state["list"]))
        self.state["array"] += 1
        self.state["tensor"].add_(1.0)
        seen, ordered = self.state["nested"]["pair"]
        seen.append("x")
        ordered["value"] += 1

    @staticmethod
    def seen(state: Any) -> List[int]:
        """How many batches each of the things in a file has seen."""
        seen, ordered = state["nested"]["pair"]
        counted = [float(each[0]) for each in (state["array"], state["tensor"], ordered["value"])]
        return [len(state["list"]), len(seen), *map(int, counted)]


class Counts(Callback):
    def __init__(self) -> None:
        self.live = Live()

    def state_dict(self) -> Dict[str, Any]:
        return self.live.state

    def on_train_batch_start(self, *_: Any) -> None:
        self.live.see()


class Task(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.live = Live()

    def on_train_batch_start(self, *_: Any) -> None:
        self.live.see()

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint.update(self.live.state)


class Tells(Sampler):
    """Shuffles its order in place and gives it one by one; tells of it by the very list."""

    def __init__(self, kind: str = "list") -> None:
        self.order: Any = list(range(N))
        self.taken = np.zeros(1, dtype=np.int64)
        if kind == "array":
            self.order = np.arange(N)
        elif kind == "tensor":
            self.order = flow.arange(N)

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        first, *others = (int(index) for index in self.order)
        self.put([*(5 * index % N for index in others), first])
        for index in list(self.order):
            self.taken += 1
            yield int(index)

    def put(self, order: Any) -> None:
        if isinstance(self.order, flow.Tensor):
            self.order.copy_(flow.tensor(np.array(order)))
        else:
            self.order[:] = order

    def state_dict(self) -> Dict[str, Any]:
        return {"order": self.order, "taken": self.taken}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.put(np.array(state["order"]).tolist())
        self.taken[:] = state["taken"]


def loader(kind: str = "list") -> DataLoader:
    return DataLoader(DATA, batch_size=2, sampler=Tells(kind))


# ---------------------------------------------------------------------- in the background


@pytest.mark.parametrize("mode", MODES)
def test_a_file_written_in_the_background_holds_the_moment_of_the_save(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on, encode = threading.Event(), _checkpoint_saving.encode

    class GoesOn(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                gone_on.set()

    def encode_later(*content: Any) -> bytes:
        assert gone_on.wait(60)
        return encode(*content)

    monkeypatch.setattr(_checkpoint_saving, "encode", encode_later)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, in_background=True)
    trainer = quiet_trainer(mode=mode, max_steps=4, callbacks=[GoesOn(), Counts(), keep])
    trainer.fit(Task(), loader())
    by_step = {}
    for path in tmp_path.glob("*.safetensors"):
        checkpoint = read(path)
        assert checkpoint.state is not None
        by_step[int(checkpoint.metadata["global_step"])] = checkpoint.state
    assert sorted(by_step) == [2, 4]
    for step, state in by_step.items():
        (kept,) = (c["state"] for c in state["callbacks"] if "nested" in c["state"])
        assert Live.seen(kept) == [step] * 5
        assert Live.seen(state["task"]) == [step] * 5
        (told,) = (each["state"] for each in state["random"]["data"].values() if "state" in each)
        assert told["taken"] == [2 * step]


# ---------------------------------------------------------------------- samplers and datasets


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_a_sampler_that_tells_of_itself_goes_on_with_the_samples_that_are_left(
    kind: str, mode: str, tmp_path: Path
) -> None:
    check_stopping(
        tmp_path, mode, lambda: loader(kind), lambda: loader(kind), every=3, max_epochs=2
    )


@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_a_file_that_is_refused_leaves_a_sampler_as_it_was(kind: str, tmp_path: Path) -> None:
    _, saved = run_once("eager", lambda: loader(kind), save_to=tmp_path, max_epochs=2)
    path = next(path for path, _ in saved if "batch_end" in path.name)
    checkpoint = read(path)
    state: Any = checkpoint.state
    told = next(each["state"] for each in state["random"]["data"].values() if "state" in each)
    told["taken"] = np.zeros(5)  # what is put back then was written to by "order"
    write(tmp_path / "other", checkpoint.weights, state, checkpoint.metadata)
    own = loader(kind)
    before = np.array(own.sampler.order).tolist()
    with pytest.raises(CheckpointError, match=r"Tells\.load_state_dict raised"):
        run_once("eager", lambda: own, resume_from=tmp_path / "other", max_epochs=2)
    assert np.array(own.sampler.order).tolist() == before
    assert own.sampler.taken.tolist() == [0]


# ---------------------------------------------------------------------- what is copied


class Pair(NamedTuple):
    first: Any
    second: Any


def test_a_copy_has_the_kinds_of_what_it_is_of_and_shares_nothing() -> None:
    value = {
        "pair": Pair([1], (np.ones(1), "a")),
        "ordered": OrderedDict(a=flow.ones(1)),
        "counts": defaultdict(list, b=[2]),
        "set": {3},
        "deque": deque([[4]]),
    }
    of_then, made = repr(value), copied(value)
    assert [type(each) for each in made.values()] == [type(each) for each in value.values()]
    value["pair"].first.append(5)
    value["pair"].second[0][0] = 6
    value["ordered"]["a"].add_(7)
    value["counts"]["b"].append(8)
    value["set"].add(9)
    value["deque"][0].append(10)
    assert repr(made) == of_then
    assert made["counts"]["new"] == []


def test_what_holds_itself_or_can_have_no_copy_is_itself() -> None:
    itself: List[Any] = []
    itself += [itself, itself]
    assert copied(itself) is itself
    lock = threading.Lock()
    assert copied([lock])[0] is lock


# ---------------------------------------------------------------------- who was told of it


HOOKS = ["on_train_epoch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"]


class Told(Callback):
    """Keeps which hooks it was told at which step; ends the run in one of them, once."""

    def __init__(self, error: Any = None, hook: str = "", step: int = 0) -> None:
        self.rows: List[Any] = []
        for each in HOOKS:
            setattr(self, each, lambda trainer, *_, name=each: self.see(trainer, name))
        self.ends: Any = [(hook, step, error)] if error else []

    def state_dict(self) -> Dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.rows = state["rows"]

    def see(self, trainer: Any, hook: str) -> None:
        if trainer.sanity_checking:
            return
        if self.ends and self.ends[0][:2] == (hook, trainer.global_step):
            error = self.ends.pop()[2]
            if isinstance(error, KeyboardInterrupt):
                self.rows.append([hook, trainer.global_step])  # it has done its part
            raise error
        self.rows.append([hook, trainer.global_step])


class Lowers(Callback):
    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        trainer.set_lr(trainer.rates.names[0], 0.125 / (1 + trainer.current_epoch))


def told(mode: str, folder: Path, *ending: Any, path: Any = None) -> Any:
    """What all were told of a run, or of what is left of it, and the weights at its end."""
    owners = [Told(*ending), Told(), Lowers(), Told()]
    keeps = [ModelCheckpoint(folder / "a"), ModelCheckpoint(folder / "b", monitor="val")]
    made = Mean()
    trainer = quiet_trainer(mode=mode, max_epochs=3, callbacks=[*owners, *keeps])
    trainer.fit(made, DataLoader(DATA, batch_size=6), DataLoader(DATA), ckpt_path=path)
    kept = [{Path(p).name: score for p, score in each.best_k_models.items()} for each in keeps]
    return [each.rows for each in owners if isinstance(each, Told)], kept, bits(made)


@pytest.mark.filterwarnings("ignore:.*does not keep what training had made of Told")
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_who_was_not_told_for_an_error_is_told_by_the_resumed_run(
    error: BaseException, mode: str, tmp_path: Path
) -> None:
    whole = told(mode, tmp_path)
    assert [len(rows) for rows in whole[0]] == [15, 15, 15]
    for hook in HOOKS:
        folder = tmp_path / hook
        with pytest.raises(type(error)):
            told(mode, folder, error, hook, 4)
        saved = [path.name for path in folder.rglob("last.safetensors")]
        assert len(saved) == (hook != "on_train_batch_end")  # nobody could give the batch again
        assert told(mode, folder, path="last") == whole, hook


class Rows(Logger):
    """Keeps its rows; fails, once, at the row with this metric after this step."""

    def __init__(self, metric: str = "", step: int = 0) -> None:
        self.rows: List[Any] = []
        self.fails_at = [(metric, step)] if metric else []

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        if self.fails_at and self.fails_at[0][1] == step and self.fails_at[0][0] in metrics:
            self.fails_at.clear()
            raise OSError("no space left")
        self.rows.append([step, epoch, metrics])

    def state_dict(self) -> Dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        self.rows = state["rows"]


class Logs(Mean):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss


def test_a_moment_whose_row_did_not_come_to_the_loggers_is_not_saved(
    mode: str, tmp_path: Path
) -> None:
    def rows_of(folder: Path, logger: Rows, path: Any = None) -> Any:
        keep = ModelCheckpoint(folder)
        options: Dict[str, Any] = {"log_every_n_steps": 1, "logger": [Rows(), logger]}
        trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=keep, **options)
        trainer.fit(Logs(), DataLoader(DATA, batch_size=6), DataLoader(DATA), ckpt_path=path)
        return [each.rows for each in trainer.loggers], list(trainer.history)

    whole = rows_of(tmp_path, Rows())
    assert whole[0][0] == whole[0][1]
    for metric, step in [("train_step", 3), ("val", 4), ("train_epoch", 4)]:
        folder = tmp_path / metric
        with pytest.raises(OSError, match="no space left"):
            rows_of(folder, Rows(metric, step))
        assert [path.name for path in folder.rglob("*.safetensors")] == [
            "epoch=0-step=2.safetensors"
        ]
        assert rows_of(folder, Rows(), "last") == whole, metric


LOOKS: Dict[str, Dict[str, Any]] = {
    "on_train_batch_end": {"every_n_train_steps": 2, "save_top_k": -1},
    "on_validation_end": {"monitor": "val", "save_top_k": 2},
    "on_train_epoch_end": {"save_top_k": -1},
}


@pytest.mark.parametrize("hook", LOOKS)
def test_a_second_checkpoint_looks_at_the_moment_at_which_the_first_was_killed(
    hook: str, mode: str, tmp_path: Path
) -> None:
    class Kills(Callback):
        fires_last = True

    def kill(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt

    def fit(folder: Path, kills: bool = False, path: Any = None) -> Any:
        options = {**LOOKS[hook], "save_on_exception": False}
        first, second = (ModelCheckpoint(folder / name, **options) for name in "ab")
        between = Kills()
        if kills:
            setattr(between, hook, kill)
        trainer = quiet_trainer(max_epochs=3, callbacks=[first, between, second], mode=mode)
        trainer.fit(Mean(), DataLoader(DATA, batch_size=6), DataLoader(DATA), ckpt_path=path)
        state = second.state_dict()
        return {name: state[name] for name in ("best_k_models", "best_model_path", "written")}

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kills=True)
    (last,) = (tmp_path / "run" / "a").glob("*step=4.safetensors")
    assert not list((tmp_path / "run" / "b").glob("*step=4.safetensors"))
    assert fit(tmp_path / "run", path=last) == whole
