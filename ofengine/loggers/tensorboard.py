"""TensorBoardLogger: the metrics of a run as an event file, by tensorboardX."""

from __future__ import annotations

import importlib
import struct
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import numpy as np
import oneflow as flow

from ofengine.data.structure import describe
from ofengine.errors import ConfigurationError
from ofengine.loggers._append import AppendLogger
from ofengine.loggers._folder import number_of


class TensorBoardLogger(AppendLogger):
    """Writes ``<save_dir>/<name>/version_<n>/events.out.tfevents.ofengine``.

    ``tensorboard --logdir <save_dir>`` shows it: each metric by optimizer step, and ``epoch`` as
    one of them; hyper-parameters in a tab of their own. It needs tensorboardX
    (``pip install "ofengine[tensorboard]"``).

    A resumed run goes on in the same curves, in its file, as described in
    :class:`~ofengine.loggers.CSVLogger`. So no other file of events is made in a run's folder.

    Args:
        save_dir: the folder of all logs.
        name: a folder in it; "" or None for none.
        version: a number for ``version_<number>``, or the folder's own name. Default: the
            number after the highest there is.
        flush_logs_every_n_steps: how often points are written, in optimizer steps.

    ``log_image`` and its like show a value under ``name`` at optimizer step ``step``.

    Raises:
        ConfigurationError: tensorboardX is missing, or an argument is wrong.
    """

    file_name = "events.out.tfevents.ofengine"

    def __init__(
        self,
        save_dir: Union[str, Path],
        name: Optional[str] = "ofengine_logs",
        version: Union[int, str, None] = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, flush_logs_every_n_steps)
        self._tensorboardx = _tensorboardx()
        self._writer: Any = None

    @property
    def experiment(self) -> Any:
        """TensorboardX's ``SummaryWriter``, whose ``add_...`` methods write into this run's file.

        Of ``add_scalar`` use :meth:`log_metrics` instead, which keeps nothing in memory.
        """
        if self._writer is None:
            self._writer = self._tensorboardx.SummaryWriter(self.log_dir, write_to_disk=False)
            # It asks for this one each time, and makes a file of its own where there is none.
            self._writer._get_file_writer = lambda: self._writer.file_writer
            self._writer.file_writer = _Events(self)
            self._writer.all_writers = {self.log_dir: self._writer.file_writer}
        return self._writer

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Add a point to the curve of each of the ``metrics``, and to that of ``epoch``."""
        for name, value in metrics.items():
            self._put_summary(self._tensorboardx.summary.scalar(name, number_of(name, value)), step)
        if metrics and self._more.get("epoch_at") != str(step):
            self._more["epoch_at"] = str(step)
            self._put_summary(self._tensorboardx.summary.scalar("epoch", float(epoch)), step)

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        """Show them in the tab HPARAMS; what is no number, text or flag, as Python writes it."""
        plain = {
            str(name): value if isinstance(value, (bool, int, float, str)) else repr(value)
            for name, value in hparams.items()
        }
        if self._more.get("hparams") != repr(plain):
            self._more["hparams"] = repr(plain)
            for summary in self._tensorboardx.summary.hparams(plain, {}):
                self._put_summary(summary, None)

    def log_image(self, name: str, image: Any, step: int) -> None:
        """Show ``image``: a tensor or array of shape (3, H, W), (1, H, W) or (H, W).

        uint8 from 0 to 255, or floating-point numbers from 0 to 1.
        """
        values = _array("log_image", image)
        if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[0] not in (1, 3)):
            raise ConfigurationError(
                f"log_image({name!r}, ...) got shape {values.shape}: give one image of shape "
                "(3, H, W), (1, H, W) or (H, W)."
            )
        self.experiment.add_image(name, values, step, dataformats="CHW"[-values.ndim :])

    def log_histogram(self, name: str, values: Any, step: int) -> None:
        """Show how ``values``, a tensor or array such as weights, are distributed."""
        numbers = _array("log_histogram", values).astype(np.float64).reshape(-1)
        if not numbers.size or not np.isfinite(numbers).all():
            raise ConfigurationError(
                f"log_histogram({name!r}, ...) got "
                + ("no number." if not numbers.size else "numbers that are not finite.")
            )
        self.experiment.add_histogram(name, numbers, step)

    def log_figure(self, name: str, figure: Any, step: int, close: bool = True) -> None:
        """Show a figure of matplotlib's, which is closed afterwards unless ``close`` is False."""
        if not hasattr(figure, "savefig"):
            raise ConfigurationError(
                f"log_figure({name!r}, ...) got {describe(figure)}: give a matplotlib Figure."
            )
        self.experiment.add_figure(name, figure, step, close=close)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""
        self.experiment.add_text(name, str(text), step)

    # ------------------------------------------------------------------ records

    def beginning(self) -> bytes:
        """The record that says what kind of file it is."""
        event = self._tensorboardx.proto.event_pb2.Event
        return self._record(event(wall_time=time.time(), file_version="brain.Event:2"))

    def put_event(self, event: Any) -> None:
        """Add a record of ``event``, an ``Event`` of tensorboardX."""
        self.put(self._record(event))

    def _put_summary(self, summary: Any, step: Optional[int]) -> None:
        event = self._tensorboardx.proto.event_pb2.Event
        self.put_event(event(wall_time=time.time(), step=step or 0, summary=summary))

    def _record(self, event: Any) -> bytes:
        """Length and content, each with its checksum, as TFRecord has it."""
        checksum = self._tensorboardx.record_writer.masked_crc32c
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = (struct.pack("<I", checksum(each)) for each in (length, content))
        return b"".join([length, next(sums), content, next(sums)])


class _Events:
    """What a ``SummaryWriter`` writes to."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self._logger = logger

    def add_event(self, event: Any, step: Any = None, walltime: Optional[float] = None) -> None:
        """Add a record."""
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self._logger.put_event(event)

    def add_summary(
        self, summary: Any, global_step: Any = None, walltime: Optional[float] = None
    ) -> None:
        """Add a record of what is to be shown."""
        event = self._logger._tensorboardx.proto.event_pb2.Event(summary=summary)
        self.add_event(event, global_step, walltime)

    def get_logdir(self) -> str:
        """Where what goes beside the events may be written."""
        return self._logger.log_dir

    def flush(self) -> None:
        """Write all that is not in the file yet."""
        self._logger.save()

    close = flush


def _tensorboardx() -> Any:
    try:
        package = importlib.import_module("tensorboardX")
        for module in ("summary", "record_writer", "proto.event_pb2"):
            importlib.import_module(f"tensorboardX.{module}")
    except ImportError as error:
        raise ConfigurationError(
            f'TensorBoardLogger needs tensorboardX ({error}): pip install "ofengine[tensorboard]".'
        ) from None
    return package


def _array(method: str, values: Any) -> np.ndarray:
    """``values`` as numpy has them."""
    if isinstance(values, flow.Tensor):
        return np.asarray(values.detach().cpu().numpy())
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ConfigurationError(f"{method} got {describe(values)}: give a tensor or an array.")
    return array
