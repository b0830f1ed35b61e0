"""Loggers: where the metrics of a run go."""

from typing import Any

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.foreign_names import no_such_name
from ofengine.loggers.base import Logger
from ofengine.loggers.csv_logger import CSVLogger
from ofengine.loggers.json_lines import JSONLinesLogger
from ofengine.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "JSONLinesLogger", "Logger", "TensorBoardLogger"]


def __getattr__(name: str) -> Any:
    raise no_such_name(__name__, name)
