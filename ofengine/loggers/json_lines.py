"""JSONLinesLogger: the metrics of a run as a line of JSON each time."""

from __future__ import annotations

import json
import math
from typing import Any, Dict, Mapping

from ofengine.loggers._append import AppendLogger
from ofengine.loggers._folder import number_of


class JSONLinesLogger(AppendLogger):
    """Writes ``<save_dir>/<name>/version_<n>/metrics.jsonl``, for programs that read along.

    A line is an object with ``epoch`` (from 0), ``step`` (optimizer steps done) and the metrics
    that were logged then; the first is ``{"hparams": {...}}`` where the task has hyper-parameters.
    A number that JSON has no name for is a text: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    A resumed run goes on in its file as described in :class:`~ofengine.loggers.CSVLogger`.

    Args:
        save_dir: the folder of all logs.
        name: a folder in it; "" or None for none.
        version: a number for ``version_<number>``, or the folder's own name. Default: the
            number after the highest there is.
        flush_logs_every_n_steps: how often lines are written, in optimizer steps.
    """

    file_name = "metrics.jsonl"

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Add a line."""
        if metrics:
            values = {name: _number(name, value) for name, value in metrics.items()}
            self._line({"epoch": epoch, "step": step, **values})

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        """Add a line with them, unless it is the same as the last one."""
        line = {"hparams": {name: _plain(value) for name, value in hparams.items()}}
        if self._more.get("hparams") != repr(line):
            self._more["hparams"] = repr(line)
            self._line(line)

    def _line(self, content: Dict[str, Any]) -> None:
        self.put(json.dumps(content, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def _number(name: str, value: Any) -> Any:
    number = number_of(name, value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; what it has not, as Python writes it."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _number("", value) if isinstance(value, float) else repr(value)
