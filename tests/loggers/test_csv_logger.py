"""CSVLogger: every metric of a run is in the file, exactly, whatever happens on the way."""

from __future__ import annotations

import csv
import math
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule
from ofengine.errors import OFEngineWarning
from ofengine.loggers import CSVLogger


def lines_of(logger: CSVLogger) -> List[str]:
    return Path(logger.path).read_text().splitlines()


def rows_of(path: str) -> List[Dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_columns_come_in_order_of_first_appearance(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "acc": 0.25}, step=10, epoch=0)
    logger.log_metrics({"val_loss": 2.0}, step=20, epoch=1)
    logger.save()
    assert lines_of(logger) == [
        "epoch,step,loss,acc,val_loss",
        "0,10,0.5,0.25,",
        "1,20,,,2.0",
    ]


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=10, epoch=0)
    logger.log_metrics({"lr/all": 0.125}, step=10, epoch=0)
    logger.log_metrics({"loss": 0.25}, step=20, epoch=0)
    logger.save()
    assert lines_of(logger) == ["epoch,step,loss,lr/all", "0,10,0.5,0.125", "0,20,0.25,"]


def test_a_value_never_replaces_another_one(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=10, epoch=0)
    logger.log_metrics({"loss": 0.25, "acc": 1.0}, step=10, epoch=0)
    logger.save()
    assert lines_of(logger) == ["epoch,step,loss,acc", "0,10,0.5,", "0,10,0.25,1.0"]


def test_a_metric_that_comes_later_loses_no_earlier_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(1, 6):
        logger.log_metrics({"loss": step / 4}, step, 0)
        logger.save()
    logger.log_metrics({'val, the "odd" one': 3.0}, 5, 0)
    logger.save()
    assert lines_of(logger) == [
        'epoch,step,loss,"val, the ""odd"" one"',
        "0,1,0.25,",
        "0,2,0.5,",
        "0,3,0.75,",
        "0,4,1.0,",
        "0,5,1.25,",
        "0,5,,3.0",
    ]
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


def test_the_file_is_only_rewritten_for_a_new_column(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.save()
    first = os.stat(logger.path).st_ino
    logger.log_metrics({"loss": 2.0}, 2, 0)
    logger.save()
    assert os.stat(logger.path).st_ino == first
    logger.log_metrics({"acc": 2.0}, 3, 0)
    logger.save()
    assert os.stat(logger.path).st_ino != first


def test_rows_are_written_every_so_many_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    for step in range(1, 26):
        logger.log_metrics({"loss": 1.0}, step, 0)
        written = len(lines_of(logger)) - 1 if os.path.exists(logger.path) else 0
        assert written >= step - 10
        assert written < step  # the newest row may still grow
    logger.finalize("success")
    assert len(lines_of(logger)) == 1 + 25


def test_rows_that_are_due_can_be_written_before_the_next_one_comes(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    logger.log_metrics({"loss": 0.5}, step=5, epoch=0)
    logger.save_due(9)
    assert not Path(logger.path).exists()
    logger.log_metrics({"lr/all": 0.125}, step=10, epoch=0)  # writes, and begins a row of its own
    logger.save_due(10)
    assert lines_of(logger) == ["epoch,step,loss,lr/all", "0,5,0.5,"]
    logger.save_due(20)
    assert lines_of(logger)[2:] == ["0,10,,0.125"]
    logger.log_metrics({"loss": 0.25}, step=20, epoch=0)
    logger.save_due(20)  # more may come for this step
    assert len(lines_of(logger)) == 3
    logger.save()
    assert lines_of(logger)[3:] == ["0,20,0.25,"]


def test_rows_behind_a_checkpoint_go_as_soon_as_a_new_one_is_due(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=4)
    for step in range(1, 4):
        logger.log_metrics({"loss": 0.5}, step, 0)
    state = logger.state_dict()
    for step in range(4, 9):
        logger.log_metrics({"loss": 7.0}, step, 0)
    logger.save()
    resumed = CSVLogger(tmp_path, flush_logs_every_n_steps=4)
    resumed.load_state_dict(state, continue_files=True)
    resumed.save_due(4)  # nothing new came, so the file stays as it is
    assert len(lines_of(logger)) == 1 + 8
    resumed.log_metrics({"loss": 0.25}, 4, 0)  # writes the rows before its own
    assert lines_of(logger)[1:] == [f"0,{step},0.5" for step in (1, 2, 3)]


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    numbers = [0.1, 1 / 3, 1e-45, -0.0, 2.0**-1074, 1.7976931348623157e308, float(np.float32(0.1))]
    numbers += [float("nan"), float("inf"), -float("inf"), 123456789.125]
    logger = CSVLogger(tmp_path)
    for step, number in enumerate(numbers):
        logger.log_metrics({"x": number}, step, 0)
    logger.save()
    read = [float(row["x"]) for row in rows_of(logger.path)]
    for ours, theirs in zip(read, numbers):
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))
        assert math.copysign(1, ours) == math.copysign(1, theirs)


def test_a_logger_that_gets_nothing_makes_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    logger.save()
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


def test_a_run_that_failed_before_its_first_metric_leaves_no_empty_folder(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    assert os.path.isdir(logger.log_dir)
    logger.finalize("failed")
    assert os.listdir(tmp_path / "ofengine_logs") == []
    logger.log_metrics({"loss": 1.0}, 1, 0)  # and the object is still good for the next run
    logger.finalize("success")
    assert lines_of(logger) == ["epoch,step,loss", "0,1,1.0"]


def test_log_dir_is_the_same_from_the_first_look_on(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="runs")
    first = logger.log_dir
    assert first == str(tmp_path / "runs" / "version_0")
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.finalize("success")
    assert logger.log_dir == first
    assert os.path.isfile(os.path.join(first, "metrics.csv"))


def test_versions_go_on_after_the_highest(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert CSVLogger(tmp_path, "runs").log_dir == str(tmp_path / "runs" / "version_11")


def test_runs_at_the_same_time_get_folders_of_their_own(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path) for _ in range(16)]
    folders: List[str] = []
    together = threading.Barrier(len(loggers))

    def claim(logger: CSVLogger) -> None:
        together.wait()
        folders.append(logger.log_dir)

    threads = [threading.Thread(target=claim, args=(logger,)) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 16


@pytest.mark.parametrize(
    ("name", "version", "folder"),
    [("runs", 3, "runs/version_3"), ("runs", "base", "runs/base"), (None, "base", "base")],
)
def test_name_and_version_can_be_given(
    tmp_path: Path, name: Any, version: Any, folder: str
) -> None:
    assert CSVLogger(tmp_path, name, version).log_dir == str(tmp_path / folder)


def test_another_runs_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "base" / "metrics.csv").write_text("mine")
    logger = CSVLogger(tmp_path, "runs", "base")
    with pytest.raises(ConfigurationError, match=r"version='base'.*another version"):
        _ = logger.log_dir
    assert (tmp_path / "runs" / "base" / "metrics.csv").read_text() == "mine"


def test_a_place_that_cannot_be_a_folder_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: List[int] = []

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            return self.layer(batch).mean()

    trainer = quiet_trainer(
        max_epochs=1, logger=CSVLogger(tmp_path / "file"), enable_checkpointing=True
    )
    with pytest.raises(ConfigurationError, match=r"cannot make a folder in .*file"):
        trainer.fit(Task(), [flow.ones(1, 2)])
    assert steps == []


def test_a_run_goes_on_where_the_file_cannot_be_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.save()
    folder = Path(logger.log_dir)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    logger.log_metrics({"loss": 2.0}, 2, 0)
    with pytest.warns(OFEngineWarning, match="Training goes on") as warned:
        logger.save()
    logger.log_metrics({"loss": 3.0}, 3, 0)
    logger.save()  # fails again, and says nothing again
    assert len(warned) == 1
    folder.unlink()
    logger.save()
    assert lines_of(logger) == ["epoch,step,loss", "0,2,2.0", "0,3,3.0"]


def test_a_full_disk_leaves_no_half_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.save()
    before = Path(logger.path).read_bytes()
    logger.log_metrics({"loss": 2.0}, 2, 0)
    logger.log_metrics({"loss": 3.0}, 3, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for one of the two rows and a part of the other.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.warns(OFEngineWarning, match="cannot write"):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(logger.path).read_bytes() == before
    logger.save()
    assert lines_of(logger) == ["epoch,step,loss", "0,1,1.0", "0,2,2.0", "0,3,3.0"]


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'note' as a str"):
        CSVLogger(tmp_path).log_metrics({"note": "good"}, 1, 0)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "wrong",
    [{"flush_logs_every_n_steps": 0}, {"flush_logs_every_n_steps": 1.5}, {"version": ""}],
)
def test_wrong_arguments_are_errors_at_once(tmp_path: Path, wrong: Dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        CSVLogger(tmp_path, **wrong)


def test_a_fit_writes_the_losses_it_had(mode: str, tmp_path: Path) -> None:
    losses: Dict[int, float] = {}

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).pow(2).mean()

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            losses[trainer.global_step] = outputs["loss"].item()

    trainer = quiet_trainer(
        mode=mode, max_epochs=2, log_every_n_steps=2, logger=True, callbacks=Watch(),
        default_root_dir=tmp_path,
    )  # fmt: skip
    assert os.listdir(tmp_path) == []
    trainer.fit(Task(), [flow.ones(3, 2) * scale for scale in (1, 2, 3)])
    rows = rows_of(os.path.join(str(trainer.log_dir), "metrics.csv"))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "2"), ("1", "4"), ("1", "6")]
    assert [float(row["loss"]) for row in rows] == [losses[2], losses[4], losses[6]]
