"""Loggers: where the metrics of a run go."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.loggers.base import Logger
from ofengine.loggers.csv_logger import CSVLogger

__all__ = ["CSVLogger", "Logger"]
