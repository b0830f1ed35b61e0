"""A ModelCheckpoint replaces and removes its own files of its own run, in its folder, and no other.

Copied, moved and renamed folders go on in place; paths in a checkpoint are never followed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, List

import pytest
from helpers import quiet_trainer, weights_of
from helpers.scored_runs import BATCHES, PRECIOUS, ScoredTask, fit, tree

from ofengine import CheckpointError, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.checkpoint import read, write
from ofengine.errors import OFEngineWarning


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


def test_files_that_are_gone_are_not_told_as_nan(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    fit(first, 2, [1.0, 2.0])
    shutil.copy(tmp_path / "a" / "last.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "a")
    second = ModelCheckpoint(tmp_path / "b", monitor="val")
    with pytest.warns(OFEngineWarning, match="val was NaN each time, or the files that were kept"):
        fit(second, 2, [1.0, 2.0], tmp_path / "alone.safetensors")


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


OPTIONS: List[Dict[str, Any]] = [
    {"save_last": True}, {"monitor": "val", "mode": "max", "save_last": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two runs whose files are victims, and of a stranger with each options."""
    root = tmp_path_factory.mktemp("other-runs")
    for name in ("ck", "elsewhere"):
        fit(ModelCheckpoint(root / name, "theirs"), 1)
    for number, options in enumerate(OPTIONS):
        fit(ModelCheckpoint(root / f"stranger {number}", **options), 1, [9.0])
    return root


@pytest.fixture
def victims(tmp_path: Path, other_runs: Path) -> Dict[str, Path]:
    """Files that a checkpoint may name: in the folder, beside it, and checkpoints of other runs."""
    shutil.copytree(other_runs, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "ck"
    for path in (folder / "train.py", folder / "x.safetensors", tmp_path / "y.safetensors"):
        path.write_text(PRECIOUS)
    return {
        "a script": folder / "train.py",
        "no checkpoint": folder / "x.safetensors",
        "outside": tmp_path / "y.safetensors",
        "another run's": folder / "theirs.safetensors",
        "another run's elsewhere": tmp_path / "elsewhere" / "theirs.safetensors",
    }


FORMS = ["absolute", "relative", "name"]
ENTRIES = ["to_remove", "best_model_path", "last_model_path"]


@pytest.mark.parametrize(
    ("entry", "victim", "form"),
    [
        # Every pair of them, and whatever can be said of a file in all entries at once.
        *((entry, victim, FORMS[(victim + i) % 3])
          for i, entry in enumerate(ENTRIES) for victim in range(5)),
        *(("all", victim, form) for victim in range(5) for form in FORMS),
    ],
)  # fmt: skip
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
    for number, options in enumerate(OPTIONS):
        stranger = tmp_path / f"stranger {number}"
        path = forge(stranger / "last.safetensors", folder / "resume.safetensors", **changes)
        for key in (..., ""):  # as of this version, and of an earlier one
            path = forge(path, path, **({} if key is ... else {"key": ..., "itself": ...}))
            before = tree(tmp_path)
            keep = ModelCheckpoint(folder, **options)
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
    before, task = tree(tmp_path), ScoredTask()
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
