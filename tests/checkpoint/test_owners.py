"""The states of callbacks and loggers go by what these are, not by where they are listed."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import oneflow as flow
import pytest
from helpers import quiet_trainer
from helpers.tiny import Tiny, tiny_batches
from oneflow import nn

from ofengine import Callback, OFEngineWarning, TaskModule
from ofengine.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from ofengine.checkpoint import read, write
from ofengine.loggers import CSVLogger, Logger


class Task(TaskModule):
    """Logs two metrics, the same in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("low", [0.5, 0.4, 0.9, 0.8][self.trainer.current_epoch])
        self.log("high", [10.0, 20.0, 5.0, 6.0][self.trainer.current_epoch])


DATA = [flow.ones(1)] * 2


def fit(epochs: int, callbacks: Sequence[Any], folder: Path, **arguments: Any) -> str:
    """Train, from ``folder / "saved"`` where it is there; what was warned of."""
    path = folder / "saved.safetensors"
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Task(), DATA, DATA[:1], ckpt_path=path if path.exists() else None)
    trainer.save_checkpoint(path)
    return " ".join(str(each.message) for each in told if each.category is OFEngineWarning)


class Named(Callback):
    """Keeps its own name as its state."""

    def __init__(self, name: str, size: int = 1, tags: Sequence[str] = ()) -> None:
        self.name, self.size, self.tags = name, size, tags
        self.got: Optional[str] = None

    def state_dict(self) -> Dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.got = state["name"]


class Keyed(Named):
    @property
    def state_key(self) -> str:
        return f"Keyed {self.name}"


class Lost(Named):
    """Another class, with a state of its own."""


@pytest.mark.parametrize("kind", [Named, Keyed])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("ab", "ab"), ("ab", "ba"), ("ab", "b"), ("ab", "a"), ("a", "ab"), ("a", "ba"),
        ("abc", "cab"), ("abc", "ca"), ("abc", "xbz"),
    ],
)  # fmt: skip
def test_each_gets_its_own(kind: Any, before: str, now: str, tmp_path: Path) -> None:
    fit(1, [kind(name) for name in before], tmp_path)
    listed = [kind(name) for name in now]
    said = fit(2, listed, tmp_path)
    for each in listed:
        if each.name in before:
            assert each.got == each.name
    if kind is Keyed:
        assert all(each.got is None for each in listed if each.name not in before)
        for name in set(before) - set(now):
            assert f"a state of Keyed {name}, and no such callback is listed now" in said


@pytest.mark.parametrize("names", [["low", "high"], ["high", "low"], ["high"], ["low"]])
def test_early_stoppings_by_their_metric(names: List[str], tmp_path: Path) -> None:
    modes, best = {"low": "min", "high": "max"}, {"low": 0.4, "high": 20.0}
    fit(2, [EarlyStopping(each, mode=modes[each]) for each in modes], tmp_path)
    listed = [EarlyStopping(each, mode=modes[each]) for each in names]
    said = fit(3, listed, tmp_path)
    assert [each.best_score for each in listed] == [best[each] for each in names]
    for each in set(modes) - set(names):
        assert f"EarlyStopping(monitor={each!r}, mode={modes[each]!r})" in said


def test_another_patience_changes_nothing_of_whose_it_is(tmp_path: Path) -> None:
    fit(2, [EarlyStopping("low", patience=2)], tmp_path)
    other = EarlyStopping("low", patience=7, min_delta=0.01)
    assert fit(3, [other], tmp_path) == ""
    assert other.best_score == 0.4


def test_of_one_metric_the_arguments_tell_them_apart(tmp_path: Path) -> None:
    fit(3, [EarlyStopping("low", min_delta=0.3), EarlyStopping("low", patience=9)], tmp_path)
    listed = [EarlyStopping("low", patience=9), EarlyStopping("low", min_delta=0.3)]
    assert fit(4, listed, tmp_path) == ""
    assert [each.wait_count for each in listed] == [2, 3]


def test_where_nothing_tells_them_apart_it_is_said(tmp_path: Path) -> None:
    fit(1, [Named("a"), Named("b")], tmp_path)
    said = fit(2, [Named("x")], tmp_path)
    assert "several states of Named, none of them with the arguments of now (name='x')" in said
    assert "state_key" in said


def test_the_one_most_like_it_is_taken(tmp_path: Path) -> None:
    fit(1, [Named("a", 1, ["p"]), Named("b", 2, ["q"])], tmp_path)
    listed = [Named("b", 2, ["p"]), Named("a", 1, ["r"])]
    fit(2, listed, tmp_path)
    assert [each.got for each in listed] == ["b", "a"]


def test_identical_ones_go_by_their_order(tmp_path: Path) -> None:
    made = itertools.count(1)

    class Numbered(Named):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.number: int = next(made)

        def state_dict(self) -> Dict[str, Any]:
            return {"name": str(self.number)}

    fit(1, [Numbered("a"), Numbered("a")], tmp_path)
    listed = [Numbered("a"), Numbered("a")]
    fit(2, listed, tmp_path)
    assert [each.got for each in listed] == ["1", "2"]


def test_model_checkpoints_of_a_moved_folder_are_still_told_apart(tmp_path: Path) -> None:
    def both(root: Path, order: int) -> List[ModelCheckpoint]:
        listed = [ModelCheckpoint(root / name, save_last=True) for name in ("one", "two")]
        return listed[::order]

    (tmp_path / "here").mkdir()
    fit(1, both(tmp_path / "here", 1), tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    listed = both(tmp_path / "there", -1)
    fit(2, listed, tmp_path / "there")
    for each in listed:
        assert each.dirpath is not None
        assert Path(each.best_model_path).parent == each.dirpath


def test_files_of_earlier_versions_go_by_class_and_order(tmp_path: Path) -> None:
    fit(1, [Named("a"), Lost("c"), Named("b")], tmp_path)
    found = read(tmp_path / "saved.safetensors")
    assert found.state is not None
    for each in found.state["callbacks"]:
        del each["key"], each["arguments"]
    for key in ("logger_keys", "tensors", "optimizers", "seen", "order"):
        del found.state[key]
    for key in ("validation", "callbacks"):
        del found.state["random"][key]
    write(tmp_path / "saved.safetensors", found.weights, found.state)
    listed = [Named("x"), Named("y")]
    said = fit(2, listed, tmp_path)
    assert [each.got for each in listed] == ["a", "b"]
    assert "a state of Lost, and no such callback is listed now" in said


def test_a_file_of_the_first_days_is_resumed_with_other_callbacks(mode: str) -> None:
    path = Path(__file__).parent / "files" / "checkpoint_v2.safetensors"
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[EMAWeightAveraging(0.5)])
    trainer.fit(Tiny(), tiny_batches(), ckpt_path=path)
    assert trainer.global_step == 6


# ---------------------------------------------------------------------- loggers


class Memory(Logger):
    """Keeps its own name as its state."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.got: Optional[str] = None

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        pass

    def state_dict(self) -> Dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        self.got = state["name"]


class OtherMemory(Memory):
    pass


def test_loggers_by_their_class_and_two_of_one_class_by_their_arguments(tmp_path: Path) -> None:
    csv = CSVLogger(tmp_path / "logs")
    fit(1, [], tmp_path, logger=[Memory("a"), csv, OtherMemory("b"), Memory("c")])
    listed = [Memory("c"), OtherMemory("b"), Memory("a"), Memory("d")]
    said = fit(2, [], tmp_path, logger=[*listed, CSVLogger(tmp_path / "logs")])
    assert [each.got for each in listed] == ["c", "b", "a", None]
    assert said == ""


def test_the_state_of_a_logger_that_is_gone_is_told(tmp_path: Path) -> None:
    fit(1, [], tmp_path, logger=[Memory("a"), OtherMemory("b")])
    left = OtherMemory("b")
    said = fit(2, [], tmp_path, logger=[left])
    assert "a state of Memory, and there is none now: it is lost" in said
    assert left.got == "b"
