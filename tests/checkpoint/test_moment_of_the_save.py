"""A file holds the moment of the save, whatever training does to what it was told meanwhile."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from helpers.resuming import some_slow
from helpers.stopping import Mean, check_stopping, run_once
from oneflow.utils.data import DataLoader, Sampler, TensorDataset

from ofengine import Callback, CheckpointError
from ofengine.callbacks import ModelCheckpoint, _checkpoint_saving
from ofengine.checkpoint import read, write
from ofengine.data.structure import copied

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


@pytest.mark.parametrize("mode", some_slow(MODES, "eager"))
@pytest.mark.parametrize("kind", some_slow(["list", "array", "tensor"], "list"))
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
