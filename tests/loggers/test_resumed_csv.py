"""CSVLogger in a resumed run: its own file goes on wherever it is now, and no other is touched."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

import oneflow as flow
import pytest
from helpers import Scored, quiet_trainer

from ofengine import CheckpointError, ConfigurationError
from ofengine.callbacks import ModelCheckpoint
from ofengine.checkpoint import read, write
from ofengine.errors import OFEngineWarning
from ofengine.loggers import CSVLogger, Logger

BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""


def fit(
    root: Path,
    epochs: int,
    path: Any = None,
    logger: Any = None,
    dirpath: Optional[Path] = None,
    **arguments: Any,
) -> Any:
    trainer = quiet_trainer(
        max_epochs=epochs,
        logger=CSVLogger(root, flush_logs_every_n_steps=1) if logger is None else logger,
        callbacks=ModelCheckpoint(dirpath, save_top_k=-1),
        log_every_n_steps=1,
        default_root_dir=root,
        **arguments,
    )
    trainer.fit(Scored(), BATCHES, ckpt_path=path)
    return trainer


def steps_in(path: Path) -> List[int]:
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def logs(root: Path) -> Dict[str, List[int]]:
    """The steps in each metrics.csv below ``root``."""
    found = root.rglob("metrics.csv")
    return {str(path.parent.relative_to(root)): steps_in(path) for path in found}


def tree(folder: Path) -> Dict[str, bytes]:
    files = [each for each in folder.rglob("*") if each.is_file()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}


def newest(root: Path) -> Path:
    return max(root.rglob("*.safetensors"), key=lambda path: int(path.stem.split("=")[-1]))


def forge(path: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint in which the logger's state has these entries; ... takes one out."""
    checkpoint = read(path)
    assert checkpoint.state is not None
    (state,) = checkpoint.state["loggers"]
    state.update(changes)
    for key in [key for key, value in state.items() if value is ...]:
        del state[key]
    return write(to, checkpoint.weights, checkpoint.state, {"run": checkpoint.metadata["run"]})


LOG = "ofengine_logs/version_0"

# ---------------------------------------------------------------------- in place


def test_a_run_goes_on_in_its_file(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    fit(tmp_path, 3, "last")
    assert logs(tmp_path) == {LOG: [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("name", ["version_7", "my run", "version_0"])
def test_a_folder_that_was_copied_or_renamed_goes_on_in_place(tmp_path: Path, name: str) -> None:
    fit(tmp_path / "a", 2)
    before = tree(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / LOG).rename(tmp_path / "b" / "ofengine_logs" / name)
    fit(tmp_path / "b", 3, "last")
    assert logs(tmp_path / "b") == {f"ofengine_logs/{name}": [1, 2, 3, 4, 5, 6]}
    assert tree(tmp_path / "a") == before


def test_checkpoints_in_a_folder_of_their_own_know_the_log_by_its_rows(tmp_path: Path) -> None:
    fit(tmp_path, 2, dirpath=tmp_path / "ck")
    fit(tmp_path, 3, "last", dirpath=tmp_path / "ck")
    assert logs(tmp_path) == {LOG: [1, 2, 3, 4, 5, 6]}


def test_rows_after_the_checkpoint_come_again(tmp_path: Path) -> None:
    fit(tmp_path, 4, dirpath=tmp_path / "ck")
    for epoch in (2, 3):
        os.remove(tmp_path / "ck" / f"epoch={epoch}-step={2 * epoch + 2}.safetensors")
    fit(tmp_path, 4, "last", dirpath=tmp_path / "ck")
    assert logs(tmp_path) == {LOG: list(range(1, 9))}


@pytest.mark.parametrize("flush", [1, 3, 100])
@pytest.mark.parametrize("lost", range(1, 9))
def test_from_any_step_with_any_part_in_the_file(tmp_path: Path, flush: int, lost: int) -> None:
    """Killed at step 8, with the checkpoints to step ``8 - lost``."""

    def run(epochs: int, path: Any) -> None:
        trainer = quiet_trainer(
            max_epochs=epochs, log_every_n_steps=1, default_root_dir=tmp_path,
            logger=CSVLogger(tmp_path, flush_logs_every_n_steps=flush),
            callbacks=ModelCheckpoint(
                tmp_path / "ck", "{step}", every_n_train_steps=1, save_top_k=-1
            ),
        )  # fmt: skip
        trainer.fit(Scored(), BATCHES, ckpt_path=path)

    run(4, None)
    whole = (tmp_path / LOG / "metrics.csv").read_text().splitlines()
    for step in range(9 - lost, 9):
        os.remove(tmp_path / "ck" / f"step={step}.safetensors")
    run(4, "last")
    found = logs(tmp_path)
    if lost >= 7:  # no checkpoint is left, or one that is older than all rows: another log
        assert found == {LOG: list(range(1, 9)), "ofengine_logs/version_1": list(range(1, 9))}
    else:
        assert found == {LOG: list(range(1, 9))}
        # Up to the checkpoint the numbers are the very same.
        again = (tmp_path / LOG / "metrics.csv").read_text().splitlines()
        assert again[: 9 - lost] == whole[: 9 - lost]


def test_a_column_that_came_later_is_no_other_run_s(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, 1, 0)
    logger.log_metrics({"loss": 0.25}, 2, 0)
    logger.save()
    state = logger.state_dict()
    logger.log_metrics({"val,\n": 0.125}, 3, 0)
    logger.save()
    resumed = CSVLogger(tmp_path)
    resumed.load_state_dict(state, continue_files=True)
    resumed.log_metrics({"loss": 7.0}, 3, 0)
    resumed.save()
    text = Path(logger.path).read_text()
    assert text == "epoch,step,loss\n0,1,0.5\n0,2,0.25\n0,3,7.0\n"
    assert resumed.state_dict()["digest"] != state["digest"]


def test_a_last_row_that_has_grown_is_no_other_run_s(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, 1, 0)
    state = logger.state_dict()  # before anything was written
    logger.log_metrics({"acc": 0.25}, 1, 0)
    logger.log_metrics({"loss": 0.125}, 2, 0)
    logger.save()
    resumed = CSVLogger(tmp_path)
    resumed.load_state_dict(state, continue_files=True)
    resumed.log_metrics({"acc": 0.75}, 1, 0)
    resumed.save()
    assert Path(logger.path).read_text() == "epoch,step,loss,acc\n0,1,0.5,0.75\n"
    assert resumed.log_dir == logger.log_dir


def test_by_a_path_a_new_file_begins_with_the_rows_before(tmp_path: Path) -> None:
    fit(tmp_path / "a", 3)
    before = tree(tmp_path / "a")
    path = tmp_path / "a" / LOG / "checkpoints" / "epoch=1-step=4.safetensors"
    fit(tmp_path / "b", 3, path)  # in another folder: the rows are beside the checkpoint
    assert logs(tmp_path / "b") == {LOG: [1, 2, 3, 4, 5, 6]}
    assert tree(tmp_path / "a") == before
    fit(tmp_path / "a", 3, path)
    assert logs(tmp_path / "a")["ofengine_logs/version_1"] == [1, 2, 3, 4, 5, 6]


def test_rows_that_are_nowhere_are_told(tmp_path: Path) -> None:
    fit(tmp_path / "a", 2, dirpath=tmp_path / "ck")
    shutil.rmtree(tmp_path / "a")
    with pytest.warns(OFEngineWarning, match="the 3 rows that the run had logged before are in no"):
        fit(tmp_path / "b", 3, "last", dirpath=tmp_path / "ck")
    assert logs(tmp_path / "b") == {LOG: [4, 5, 6]}


def test_a_log_that_was_removed_begins_anew_in_its_folder(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    os.remove(tmp_path / LOG / "metrics.csv")
    with pytest.warns(OFEngineWarning, match="3 rows"):
        fit(tmp_path, 3, "last")
    assert logs(tmp_path) == {LOG: [4, 5, 6]}


def test_a_version_by_name_goes_on(tmp_path: Path) -> None:
    def logger() -> CSVLogger:
        return CSVLogger(tmp_path, version="mine", flush_logs_every_n_steps=1)

    fit(tmp_path, 2, logger=logger())
    fit(tmp_path, 3, "last", logger=logger())
    assert logs(tmp_path) == {"ofengine_logs/mine": [1, 2, 3, 4, 5, 6]}


# ---------------------------------------------------------------------- others' files

CSV = "epoch,step,loss\n0,1,0.5\n0,2,0.25\n0,3,7.0\n0,4,8.0\n0,5,9.0\n"


def victim(folder: Path, text: str = CSV) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder / "metrics.csv"


@pytest.mark.parametrize("how", ["last", "path"])
@pytest.mark.parametrize("rows", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("named", ["absolute", "relative", "name", "up"])
def test_a_checkpoint_leads_to_no_other_file(
    tmp_path: Path, named: str, rows: int, how: str
) -> None:
    fit(tmp_path / "stranger", 2)
    own = tmp_path / "own"
    files = [victim(own / "ofengine_logs" / "version_0"), victim(tmp_path / "other" / "version_0")]
    files.append(victim(own / "ofengine_logs" / "precious"))
    target = files[1].parent
    names = {
        "absolute": str(target), "relative": os.path.relpath(target, own / "ofengine_logs"),
        "name": "precious", "up": "..",
    }  # fmt: skip
    (own / "ck").mkdir()
    path = forge(
        newest(tmp_path / "stranger"), own / "ck" / "x=4.safetensors", folder=names[named],
        written_rows=rows, columns=["loss"],
    )  # fmt: skip
    told = pytest.warns(OFEngineWarning, match="rows that the run had logged")
    with told if rows else contextlib.nullcontext():
        fit(own, 3, path if how == "path" else "last", dirpath=own / "ck")
    assert all(each.read_text() == CSV for each in files)
    written = own / "ofengine_logs" / "version_1" / "metrics.csv"
    assert not {"0.25", "7.0", "8.0", "9.0"} & set(
        written.read_text().replace("\n", ",").split(",")
    )


def test_a_checkpoint_of_an_earlier_version_is_believed_beside_its_file_only(
    tmp_path: Path,
) -> None:
    fit(tmp_path, 2)
    checkpoint = newest(tmp_path)
    forge(checkpoint, checkpoint, folder=str(tmp_path / "gone" / "version_0"), digest=...)
    fit(tmp_path, 3, "last")
    assert logs(tmp_path) == {LOG: [1, 2, 3, 4, 5, 6]}
    # Elsewhere, and nothing of it follows in the file: it may be any.
    own = tmp_path / "own"
    file = victim(own / "ofengine_logs" / "version_0")
    (own / "ck").mkdir()
    forge(
        checkpoint, own / "ck" / "x=4.safetensors", folder="version_0", digest=..., rows=[],
        written_rows=5, columns=["loss"],
    )  # fmt: skip
    with pytest.warns(OFEngineWarning, match="5 rows"):
        fit(own, 3, "last", dirpath=own / "ck")
    assert file.read_text() == CSV


def test_a_checkpoint_of_an_earlier_version_knows_what_follows(tmp_path: Path) -> None:
    """Killed after more was written than the checkpoint knows of, as is the rule."""
    fit(tmp_path, 3, dirpath=tmp_path / "ck")
    path = tmp_path / "ck" / "epoch=1-step=4.safetensors"
    os.remove(tmp_path / "ck" / "epoch=2-step=6.safetensors")
    forge(path, path, folder=str(tmp_path / LOG), digest=...)
    fit(tmp_path, 3, "last", dirpath=tmp_path / "ck")
    assert logs(tmp_path) == {LOG: [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(
    "text",
    [
        "", "epoch,step\n", "epoch,step,acc\n0,1,0.5\n0,2,0.5\n0,3,0.5\n", "\0" * 100, "\xff",
        '"' + "x" * 200_000, "epoch,step,loss\n" + "0,1,0.5\n" * 3,
    ],
)  # fmt: skip
def test_files_of_any_content_are_no_log_of_this_run(tmp_path: Path, text: str) -> None:
    fit(tmp_path, 2, dirpath=tmp_path / "ck")
    (tmp_path / LOG / "metrics.csv").write_text(text)
    with pytest.warns(OFEngineWarning, match="3 rows"):
        fit(tmp_path, 3, "last", dirpath=tmp_path / "ck")
    assert (tmp_path / LOG / "metrics.csv").read_text() == text
    assert steps_in(tmp_path / "ofengine_logs" / "version_1" / "metrics.csv") == [4, 5, 6]


def test_a_version_of_another_run_is_refused(tmp_path: Path) -> None:
    def logger(root: Path) -> CSVLogger:
        return CSVLogger(root, version=3, flush_logs_every_n_steps=1)

    fit(tmp_path / "a", 2, logger=logger(tmp_path / "a"))
    fit(tmp_path / "b", 2, logger=logger(tmp_path / "b"), dirpath=tmp_path / "ck")
    before = tree(tmp_path / "a")
    with pytest.warns(OFEngineWarning, match="3 rows"):  # noqa: SIM117
        with pytest.raises(ConfigurationError, match=r"version=3\).*from another run"):
            fit(tmp_path / "a", 3, "last", logger(tmp_path / "a"), tmp_path / "ck")
    assert tree(tmp_path / "a") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"folder": 5}, {"folder": ...}, {"folder": None}, {"columns": "loss"}, {"columns": [1]},
        {"columns": ["a", "a"]}, {"written_rows": -1}, {"written_rows": True},
        {"written_rows": 1e300}, {"rows": 5}, {"rows": [[1, 2]]}, {"rows": [[0, 1, {"x": 1.0}]]},
        {"rows": [[0, 1, {"loss": "x"}]]}, {"rows": [["0", 1, {}]]}, {"rows": [[0, 1, []]]},
        {"next_flush": None}, {"digest": 5}, {"rows": {"a": 1}},
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(tmp_path: Path, changes: Dict[str, Any]) -> None:
    fit(tmp_path, 2)
    path = forge(newest(tmp_path), tmp_path / "x.safetensors", **changes)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as error:
        fit(tmp_path, 3, path)
    assert "CSVLogger" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert {name: each for name, each in tree(tmp_path).items() if name in before} == before


# ---------------------------------------------------------------------- links and races


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    logger = CSVLogger(tmp_path)
    folder = Path(logger.log_dir)
    (folder / f".metrics.csv.{os.getpid()}.tmp").symlink_to(tmp_path / "target")
    (folder / "metrics.csv").symlink_to(tmp_path / "target")
    logger.log_metrics({"loss": 1.0}, 1, 0)
    with pytest.warns(OFEngineWarning, match="cannot write to"):
        logger.save()
    os.remove(folder / "metrics.csv")
    logger.save()
    assert steps_in(folder / "metrics.csv") == [1]
    os.rename(folder / "metrics.csv", folder / "moved.csv")
    (folder / "metrics.csv").symlink_to("moved.csv")
    logger.log_metrics({"loss": 2.0}, 2, 0)
    logger.save()
    assert steps_in(folder / "moved.csv") == [1]
    assert (tmp_path / "target").read_text() == "precious"


def test_a_version_that_is_a_link_to_nowhere_is_another_run_s(tmp_path: Path) -> None:
    (tmp_path / "ofengine_logs" / "mine").mkdir(parents=True)
    (tmp_path / "ofengine_logs" / "mine" / "metrics.csv").symlink_to(tmp_path / "not there")
    with pytest.raises(ConfigurationError, match="from another run"):
        _ = CSVLogger(tmp_path, version="mine").log_dir


def test_of_two_that_take_one_version_the_second_overwrites_nothing(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path, version="x"), CSVLogger(tmp_path, version="x")
    assert first.log_dir == second.log_dir
    for number, logger in enumerate((first, second)):
        logger.log_metrics({"loss": float(number)}, 1, 0)
    first.save()
    with pytest.warns(OFEngineWarning, match="cannot write to .*: File exists"):
        second.save()
    assert Path(first.path).read_text() == "epoch,step,loss\n0,1,0.0\n"


def test_half_written_files_are_removed_where_the_run_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    leftover = tmp_path / LOG / f".metrics.csv.{2**22 + 1}.tmp"
    leftover.write_text("")
    os.utime(leftover, (1e9, 1e9))
    fit(tmp_path, 3, "last")
    assert sorted(os.listdir(tmp_path / LOG)) == ["checkpoints", "metrics.csv"]


@pytest.mark.parametrize("argument", ["save_dir", "name", "version"])
def test_paths_that_are_none_are_refused_at_once(tmp_path: Path, argument: str) -> None:
    for path in ("a\0b", "x" * 300, "\ud800"):
        arguments: Dict[str, Any] = {"save_dir": tmp_path, argument: path}
        with pytest.raises(ConfigurationError, match=rf"CSVLogger\({argument}=\.\.\.\): the path"):
            CSVLogger(**arguments)


def test_a_logger_is_told_which_checkpoint_it_goes_on_from(tmp_path: Path) -> None:
    seen: List[Any] = []

    class Own(Logger):
        def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
            """Keep nothing."""

        def state_dict(self) -> Dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
            seen.append((self.resumed_from, continue_files, state))

    fit(tmp_path, 2, logger=Own(), dirpath=tmp_path / "ck")
    path = tmp_path / "ck" / "epoch=1-step=4.safetensors"
    trainer = fit(tmp_path, 3, "last", Own(), tmp_path / "ck")
    assert trainer.resumed_from == path
    fit(tmp_path, 3, path, Own(), tmp_path / "ck")
    assert seen == [(path, True, {"n": 1}), (path, False, {"n": 1})]
    assert fit(tmp_path, 1, None, Own(), tmp_path / "ck").resumed_from is None


# ---------------------------------------------------------------------- killed before it wrote


def resumed_logger(root: Path, state: Dict[str, Any]) -> CSVLogger:
    """The logger of a run resumed from a checkpoint beside the log that keeps ``state``."""
    logger = CSVLogger(root)
    logger.resumed_from = root / LOG / "checkpoints" / "x.safetensors"
    logger.load_state_dict(state, continue_files=True)
    return logger


def rows_in(root: Path) -> List[Dict[str, str]]:
    (path,) = root.rglob("metrics.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_a_run_killed_before_it_wrote_finds_its_rows_again(
    tmp_path: Path, branched: bool, seen: bool
) -> None:
    first = CSVLogger(tmp_path)
    for step in (1, 2):
        first.log_metrics({"loss": step / 10}, step, 0)
    if seen:  # a column that the file has already
        first.log_metrics({"val": 2.5}, 2, 0)
    first.save()
    saved = first.state_dict()
    first.log_metrics({"loss": 0.3}, 3, 1)
    first.finalize("failed")  # stopped in the validation that follows
    again = resumed_logger(tmp_path, saved)
    again.log_metrics({"loss": 0.75 if branched else 0.3}, 3, 1)
    again.log_metrics({"val": 0.5}, 3, 1)
    later = again.state_dict()  # and killed
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        last = resumed_logger(tmp_path, later)
    last.log_metrics({"loss": 0.4}, 4, 1)
    last.finalize("success")
    rows = rows_in(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["0.1", "0.2", "0.75" if branched else "0.3", "0.4"]
    assert [row["val"] for row in rows] == ["", "2.5" if seen else "", "0.5", ""]
    reread = resumed_logger(tmp_path, last.state_dict())
    assert reread.log_dir == last.log_dir
