"""What TensorBoardLogger writes is what TensorBoard's own reader finds, over a resume too.

TensorBoard wants a newer protobuf than OneFlow: it has an environment of its own.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import Scored, quiet_trainer
from helpers.environments import make_environment, without_paths
from PIL import Image

from ofengine import Callback
from ofengine.callbacks import ModelCheckpoint
from ofengine.loggers import Logger, TensorBoardLogger

READER = """
import base64, json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

all_of_them = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
read = EventAccumulator(sys.argv[1], size_guidance=all_of_them, purge_orphaned_data=False)
read.Reload()
tags = read.Tags()
told = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
hparams = HParamsPluginData.FromString(told).session_start_info.hparams
kinds = {name: value.WhichOneof("kind") for name, value in hparams.items()}
def steps(entries, value):
    return [[each.step, value(each)] for each in entries]
print(json.dumps({
    "tags": {kind: found for kind, found in tags.items() if isinstance(found, list)},
    "scalars": {tag: steps(read.Scalars(tag), lambda e: e.value) for tag in tags["scalars"]},
    "images": {tag: steps(read.Images(tag),
                          lambda e: base64.b64encode(e.encoded_image_string).decode())
               for tag in tags["images"]},
    "histograms": {tag: steps(read.Histograms(tag), lambda e: [
        e.histogram_value.min, e.histogram_value.max, e.histogram_value.num,
        e.histogram_value.sum, e.histogram_value.sum_squares, list(e.histogram_value.bucket_limit),
        list(e.histogram_value.bucket)]) for tag in tags["histograms"]},
    "texts": {tag: steps(read.Tensors(tag), lambda e: e.tensor_proto.string_val[0].decode())
              for tag in tags["tensors"]},
    "hparams": {name: getattr(hparams[name], kind) for name, kind in kinds.items()},
}))
"""
STEPS = [*range(1, 7)]
"""Three epochs of two steps."""
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has TensorBoard."""
    return make_environment(tmp_path_factory.mktemp("tensorboard") / "environment", "tensorboard")


class Task(Scored):
    """Has hyper-parameters of all kinds, and a loss that is another one at each step."""

    def __init__(self, rate: float = 0.125, width: int = 3, name: str = "net", deep: bool = True,
                 sizes: Tuple[int, ...] = (2, 3)) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("twice", loss * 2, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


class Told(Logger):
    """Keeps what every logger is told; what a resumed run is told again takes its place."""

    def __init__(self) -> None:
        self.curves: Dict[str, Dict[int, float]] = {}
        self.weights: Dict[int, np.ndarray] = {}

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        for name, value in {**metrics, "epoch": epoch}.items():
            self.curves.setdefault(name, {})[step] = value


def picture_at(step: int) -> np.ndarray:
    return (np.arange(48).reshape(3, 4, 4) * step % 256).astype(np.uint8)


class Shows(Callback):
    """Shows a picture, weights, a drawing and a text at each step."""

    def on_after_optimizer_step(self, trainer: Any, task: Any) -> None:
        step = trainer.global_step
        logger, told = trainer.loggers
        told.weights[step] = np.concatenate([p.numpy().reshape(-1) for p in task.parameters()])
        logger.log_image("picture", picture_at(step), step)
        logger.log_histogram("weights", told.weights[step], step)
        logger.log_text("note", f"**step** {step}", step)
        if HAS_MATPLOTLIB:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(1, 1), dpi=40 + step)
            figure.add_subplot().plot([1, step])
            logger.log_figure("drawing", figure, step)


def read_by_tensorboard(reader: Path, folder: Path) -> Dict[str, Any]:
    ended = subprocess.run(
        [str(reader), "-c", READER, str(folder)], capture_output=True, text=True,
        env=without_paths(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: Dict[str, Any] = json.loads(ended.stdout)
    return found


def trained_and_resumed(root: Path, mode: str) -> Told:
    """Four steps, the last of which is lost; then on from the third to the sixth."""
    told = Told()
    for epochs in (2, 3):
        task = Task()
        with flow.no_grad():
            for parameter in task.parameters():
                parameter.fill_(0.5)
        quiet_trainer(
            mode=mode, max_epochs=epochs, logger=[TensorBoardLogger(root), told],
            log_every_n_steps=1, default_root_dir=root,
            callbacks=[
                Shows(),
                ModelCheckpoint(root / "ck", "{step}", every_n_train_steps=1, save_top_k=-1),
            ],
        ).fit(task, [flow.ones(3, 2), flow.ones(3, 2) / 2], ckpt_path="last")  # fmt: skip
        if epochs == 2:
            os.remove(root / "ck" / "step=4.safetensors")
    return told


@pytest.mark.slow
def test_tensorboard_reads_what_was_logged(tmp_path: Path, mode: str, reader: Path) -> None:
    told = trained_and_resumed(tmp_path, mode)
    (folder,) = (tmp_path / "ofengine_logs").iterdir()
    found = read_by_tensorboard(reader, folder)

    curves = found["scalars"]
    assert {*curves} == {"loss", "twice_step", "twice_epoch", "epoch"} == {*told.curves}
    for name, points in curves.items():
        wanted = [[step, float(np.float32(each))] for step, each in told.curves[name].items()]
        assert points == sorted(wanted)  # each step once: one curve
    assert [step for step, _ in curves["loss"]] == STEPS
    assert len({value for _, value in curves["loss"]}) == len(STEPS)
    assert curves["epoch"] == [[step, (step - 1) // 2] for step in STEPS]
    assert [step for step, _ in curves["twice_epoch"]] == [2, 4, 6]

    assert [step for step, _ in found["images"]["picture"]] == STEPS
    for step, encoded in found["images"]["picture"]:
        np.testing.assert_array_equal(pixels(encoded), picture_at(step).transpose(1, 2, 0))
    if HAS_MATPLOTLIB:
        sizes = [[step, pixels(encoded).shape] for step, encoded in found["images"]["drawing"]]
        assert sizes == [[step, (40 + step, 40 + step, 3)] for step in STEPS]

    assert [step for step, _ in found["histograms"]["weights"]] == STEPS
    for step, histogram in found["histograms"]["weights"]:
        check_histogram(histogram, told.weights[step].astype(np.float64))
    assert found["texts"] == {"note/text_summary": [[step, f"**step** {step}"] for step in STEPS]}
    assert found["hparams"] == {
        "rate": 0.125, "width": 3.0, "name": "net", "deep": True, "sizes": "(2, 3)"
    }  # fmt: skip


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def check_histogram(histogram: List[Any], values: np.ndarray) -> None:
    low, high, number, total, squares, limits, counts = histogram
    assert (low, high, number) == (values.min(), values.max(), values.size)
    np.testing.assert_allclose([total, squares], [values.sum(), (values**2).sum()], rtol=1e-12)
    counted = [((values <= limit) & (values > below)).sum()
               for below, limit in zip([-np.inf, *limits], limits)]  # fmt: skip
    assert sum(counts) == values.size
    np.testing.assert_array_equal(np.cumsum(counts), np.cumsum(counted))
