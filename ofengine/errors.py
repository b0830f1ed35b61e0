"""Every error that a user can cause. Each message says what was wrong, where, and what to write."""

from __future__ import annotations

import re
import sys
import warnings
from types import FrameType


class OFEngineError(Exception):
    """The base of all errors of ofengine; ``except OFEngineError`` catches every one."""


class ConfigurationError(OFEngineError):
    """The Trainer's arguments, the task's methods or the callbacks do not fit together."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """The Trainer has no argument of this name."""


class UnknownAttributeError(ConfigurationError, AttributeError):
    """The trainer or task has no attribute of this name, which Lightning's has."""


class RateError(OFEngineError):
    """A parameter group, a learning rate or a schedule is wrong."""


class GraphModeError(OFEngineError):
    """The task does something that a static graph cannot do."""


class DeviceError(OFEngineError):
    """The device that was asked for is not there, or OneFlow cannot compute on it."""


class DataError(OFEngineError):
    """A dataloader or a batch is not what training needs."""


class CheckpointError(OFEngineError):
    """A checkpoint cannot be written, read, or does not fit the model."""


class NonFiniteError(OFEngineError):
    """The loss of a training step is NaN or infinite; ``TerminateOnNaN`` raises it."""


class RankError(OFEngineError):
    """The ranks of a run do not fit together, or do different things."""


class OFEngineWarning(UserWarning):
    """Something that trains, but perhaps not what was meant."""


def said_by(error: BaseException) -> str:
    """What ``error`` says, its kind first, in one line and without OneFlow's colours."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


_PASSED_BY = ("ofengine", "oneflow", "contextlib")


def warn(message: str) -> None:
    """Warn with an :class:`OFEngineWarning` at the line of the user's that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, OFEngineWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
