"""Loggers: where the metrics of a run go."""

from ofengine.loggers.base import Logger
from ofengine.loggers.csv_logger import CSVLogger

__all__ = ["CSVLogger", "Logger"]
