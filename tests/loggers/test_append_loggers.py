"""TensorBoardLogger and JSONLinesLogger: what they write, alone and together, and on resume."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from events import fields, scalars_in, values_in
from helpers import Scored, quiet_trainer
from PIL import Image

from ofengine import Callback, CheckpointError, ConfigurationError
from ofengine.callbacks import ModelCheckpoint
from ofengine.errors import OFEngineWarning
from ofengine.loggers import CSVLogger, JSONLinesLogger, Logger, TensorBoardLogger

BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""
LOG = "ofengine_logs/version_0"
EVENTS, LINES = TensorBoardLogger.file_name, JSONLinesLogger.file_name


class Tells(Scored):
    """Has hyper-parameters, and logs a number of its own by step."""

    def __init__(self, width: int = 64, rate: float = 0.1, name: Any = ("a", None)) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("twice", loss * 2, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


class Stops(Callback):
    """Ends a run before its first step."""

    def on_train_start(self, trainer: Any, task: Any) -> None:
        raise ConfigurationError("it stops here.")


def fit(
    root: Path,
    epochs: int,
    path: Any = None,
    loggers: Any = None,
    stops: bool = False,
    **arguments: Any,
) -> Any:
    if loggers is None:
        loggers = [each(root) for each in (TensorBoardLogger, CSVLogger, JSONLinesLogger)]
    task = Tells()
    with flow.no_grad():
        for parameter in task.parameters():
            parameter.fill_(0.5)
    trainer = quiet_trainer(
        max_epochs=epochs, logger=loggers, log_every_n_steps=1, default_root_dir=root,
        callbacks=[
            *([Stops()] if stops else []),
            ModelCheckpoint(root / "ck", "{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        **arguments,
    )  # fmt: skip
    trainer.fit(task, BATCHES, ckpt_path=path)
    return trainer


def lines_in(path: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------- what is written


def test_several_loggers_write_the_same_into_one_folder(tmp_path: Path, mode: str) -> None:
    trainer = fit(tmp_path, 2, mode=mode)
    assert sorted(os.listdir(tmp_path / LOG)) == [EVENTS, "metrics.csv", LINES]
    curves = scalars_in(tmp_path / LOG / EVENTS)
    history = trainer.history
    for name in ("loss", "twice_step", "twice_epoch"):
        wanted = [(row["step"], np.float32(row[name])) for row in history if name in row]
        assert curves.pop(name) == wanted
    assert curves == {"epoch": [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]}
    told, *lines = lines_in(tmp_path / LOG / LINES)
    assert told == {"hparams": {"width": 64, "rate": 0.1, "name": ["a", None]}}
    joined: List[Dict[str, Any]] = []
    for line in lines:
        if joined and joined[-1]["step"] == line["step"]:
            joined[-1].update(line)
        else:
            joined.append(line)
    assert joined == list(history)


def test_hyper_parameters_are_in_the_event_file(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    found = {value.tag: value.fields for value in values_in(tmp_path / LOG / EVENTS)}
    metadata = fields(found["_hparams_/session_start_info"][9][0])
    plugin = fields(metadata[1][0])
    assert plugin[1] == [b"hparams"]
    session = fields(fields(plugin[2][0])[3][0])
    told = {fields(each)[1][0]: fields(fields(each)[2][0]) for each in session[1]}
    assert told[b"name"] == {3: [b"('a', None)"]}
    assert np.frombuffer(told[b"width"][2][0])[0] == 64.0


def test_pictures_histograms_figures_and_texts(tmp_path: Path) -> None:
    figures = importlib.import_module("matplotlib.figure")
    logger = TensorBoardLogger(tmp_path)
    image = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    logger.log_image("as_it_is", image, step=3)
    logger.log_image("of_a_tensor", flow.tensor(image[0] / 255.0, dtype=flow.float32), step=3)
    logger.log_histogram("weights", flow.tensor([0.5, 1.5, 1.5]), step=4)
    figure = figures.Figure(figsize=(1, 1), dpi=50)
    figure.add_subplot().plot([1, 2])
    logger.log_figure("plot", figure, step=5)
    logger.log_text("note", "**it** works", step=6)
    logger.experiment.add_pr_curve("curve", np.array([0, 1]), np.array([0.2, 0.9]), 7)
    logger.save()
    found = {value.tag: (value.step, value.fields) for value in values_in(Path(logger.path))}

    def picture(tag: str) -> Any:
        encoded = fields(found[tag][1][4][0])[4][0]
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))

    np.testing.assert_array_equal(picture("as_it_is"), image.transpose(1, 2, 0))
    np.testing.assert_array_equal(picture("of_a_tensor"), np.stack([image[0]] * 3, axis=2))
    assert picture("plot").shape == (50, 50, 3)
    histogram = fields(found["weights"][1][5][0])
    low, high, count, total = (np.frombuffer(histogram[i][0])[0] for i in (1, 2, 3, 4))
    assert (low, high, count, total) == (0.5, 1.5, 3.0, 3.5)
    assert b"**it** works" in found["note/text_summary"][1][8][0]
    assert [found[tag][0] for tag in ("as_it_is", "weights", "plot", "note/text_summary")] == [
        3, 4, 5, 6
    ]  # fmt: skip
    assert found["curve"][0] == 7
    assert os.listdir(logger.log_dir) == [EVENTS]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    loggers: List[Any] = [JSONLinesLogger(tmp_path / "a"), TensorBoardLogger(tmp_path / "b")]
    for each in loggers:
        each.log_metrics({"nan": float("nan"), "up": float("inf"), "down": -float("inf")}, 1, 0)
        each.save()
    (line,) = lines_in(Path(loggers[0].path))
    assert line == {"epoch": 0, "step": 1, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert all(repr(float(line[name])) for name in ("nan", "up", "down"))
    curves = scalars_in(Path(loggers[1].path))
    assert np.isnan(curves["nan"][0][1])
    assert curves["down"] == [(1, -np.inf)]


def test_a_logger_of_one_s_own_needs_one_method(tmp_path: Path) -> None:
    class Own(Logger):
        def __init__(self) -> None:
            self.rows: List[Any] = []

        def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
            self.rows.append((step, epoch, sorted(metrics)))

    own = Own()
    fit(tmp_path, 1, loggers=own)
    assert own.rows == [
        (1, 0, ["loss", "twice_step"]), (2, 0, ["loss", "twice_step"]), (2, 0, ["twice_epoch"])
    ]  # fmt: skip


# ---------------------------------------------------------------------- a resumed run


def outcome(root: Path) -> Any:
    shown = [
        (value.step, value.tag, value.fields.get(2)) for value in values_in(root / LOG / EVENTS)
    ]
    return shown, lines_in(root / LOG / LINES), (root / LOG / "metrics.csv").read_text()


@pytest.mark.parametrize("flush", [1, 100])
@pytest.mark.parametrize("lost", [1, 2, 4])
def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path, flush: int, lost: int) -> None:
    """Over at step 6, with the checkpoints up to step ``6 - lost``."""

    def loggers() -> List[Any]:
        kinds: List[Any] = [TensorBoardLogger, CSVLogger, JSONLinesLogger]
        return [each(tmp_path, flush_logs_every_n_steps=flush) for each in kinds]

    fit(tmp_path, 3, loggers=loggers())
    whole = outcome(tmp_path)
    for step in range(7 - lost, 7):
        os.remove(tmp_path / "ck" / f"step={step}.safetensors")
    fit(tmp_path, 3, "last", loggers=loggers())
    assert [each.name for each in (tmp_path / "ofengine_logs").iterdir()] == ["version_0"]
    assert outcome(tmp_path) == whole


def test_a_run_that_is_only_looked_at_touches_nothing(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    os.remove(tmp_path / "ck" / "step=4.safetensors")
    before = tree(tmp_path)
    with pytest.raises(ConfigurationError, match="it stops here"):
        fit(tmp_path, 2, "last", stops=True)
    assert tree(tmp_path) == before


def tree(folder: Path) -> Dict[str, bytes]:
    files = [each for each in folder.rglob("*") if each.is_file()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}


@pytest.mark.parametrize("copy", [shutil.copy2, os.link])
def test_a_copied_run_never_writes_to_the_original(
    tmp_path: Path, copy: Callable[[str, str], Any]
) -> None:
    fit(tmp_path / "a", 2)
    whole = tree(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=copy)
    os.remove(tmp_path / "b" / "ck" / "step=4.safetensors")
    fit(tmp_path / "b", 3, "last")
    assert tree(tmp_path / "a") == whole
    fit(tmp_path / "c", 3)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "c")


def test_another_run_s_checkpoint_begins_a_log_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path / "a", 2)
    whole = tree(tmp_path / "a")
    # Its log is found beside the checkpoint, copied as far as that goes, and left as it is.
    shutil.move(str(tmp_path / "a" / "ck"), str(tmp_path / "a" / LOG / "ck"))
    before = tree(tmp_path / "a")
    fit(tmp_path / "b", 3, tmp_path / "a" / LOG / "ck" / "step=3.safetensors")
    assert tree(tmp_path / "a") == before
    assert len(whole) == len(before)
    fit(tmp_path / "c", 3)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "c")


def test_a_file_that_is_not_this_run_s_stays(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    for name in (EVENTS, LINES):
        path = tmp_path / LOG / name
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
    before = {name: (tmp_path / LOG / name).read_bytes() for name in (EVENTS, LINES)}
    with pytest.warns(OFEngineWarning, match="beside the checkpoint or in the folders"):
        fit(tmp_path, 3, "last")
    assert {name: (tmp_path / LOG / name).read_bytes() for name in before} == before
    curves = scalars_in(tmp_path / "ofengine_logs" / "version_1" / EVENTS)
    assert [step for step, _ in curves["loss"]] == [4, 5, 6]


def test_a_file_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1, 0)
    logger.save()
    path = Path(logger.path)
    path.rename(path.with_suffix(".away"))
    logger.log_metrics({"a": 2.0}, 2, 0)
    with pytest.warns(OFEngineWarning, match="JSONLinesLogger cannot write to"):
        state = logger.state_dict()
    assert json.loads(state["pending"].tobytes()) == {"epoch": 0, "step": 2, "a": 2.0}
    path.with_suffix(".away").rename(path)
    resumed = JSONLinesLogger(tmp_path)
    resumed.load_state_dict(state, continue_files=True)
    resumed.log_metrics({"a": 3.0}, 3, 0)
    resumed.save()
    assert [line["a"] for line in lines_in(path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "change",
    [
        {"folder": 3}, {"size": -1}, {"size": True}, {"digest": None}, {"pending": [1]},
        {"pending": np.zeros(2)}, {"more": "text"}, {"more": {"a": 1}}, {"next_flush": 1.5},
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(tmp_path: Path, change: Dict[str, Any]) -> None:
    logger = JSONLinesLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1, 0)
    state = logger.state_dict()
    logger.check_state_dict(state)
    with pytest.raises(CheckpointError, match="the checkpoint's state of a JSONLinesLogger"):
        logger.check_state_dict({**state, **change})


def test_a_folder_in_a_checkpoint_is_a_name_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    logger = JSONLinesLogger(tmp_path / "logs")
    logger.log_metrics({"a": 1.0}, 1, 0)
    state = logger.state_dict()
    victim = tmp_path / "elsewhere" / LINES
    victim.write_bytes(Path(logger.path).read_bytes())
    for folder in ("../../elsewhere", str(tmp_path / "elsewhere"), ".."):
        other = JSONLinesLogger(tmp_path / "own")
        with pytest.warns(OFEngineWarning, match="its log begins with what comes"):
            other.load_state_dict({**state, "folder": folder}, continue_files=True)
        other.log_metrics({"a": 9.0}, 2, 0)
        other.save()
        assert len(lines_in(victim)) == 1


# ---------------------------------------------------------------------- mistakes


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r'pip install "ofengine\[tensorboard\]"\.$'):
        TensorBoardLogger(tmp_path)


@pytest.mark.parametrize("kind", [JSONLinesLogger, TensorBoardLogger])
def test_a_version_of_another_run_is_refused(kind: Any, tmp_path: Path) -> None:
    first = kind(tmp_path, version=3)
    first.log_metrics({"a": 1.0}, 1, 0)
    first.save()
    again = kind(tmp_path, version=3)
    with pytest.raises(ConfigurationError, match="is there already, from another run"):
        _ = again.log_dir


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda logger: logger.log_metrics({"a": "x"}, 1, 0), "'a' as a str: give a number"),
        (lambda logger: logger.log_image("a", np.zeros((4, 4, 3)), 1), "one image of shape"),
        (lambda logger: logger.log_image("a", "file.png", 1), "give a tensor or an array"),
        (lambda logger: logger.log_histogram("a", np.array([np.nan]), 1), "not finite"),
        (lambda logger: logger.log_histogram("a", np.array([]), 1), "no number"),
        (lambda logger: logger.log_figure("a", np.zeros(3), 1), "give a matplotlib Figure"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    tmp_path: Path, mistake: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says) as told:
        mistake(TensorBoardLogger(tmp_path))
    assert str(told.value).endswith(".")
