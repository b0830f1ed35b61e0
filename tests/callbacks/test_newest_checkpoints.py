"""Without a metric the newest ``save_top_k`` files are kept, over kills and resumes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Dict, List

import pytest
from helpers import MODES, quiet_trainer
from helpers.processes import run_python
from helpers.scored_runs import BATCHES, PRECIOUS, ScoredTask, fit, tree

from ofengine.callbacks import ModelCheckpoint
from ofengine.checkpoint import metadata_of, read


def steps_in(folder: Path) -> List[int]:
    """The optimizer steps of the files in a folder, by what they say."""
    return sorted(int(metadata_of(path)["global_step"]) for path in folder.glob("*.safetensors"))


def by_step(folder: Path, k: int = 3, every: int = 1, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=k, every_n_train_steps=every, **arguments)


def train(keep: Any, steps: int, mode: str = "eager", path: Any = None) -> None:
    callbacks = keep if isinstance(keep, list) else [keep]
    trainer = quiet_trainer(mode=mode, max_steps=steps, callbacks=callbacks)
    trainer.fit(ScoredTask(None), BATCHES, ckpt_path=path)


# ---------------------------------------------------------------------- in one run


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("k", "every", "steps", "kept"),
    [(3, 2, 11, [6, 8, 10]), (2, 1, 5, [4, 5]), (4, 2, 5, [2, 4]), (1, 2, 5, [4])],
)
def test_the_newest_k_by_step(
    tmp_path: Path, mode: str, background: bool, k: int, every: int, steps: int, kept: List[int]
) -> None:
    keep = by_step(tmp_path / "ck", k, every, in_background=background)
    train(keep, steps, mode)
    assert steps_in(tmp_path / "ck") == kept
    assert keep.best_model_path == str(tmp_path / "ck" / f"step={kept[-1]}.safetensors")
    assert keep.best_model_score is None


def test_the_newest_k_by_epoch(tmp_path: Path, mode: str) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=2, every_n_epochs=2)
    fit([keep], 7, mode=mode)
    names = [f"epoch={epoch}-step={2 * epoch + 2}.safetensors" for epoch in (3, 5)]
    assert sorted(os.listdir(tmp_path)) == names
    assert keep.best_k_models == {str(tmp_path / names[0]): 8.0, str(tmp_path / names[1]): 12.0}


def test_the_last_one_is_besides_and_one_name_will_do(tmp_path: Path) -> None:
    train(ModelCheckpoint(tmp_path, "x", save_top_k=2, every_n_train_steps=1, save_last=True), 7)
    assert sorted(os.listdir(tmp_path)) == ["last.safetensors", "x-v1.safetensors", "x.safetensors"]
    assert steps_in(tmp_path) == [6, 7, 7]


def test_an_older_file_goes_only_when_the_newer_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: List[List[int]] = []
    remove = os.remove

    def watched(path: Any) -> None:
        seen.append(steps_in(tmp_path))
        remove(path)

    monkeypatch.setattr(os, "remove", watched)
    train(by_step(tmp_path, 2), 4)
    assert seen == [[1, 2, 3], [2, 3, 4]]


# ---------------------------------------------------------------------- resumed


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_keeps_what_the_whole_run_would(tmp_path: Path, mode: str, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(by_step(whole, 3, 2), 9, mode)
    train(by_step(parts, 3, 2, save_last=True), stop, mode)
    last = by_step(parts, 3, 2, save_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(last, 9, mode, "last")
    assert steps_in(whole) == [4, 6, 8]
    assert [each.name for each in sorted(parts.glob("step*"))] == sorted(os.listdir(whole))
    assert last.best_model_path == str(parts / "step=8.safetensors")
    kept = [each["state"] for each in read(last.best_model_path).state["callbacks"]]  # type: ignore[index]
    assert [each["best_k_models"] for each in kept if "best_k_models" in each] == [
        {f"step={step}.safetensors": float(step) for step in (4, 6, 8)}
    ]


def test_going_back_to_an_older_file_ends_in_the_same_files(tmp_path: Path) -> None:
    train(by_step(tmp_path, 3), 6)
    assert steps_in(tmp_path) == [4, 5, 6]
    train(by_step(tmp_path, 3), 8, path=tmp_path / "step=4.safetensors")
    assert steps_in(tmp_path) == [6, 7, 8]


KILLED = """
import os, signal, sys
import oneflow as flow
from oneflow import nn
from ofengine import TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint

folder, mode, kill = sys.argv[1:]

class Task(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

removed, remove = [], os.remove

def killing(path):
    removed.append(path)
    if len(removed) == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
    remove(path)

os.remove = killing
keep = ModelCheckpoint(folder, "{step}", save_top_k=2, every_n_train_steps=1)
trainer = Trainer(mode=mode, max_steps=6, callbacks=keep, logger=False, device="cpu",
                  enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Task(), [flow.ones(3, 2)] * 2, ckpt_path="last")
print(sorted(os.listdir(folder)))
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_between_a_save_and_a_removal(tmp_path: Path, mode: str) -> None:
    """After each of its removals: what is left is removed when the run goes on."""
    ended = run_python("-c", KILLED, tmp_path, mode, 2)
    assert ended.returncode == -9, ended.stderr
    assert steps_in(tmp_path) == [2, 3, 4]
    ended = run_python("-c", KILLED, tmp_path, mode, 3)
    assert ended.returncode == -9, ended.stderr
    assert steps_in(tmp_path) == [4, 5, 6]  # of 2 removals one was that of before
    ended = run_python("-c", KILLED, tmp_path, mode, 0)
    assert ended.returncode == 0, ended.stderr
    assert steps_in(tmp_path) == [5, 6]


# ---------------------------------------------------------------------- what others do


@pytest.mark.filterwarnings("ignore:1 of the files that a ModelCheckpoint of the run had kept")
@pytest.mark.parametrize("resumed", [True, False])
def test_a_file_that_somebody_removed_is_no_error(tmp_path: Path, resumed: bool) -> None:
    def unlink(step: int) -> None:
        (tmp_path / f"step={step}.safetensors").unlink()

    class Removes(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            if trainer.global_step == 4 and not resumed:
                unlink(3)

    keep: Dict[str, Any] = {"save_top_k": 3, "every_n_train_steps": 1}
    train(Removes(tmp_path, "{step}", **keep), 4 if resumed else 5)
    if resumed:
        unlink(3)
        train(Removes(tmp_path, "{step}", **keep), 5, path="last")
    assert steps_in(tmp_path) == ([2, 4, 5] if resumed else [4, 5])


def test_files_of_others_stay(tmp_path: Path) -> None:
    train(by_step(tmp_path, 2), 3)  # another run's
    (tmp_path / "step=1.safetensors").write_text(PRECIOUS)
    (tmp_path / "notes.txt").write_text(PRECIOUS)
    before = tree(tmp_path)
    two = [by_step(tmp_path, 2), ModelCheckpoint(tmp_path, save_top_k=2)]
    train(two, 4)
    again = [by_step(tmp_path, 2), ModelCheckpoint(tmp_path, save_top_k=2)]
    train(again, 6, path=two[0].best_model_path)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    new = [metadata_of(tmp_path / name)["global_step"] for name in sorted({*after} - {*before})]
    assert sorted(new) == ["4", "5", "6", "6"]


# ---------------------------------------------------------------------- another number than before


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (5, 2, [7, 8]),
        (2, 4, [5, 6, 7, 8]),
        (1, 2, [7, 8]),
        (3, 1, [8]),
        (-1, 2, [1, 2, 3, 4, 5, 7, 8]),  # what all were kept for stays, but for the newest
        (3, -1, [4, 5, 6, 7, 8]),
    ],
)
def test_another_number_of_files_in_a_resumed_run(
    tmp_path: Path, before: int, now: int, kept: List[int]
) -> None:
    train(by_step(tmp_path, before), 6)
    keep = by_step(tmp_path, now)
    train(keep, 8, path="last")
    assert steps_in(tmp_path) == kept
    assert keep.best_model_path == str(tmp_path / "step=8.safetensors")
