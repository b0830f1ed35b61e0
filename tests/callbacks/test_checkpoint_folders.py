"""Several ModelCheckpoints in one folder, links, sub-folders and names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from helpers.scored_runs import PRECIOUS, fit, tree

from ofengine import Callback, CheckpointError, ConfigurationError, TaskModule
from ofengine.callbacks import ModelCheckpoint
from ofengine.callbacks._checkpoint_files import CheckpointFiles
from ofengine.checkpoint import metadata_of

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


@pytest.mark.parametrize("value", ["link", 1, [True]])
def test_a_save_last_that_is_no_flag_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"ModelCheckpoint\(save_last"):
        ModelCheckpoint(save_last=value)
    assert not ModelCheckpoint(save_last=None).save_last  # type: ignore[arg-type]  Lightning's
