"""A ModelCheckpoint replaces and removes its own files of its own run, in its folder, and no other.

Copied, moved and renamed folders go on in place; paths in a checkpoint are never followed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import oneflow as flow
import pytest
from helpers import Scored, quiet_trainer, weights_of

from ofengine import Callback, CheckpointError, ConfigurationError, TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.callbacks._checkpoint_files import CheckpointFiles
from ofengine.checkpoint import metadata_of, read, write
from ofengine.errors import OFEngineWarning

BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""


class Task(Scored):
    """Logs ``scores[epoch]`` as ``val`` and its negative as ``neg`` at each validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.scores is not None:
            self.log("val", self.scores[self.current_epoch])
            self.log("neg", -self.scores[self.current_epoch])


def fit(
    callbacks: Any,
    epochs: int = 3,
    scores: Optional[Sequence[float]] = None,
    path: Any = None,
    **arguments: Any,
) -> Trainer:
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=callbacks, num_sanity_val_steps=0, **arguments
    )
    trainer.fit(Task(scores), BATCHES, None if scores is None else BATCHES, ckpt_path=path)
    return trainer


def tree(folder: Path) -> Dict[str, bytes]:
    """The content of each file below ``folder``, by its name from there."""
    files = [each for each in folder.rglob("*") if each.is_file() and not each.is_symlink()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}


def states_of(path: Path) -> List[Dict[str, Any]]:
    state = read(path).state
    assert state is not None
    kept = [each["state"] for each in state["callbacks"]]
    return [each for each in kept if "best_model_path" in each]


def forge(path: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint in which ModelCheckpoint's state has these entries."""
    checkpoint = read(path)
    assert checkpoint.state is not None
    for each in checkpoint.state["callbacks"]:
        if "best_model_path" in each["state"]:
            each["state"].update(changes)
            each["state"] = {k: v for k, v in each["state"].items() if v is not ...}
    metadata = {k: v for k, v in checkpoint.metadata.items() if k in ("run", "sitting", "callback")}
    return write(to, checkpoint.weights, checkpoint.state, metadata)


# ---------------------------------------------------------------------- copied and moved folders


@pytest.mark.parametrize("how", ["last", "path"])
@pytest.mark.parametrize("logger", [True, False])
@pytest.mark.parametrize("own_folder", [True, False])
def test_a_copied_run_leaves_the_original_as_it_is(
    tmp_path: Path, how: str, logger: bool, own_folder: bool
) -> None:
    def run(root: Path, epochs: int, path: Any = None) -> ModelCheckpoint:
        folder = root / "ck" if own_folder else None
        keep = ModelCheckpoint(folder, monitor="val", save_top_k=2, save_last=True)
        scores = [3.0, 2.0, 4.0, 1.0]
        fit(keep, epochs, scores, path, logger=logger, default_root_dir=root, log_every_n_steps=1)
        return keep

    first = run(tmp_path / "a", 3)
    before = tree(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    last = Path(str(first.last_model_path).replace(str(tmp_path / "a"), str(tmp_path / "b")))
    second = run(tmp_path / "b", 4, how if how == "last" else last)
    assert tree(tmp_path / "a") == before
    if how == "last":
        # As if it had never stopped, in the copy: epochs 1 and 3 are best.
        names = {f"epoch={epoch}-step={2 * epoch + 2}.safetensors" for epoch in (1, 3)}
        kept = {Path(path).name for path in second.best_k_models}
        assert kept == names
        assert {Path(path).name for path in (tmp_path / "b").rglob("epoch*")} == names
    assert second.best_model_score == 1.0
    assert all(tmp_path / "b" in Path(path).parents for path in second.best_k_models)


def test_a_moved_and_renamed_run_folder_goes_on_in_place(tmp_path: Path) -> None:
    def run(root: Path, epochs: int, path: Any = None) -> Trainer:
        keep = ModelCheckpoint(monitor="val", save_last=True, restore_best=True)
        return fit(
            keep, epochs, [1.0, 2.0, 3.0, 4.0], path, logger=True, default_root_dir=root,
            log_every_n_steps=1,
        )  # fmt: skip

    best = weights_of(run(tmp_path / "a", 1).task)["layer.weight"]
    shutil.rmtree(tmp_path / "a")
    run(tmp_path / "a", 2)
    (tmp_path / "a" / "ofengine_logs" / "version_0").rename(tmp_path / "a/ofengine_logs/my run")
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = run(tmp_path / "b", 3, "last")
    keep = trainer.callbacks[-1]
    folder = tmp_path / "b" / "ofengine_logs" / "my run"
    assert trainer.log_dir == str(folder)
    assert not (tmp_path / "a").exists()
    assert sorted(os.listdir(tmp_path / "b" / "ofengine_logs")) == ["my run"]
    assert sorted(os.listdir(folder)) == ["checkpoints", "metrics.csv"]
    names = ["epoch=0-step=2.safetensors", "last.safetensors"]
    assert sorted(os.listdir(folder / "checkpoints")) == names
    assert keep.best_model_path == str(folder / "checkpoints" / names[0])
    assert weights_of(trainer.task)["layer.weight"].shape == best.shape
    saved = read(keep.best_model_path).weights["layer.weight"]
    assert weights_of(trainer.task)["layer.weight"].tobytes() == saved.tobytes()
    steps = [line.split(",")[1] for line in (folder / "metrics.csv").read_text().splitlines()]
    assert list(dict.fromkeys(steps[1:])) == [str(step) for step in range(1, 7)]


def test_a_checkpoint_that_was_renamed_is_still_the_best_one(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "a", monitor="val")
    fit(keep, 1, [1.0])
    path = Path(keep.best_model_path).rename(tmp_path / "a" / "start.safetensors")
    again = ModelCheckpoint(tmp_path / "a", monitor="val", restore_best=True)
    fit(again, 2, [1.0, 2.0], path)
    assert again.best_model_path == str(path)
    assert os.listdir(tmp_path / "a") == ["start.safetensors"]
    fit(ModelCheckpoint(tmp_path / "a", monitor="val"), 2, [1.0, 0.5], path)
    # What the user has named is the user's: a copy to go on from, perhaps.
    assert sorted(os.listdir(tmp_path / "a")) == ["epoch=1-step=4.safetensors", path.name]


def test_best_files_beside_the_checkpoint_are_read_and_never_removed(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    fit(first, 2, [1.0, 2.0])
    before = tree(tmp_path / "a")
    second = ModelCheckpoint(tmp_path / "b", monitor="val", restore_best=True, save_last=True)
    trainer = fit(second, 3, [1.0, 2.0, 3.0], tmp_path / "a" / "last.safetensors")
    assert second.best_model_path == str(tmp_path / "a" / "epoch=0-step=2.safetensors")
    best = read(second.best_model_path).weights["layer.weight"]
    assert weights_of(trainer.task)["layer.weight"].tobytes() == best.tobytes()
    # And once more, from a folder in which the best file never was.
    third = ModelCheckpoint(tmp_path / "c", monitor="val")
    fit(third, 4, [1.0, 2.0, 3.0, 0.5], tmp_path / "b" / "last.safetensors")
    assert third.best_model_path == str(tmp_path / "c" / "epoch=3-step=8.safetensors")
    assert tree(tmp_path / "a") == before
    assert sorted(os.listdir(tmp_path / "b")) == ["last.safetensors"]


def test_a_best_file_that_is_nowhere_is_told_and_a_worse_one_is_kept(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    fit(first, 2, [1.0, 2.0])
    shutil.copy(tmp_path / "a" / "last.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "a")
    second = ModelCheckpoint(tmp_path / "b", monitor="val", restore_best=True)
    with pytest.warns(OFEngineWarning, match=r"1 of the files .* neither in .*b nor beside .*"
                      r"'epoch=0-step=2.safetensors'"):  # fmt: skip
        fit(second, 3, [1.0, 2.0, 3.0], tmp_path / "alone.safetensors")
    assert second.best_model_path == str(tmp_path / "b" / "epoch=2-step=6.safetensors")
    assert second.best_model_score == 3.0


def test_the_checkpoint_s_own_name_counts_in_any_folder(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "a", monitor="val")
    fit(first, 1, [1.0])
    shutil.copy(first.best_model_path, tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "a")
    second = ModelCheckpoint(tmp_path / "b", monitor="val", restore_best=True)
    fit(second, 2, [1.0, 2.0], tmp_path / "alone.safetensors")
    assert second.best_model_path == str(tmp_path / "alone.safetensors")
    assert not (tmp_path / "b").exists()


def test_of_another_run_in_the_folder_nothing_is_taken_for_the_best(tmp_path: Path) -> None:
    other = ModelCheckpoint(tmp_path, "best", monitor="val")
    fit(other, 1, [1.0])
    own = ModelCheckpoint(tmp_path, "best", monitor="val", save_last=True)
    fit(own, 1, [5.0])
    assert own.best_model_path == str(tmp_path / "best-v1.safetensors")
    os.remove(own.best_model_path)
    state = states_of(tmp_path / "last.safetensors")[0]
    assert state["best_model_path"] == "best-v1.safetensors"
    path = forge(
        tmp_path / "last.safetensors", tmp_path / "x.safetensors",
        best_model_path="best.safetensors", best_k_models={"best.safetensors": 5.0},
    )  # fmt: skip
    again = ModelCheckpoint(tmp_path, "best", monitor="val", restore_best=True)
    with pytest.warns(OFEngineWarning, match="1 of the files"):
        fit(again, 2, [1.0, 7.0], path)
    assert again.best_model_path == str(tmp_path / "best-v1.safetensors")


def test_a_run_that_was_killed_goes_on_as_if_files_of_later_had_not_been(tmp_path: Path) -> None:
    def keep() -> List[ModelCheckpoint]:
        return [
            ModelCheckpoint(tmp_path / "steps", every_n_train_steps=2, save_top_k=-1),
            ModelCheckpoint(tmp_path / "best", monitor="val", save_top_k=2),
        ]

    scores = [3.0, 2.5, 4.0, 2.0, 1.0]
    fit(keep(), 5, scores)
    expected = {name: set(os.listdir(tmp_path / name)) for name in ("steps", "best")}
    # Killed after epoch 4, of which nothing was left but the files of the best.
    for epoch in (2, 3, 4):
        os.remove(tmp_path / "steps" / f"epoch={epoch}-step={2 * epoch + 2}.safetensors")
    callbacks = keep()
    fit(callbacks, 5, scores, tmp_path / "steps" / "epoch=1-step=4.safetensors")
    assert {name: set(os.listdir(tmp_path / name)) for name in expected} == expected
    assert callbacks[1].best_model_score == 1.0


# ---------------------------------------------------------------------- checkpoints of strangers

PRECIOUS = "precious"


@pytest.fixture
def victims(tmp_path: Path) -> Dict[str, Path]:
    """Files that a checkpoint may name: in the folder, beside it, and checkpoints of other runs."""
    folder = tmp_path / "ck"
    fit(ModelCheckpoint(folder, "theirs"), 1)
    fit(ModelCheckpoint(tmp_path / "elsewhere", "theirs"), 1)
    for path in (folder / "train.py", folder / "x.safetensors", tmp_path / "y.safetensors"):
        path.write_text(PRECIOUS)
    return {
        "a script": folder / "train.py",
        "no checkpoint": folder / "x.safetensors",
        "outside": tmp_path / "y.safetensors",
        "another run's": folder / "theirs.safetensors",
        "another run's elsewhere": tmp_path / "elsewhere" / "theirs.safetensors",
    }


@pytest.mark.parametrize("form", ["absolute", "relative", "name"])
@pytest.mark.parametrize("victim", range(5))
@pytest.mark.parametrize("entry", ["to_remove", "best_model_path", "last_model_path", "all"])
def test_a_checkpoint_has_no_file_removed_or_replaced(
    tmp_path: Path, victims: Dict[str, Path], entry: str, victim: int, form: str
) -> None:
    folder, target = tmp_path / "ck", list(victims.values())[victim]
    forms = {
        "absolute": str(target),
        "relative": os.path.relpath(target, folder),
        "name": target.name,
    }
    named = forms[form]
    changes: Dict[str, Any] = {entry: named}
    if entry == "all":
        singles = ("to_remove", "best_model_path", "last_model_path", "itself")
        changes = {**dict.fromkeys(singles, named), "written": [named]}
        changes["best_k_models"] = {named: 9.0}
    for options in ({"save_last": True}, {"monitor": "val", "mode": "max", "save_last": True}):
        stranger = tmp_path / f"stranger of {len(options)}"
        fit(ModelCheckpoint(stranger, **options), 1, [9.0])  # type: ignore[arg-type]
        path = forge(stranger / "last.safetensors", folder / "resume.safetensors", **changes)
        for key in (..., ""):  # as of this version, and of an earlier one
            path = forge(path, path, **({} if key is ... else {"key": ..., "itself": ...}))
            before = tree(tmp_path)
            keep = ModelCheckpoint(folder, **options)  # type: ignore[arg-type]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of files that are not there
                fit(keep, 2, [9.5, 10.0], path)
            after = tree(tmp_path)
            assert {name: after.get(name) for name in before} == before


def test_a_file_of_the_run_that_was_to_be_removed_goes(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(keep, 2)
    first, second = sorted(tmp_path.iterdir())
    forge(second, second, to_remove=first.name, written=[second.name])
    fit(ModelCheckpoint(tmp_path, save_top_k=-1), 3, path="last")
    assert sorted(os.listdir(tmp_path)) == [
        "epoch=1-step=4.safetensors", "epoch=2-step=6.safetensors",
    ]  # fmt: skip


def test_what_was_to_be_removed_stays_where_its_successor_is_not(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "a", save_top_k=-1)
    fit(keep, 2)
    first, second = sorted((tmp_path / "a").iterdir())
    path = forge(second, tmp_path / "b.safetensors", to_remove=first.name, written=[second.name])
    second.unlink()
    fit(ModelCheckpoint(tmp_path / "a", save_top_k=-1), 2, path=path)
    assert first.exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("best_model_path", None), ("best_model_path", ["x"]), ("best_model_path", "a\0b"),
        ("best_model_score", "x"), ("best_k_models", []), ("best_k_models", {"a": "x"}),
        ("best_k_models", {"a\0": 1.0}), ("last_model_path", 3), ("looked_at", 0.5),
        ("looked_at", True), ("written", "x"), ("written", [1]), ("to_remove", None),
        ("validated", 1), ("key", 5), ("itself", None), ("written", ...),
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_refused_before_anything_changes(
    tmp_path: Path, entry: str, value: Any
) -> None:
    fit(ModelCheckpoint(tmp_path), 1)
    path = forge(next(tmp_path.iterdir()), tmp_path / "x.safetensors", **{entry: value})
    before, task = tree(tmp_path), Task()
    weights = weights_of(task)
    with pytest.raises(CheckpointError) as error:
        quiet_trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path)).fit(
            task, BATCHES, ckpt_path=path
        )
    assert "ModelCheckpoint" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert tree(tmp_path) == before
    assert all((weights_of(task)[name] == array).all() for name, array in weights.items())


def test_names_that_lead_anywhere_are_looked_for_and_lead_nowhere(tmp_path: Path) -> None:
    names = ["..", "/", "///", "../..", ".", "x", "/etc/passwd", "a" * 5_000, "\n", "a/" * 3_000]
    fit(ModelCheckpoint(tmp_path / "ck", monitor="val"), 1, [1.0])
    path = forge(
        next((tmp_path / "ck").iterdir()), tmp_path / "x.safetensors", written=names,
        best_k_models=dict.fromkeys(names, 1.0), best_model_path="..", itself="",
    )  # fmt: skip
    before = tree(tmp_path)
    with pytest.warns(OFEngineWarning, match="of the files") as warned:
        fit(ModelCheckpoint(tmp_path / "other", monitor="val"), 2, [1.0, 2.0], path)
    assert all(len(str(each.message)) < 6_000 for each in warned)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before


# ---------------------------------------------------------------------- earlier versions


def as_before(path: Path, folder: Path) -> Path:
    """The checkpoint as an earlier version wrote it: absolute paths, no key, no writer."""
    checkpoint = read(path)
    assert checkpoint.state is not None
    for each in checkpoint.state["callbacks"]:
        state = each["state"]
        if "best_model_path" in state:
            for name in ("best_model_path", "last_model_path", "to_remove"):
                state[name] = state[name] and str(folder / state[name])
            state["written"] = [str(folder / name) for name in state["written"]]
            kept = state["best_k_models"].items()
            state["best_k_models"] = {str(folder / name): score for name, score in kept}
            del state["key"], state["itself"]
    return write(path, checkpoint.weights, checkpoint.state, {"run": checkpoint.metadata["run"]})


@pytest.mark.parametrize("moved", [True, False])
def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, moved: bool) -> None:
    def keep(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, monitor="val", save_top_k=2, save_last=True)

    scores = [3.0, 2.0, 4.0, 1.0]
    fit(keep(tmp_path / "a"), 3, scores)
    for path in (tmp_path / "a").iterdir():
        as_before(path, tmp_path / "a")
    folder = tmp_path / "a"
    if moved:
        folder = folder.rename(tmp_path / "b")
    callback = keep(folder)
    fit(callback, 4, scores, "last")
    assert sorted(os.listdir(folder)) == [
        "epoch=1-step=4.safetensors", "epoch=3-step=8.safetensors", "last.safetensors",
    ]  # fmt: skip
    assert list(callback.best_k_models.values()) == [2.0, 1.0]
    assert callback.best_model_path == str(folder / "epoch=3-step=8.safetensors")


# ---------------------------------------------------------------------- several in one folder


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("filename", [None, "best", "{epoch}"])
@pytest.mark.parametrize("resumed", [True, False])
def test_two_callbacks_in_one_folder_keep_each_its_own(
    tmp_path: Path, filename: Optional[str], background: bool, resumed: bool
) -> None:
    def two() -> List[ModelCheckpoint]:
        return [
            ModelCheckpoint(
                tmp_path / "ck", filename, monitor=name, save_last=True, in_background=background
            )
            for name in ("val", "neg")
        ]

    scores = [1.0, 2.0, 3.0, 4.0]  # val is best in epoch 0, neg in epoch 3
    callbacks = two()
    if resumed:
        fit(callbacks, 2, scores)
        callbacks = two()
    fit(callbacks, 4, scores, "last" if resumed else None)
    assert [metadata_of(each.best_model_path)["epoch"] for each in callbacks] == ["0", "3"]
    assert [metadata_of(each.last_model_path)["global_step"] for each in callbacks] == ["8", "8"]
    kept = {path for each in callbacks for path in (each.best_model_path, each.last_model_path)}
    assert len(kept) == 4
    assert kept == {str(path) for path in (tmp_path / "ck").iterdir()}


def test_many_callbacks_of_all_kinds_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ck"

    def all_kinds() -> List[ModelCheckpoint]:
        return [
            ModelCheckpoint(folder, "x", save_top_k=-1),
            ModelCheckpoint(folder, "x", monitor="val", save_top_k=2),
            ModelCheckpoint(folder, "x", every_n_train_steps=1),
            ModelCheckpoint(folder, "x", monitor="neg", save_top_k=-1, save_last=True),
            ModelCheckpoint(folder, "x", save_top_k=0, save_last=True),
        ]

    scores = [2.0, 1.0, 3.0, 0.0]
    once = all_kinds()
    fit(once, 4, scores)

    def found(callbacks: List[ModelCheckpoint]) -> List[Any]:
        kept = [
            [each.best_model_path, each.last_model_path, *each.best_k_models] for each in callbacks
        ]
        return [
            sorted({int(metadata_of(path)["global_step"]) for path in paths if path})
            for paths in kept
        ]

    # All of callback 0 (its newest is told), the two best, the newest, all, the last.
    expected = [[8], [4, 8], [8], [2, 4, 6, 8], [8]]
    assert found(once) == expected
    assert len(os.listdir(folder)) == 4 + 2 + 1 + 4 + 1 + 1
    shutil.rmtree(folder)
    fit(all_kinds(), 2, scores)
    again = all_kinds()
    fit(again, 4, scores, "last")
    assert found(again) == expected
    assert len(os.listdir(folder)) == 4 + 2 + 1 + 4 + 1 + 1


class Meanwhile(Callback):
    """Puts a file where the next checkpoint goes, while that is being written."""

    fires_last = True

    def __init__(self, patch: pytest.MonkeyPatch, path: Path) -> None:
        fsync = os.fsync

        def then_put(descriptor: int) -> None:
            if not path.exists():
                path.write_text(PRECIOUS)
            fsync(descriptor)

        patch.setattr(os, "fsync", then_put)


@pytest.mark.parametrize("background", [True, False])
def test_a_file_that_appears_while_one_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    (tmp_path / "ck").mkdir()
    theirs = tmp_path / "ck" / "epoch=0-step=2.safetensors"
    Meanwhile(monkeypatch, theirs)
    keep = ModelCheckpoint(tmp_path / "ck", monitor="val", save_top_k=2, in_background=background)
    fit(keep, 2, [1.0, 2.0])
    assert theirs.read_text() == PRECIOUS
    own = theirs.with_name("epoch=0-step=2-v1.safetensors")
    assert keep.best_model_path == str(own)
    assert list(keep.best_k_models) == [str(own), str(tmp_path / "ck/epoch=1-step=4.safetensors")]
    monkeypatch.undo()
    again = ModelCheckpoint(tmp_path / "ck", monitor="val", save_top_k=2)
    fit(again, 3, [1.0, 2.0, 0.5], own)  # it calls itself by the name that it has
    assert list(again.best_k_models.values()) == [1.0, 0.5]
    assert theirs.read_text() == PRECIOUS


def test_two_trainers_at_the_same_time_in_one_folder(tmp_path: Path) -> None:
    """One trains in the middle of the other, with all names the same."""
    kept = [ModelCheckpoint(tmp_path, "x", monitor="val", save_last=True) for _ in range(2)]

    class Between(Callback):
        def on_validation_end(self, trainer: Any, task: TaskModule) -> None:
            if trainer.current_epoch == 1:
                fit(kept[1], 4, [1.0, 2.0, 3.0, 4.0])

    fit([Between(), kept[0]], 4, [4.0, 3.0, 2.0, 1.0])
    assert [metadata_of(each.best_model_path)["epoch"] for each in kept] == ["3", "0"]
    runs = [metadata_of(each.best_model_path)["run"] for each in kept]
    assert [metadata_of(each.last_model_path)["run"] for each in kept] == runs
    assert len(os.listdir(tmp_path)) == 4


# ---------------------------------------------------------------------- links


def test_a_sub_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "best").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"best is a link that leads out of .*ck\. Give"):
        fit(ModelCheckpoint(tmp_path / "ck", "best/{epoch}", save_on_exception=False), 1)
    assert os.listdir(tmp_path / "other") == []


def test_a_copy_with_links_to_the_original_leaves_it_as_it_is(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path / "a", "best/{epoch}"), 2)
    before = tree(tmp_path / "a")
    (tmp_path / "b" / "best").mkdir(parents=True)
    for path in (tmp_path / "a" / "best").iterdir():
        (tmp_path / "b" / "best" / path.name).symlink_to(path)
    fit(ModelCheckpoint(tmp_path / "b", "best/{epoch}"), 3, path="last")
    assert tree(tmp_path / "a") == before
    assert (tmp_path / "b" / "best" / "epoch=2.safetensors").is_file()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "ck").symlink_to("large disk")
    fit(ModelCheckpoint(tmp_path / "ck", "best/{epoch}"), 2)
    keep = ModelCheckpoint(tmp_path / "ck", "best/{epoch}")
    fit(keep, 3, path="last")
    assert tree(tmp_path / "large disk").keys() == {"best/epoch=2.safetensors"}
    assert keep.best_model_path == str(tmp_path / "ck" / "best" / "epoch=2.safetensors")


def test_a_folder_named_by_a_roundabout_way_goes_on_in_place(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    fit(ModelCheckpoint(tmp_path / "x" / ".." / "ck", monitor="val"), 2, [2.0, 1.0])
    path = tmp_path / "ck" / "epoch=1-step=4.safetensors"
    keep = ModelCheckpoint(tmp_path / "x" / ".." / "ck", monitor="val")
    fit(keep, 3, [2.0, 1.0, 0.5], path)
    assert os.listdir(tmp_path / "ck") == ["epoch=2-step=6.safetensors"]


def test_only_regular_files_are_a_callback_s_own(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "ck")
    fit(keep, 1)
    files = CheckpointFiles(tmp_path / "ck", keep.state_dict()["key"], "")
    files.run_id = metadata_of(keep.best_model_path)["run"]
    path = Path(keep.best_model_path)
    assert files.is_own(path)
    (tmp_path / "ck" / "link.safetensors").symlink_to(path.name)
    shutil.copy(path, tmp_path / "outside.safetensors")
    shutil.copy(path, tmp_path / "ck" / "other.ending")
    (tmp_path / "ck" / "folder.safetensors").mkdir()
    for name in ("link.safetensors", "../outside.safetensors", "other.ending", "none.safetensors",
                 "folder.safetensors", "a\0.safetensors"):  # fmt: skip
        assert not files.is_own(tmp_path / "ck" / name), name
    assert not CheckpointFiles(tmp_path / "ck", "another", files.run_id).is_own(path)
    assert not CheckpointFiles(tmp_path / "ck", files.key, "another").is_own(path)


# ---------------------------------------------------------------------- sub-folders and names


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("best/{epoch}", "best/epoch=2.safetensors"),
        ("{epoch}/{step}", "epoch=2/step=6.safetensors"),
        ("a/b/{epoch}-{val:.1f}", "a/b/epoch=2-val=1.0.safetensors"),
        ("val={val:.2f}/x", "val=val=1.00/x.safetensors"),
        ("[a]*/{epoch}", "[a]*/epoch=2.safetensors"),
    ],
)
def test_sub_folders_work_as_the_folder_does(tmp_path: Path, filename: str, name: str) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename, monitor="val")

    fit(keep(), 2, [3.0, 2.0])
    assert len(tree(tmp_path)) == 1
    begun = []

    class Begins(Callback):
        def on_train_start(self, trainer: Any, task: TaskModule) -> None:
            begun.append(trainer.global_step)

    (leftover,) = [Path(tmp_path, each).parent for each in tree(tmp_path)]
    (leftover / ".last.safetensors.1.tmp").write_text("")
    last = keep()
    fit([Begins(), last], 3, [3.0, 2.0, 1.0], "last")
    assert begun == [4]
    assert {each for each in tree(tmp_path) if "tmp" not in each} == {name}
    assert last.best_model_path == str(tmp_path / name)


def test_half_written_files_in_sub_folders_are_removed(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, "best/{epoch}"), 1)
    leftover = tmp_path / "best" / f".x.safetensors.{2**22 + 1}.tmp"
    other = tmp_path / "other" / leftover.name
    other.parent.mkdir()
    for path in (leftover, other):
        path.write_text("")
        os.utime(path, (1e9, 1e9))
    fit(ModelCheckpoint(tmp_path, "best/{epoch}"), 1)
    assert not leftover.exists()
    assert other.exists()


WRONG_NAMES = [
    ("../x", "leads out of dirpath"), ("a/../x", "leads out of dirpath"), ("..", None),
    ("/x", "is absolute"), ("//x", "is absolute"), ("a//b", "leads out"), ("a/", "to no file"),
    ("./x", "leads out"), ("a\0b", "has a NUL character"), ("{epoch}\0", "has a NUL character"),
    ("x" * 250, "has a name of"), ("x" * 240 + "/{epoch}", None), ("x" * 256 + "/a", "has a name"),
    ("{loss:.300f}", "has a name of"), ("{epoch:/>3}", "leads out"), ("ü" * 125, "has a name of"),
    ("/".join("ab" for _ in range(1500)), "has 45"), (5, "give a text"), (Path("x"), "give a text"),
]  # fmt: skip


@pytest.mark.parametrize(("filename", "reason"), WRONG_NAMES)
def test_names_that_are_none_are_refused_at_once(filename: Any, reason: Optional[str]) -> None:
    if reason is None:
        ModelCheckpoint(filename=filename)
        return
    with pytest.raises(ConfigurationError) as error:
        ModelCheckpoint(filename=filename)
    text = str(error.value)
    assert "ModelCheckpoint(filename=" in text
    assert reason in text
    assert text.isprintable()
    assert len(text) < 400


@pytest.mark.parametrize("dirpath", ["a\0b", "x" * 256, 5, "\ud800"])
def test_a_folder_that_can_be_none_is_refused_at_once(dirpath: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"ModelCheckpoint\(dirpath="):
        ModelCheckpoint(dirpath)


def test_a_default_folder_that_can_be_none_is_refused_before_training(tmp_path: Path) -> None:
    for root in ("a\0b", str(tmp_path / ("x" * 300))):
        with pytest.raises(ConfigurationError, match="ModelCheckpoint cannot write to its folder"):
            fit(ModelCheckpoint(), 1, default_root_dir=root)


def test_the_longest_name_still_gets_a_number(tmp_path: Path) -> None:
    name = "x" * (255 - len(".safetensors") - len("-v9999"))
    (tmp_path / f"{name}.safetensors").write_text(PRECIOUS)
    keep = ModelCheckpoint(tmp_path, name)
    fit(keep, 1)
    assert keep.best_model_path == str(tmp_path / f"{name}-v1.safetensors")


def test_a_subclass_may_keep_more(tmp_path: Path) -> None:
    class Counting(ModelCheckpoint):
        saved = 0

        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            self.saved += 1
            super().on_train_epoch_end(trainer, task)

        def state_dict(self) -> Dict[str, Any]:
            return {**super().state_dict(), "saved": self.saved}

        def load_state_dict(self, state: Dict[str, Any]) -> None:
            super().load_state_dict(state)
            self.saved = state["saved"]

    fit(Counting(tmp_path), 2)
    again = Counting(tmp_path)
    fit(again, 3, path="last")
    assert again.saved == 3
    assert os.listdir(tmp_path) == ["epoch=2-step=6.safetensors"]
