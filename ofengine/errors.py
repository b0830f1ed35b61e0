"""Every error that a user can cause. Each message says what was wrong, where, and what to write."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from types import FrameType
from typing import Any, Collection


class OFEngineError(Exception):
    """The base of all errors of ofengine; ``except OFEngineError`` catches every one."""


class ConfigurationError(OFEngineError):
    """The Trainer's arguments, the task's methods or the callbacks do not fit together."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """The Trainer, a verb or a class of ofengine's has no argument of this name."""


class UnknownAttributeError(ConfigurationError, AttributeError):
    """The trainer or task has no attribute of this name, which Lightning's has, or not yet."""


class UnknownNameError(ConfigurationError, ImportError):
    """ofengine has no class of this name, which Lightning has.

    No AttributeError, which an ``import`` would take for one of its own, without its words.
    """


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
    """A training step's loss is NaN or infinite; TerminateOnNaN and detect_anomaly raise it."""


class RankError(OFEngineError):
    """The ranks of a run do not fit together, or do different things."""


class OFEngineWarning(UserWarning):
    """Something that trains, but perhaps not what was meant."""


def quoted(names: Collection[Any], most: int = 3) -> str:
    """``names`` in a sentence: "nothing", "'a' and 'b'", "'a', 'b', 'c' and 7 more"."""
    shown = [repr(name) for name in itertools.islice(names, most)]
    if len(names) > most:
        shown.append(f"{len(names) - most:,} more")
    if not shown:
        return "nothing"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def take_colours_off(error: BaseException) -> None:
    """Leave the text of ``error``, which OneFlow colours, as plain text."""
    if any(isinstance(each, str) and "\x1b[" in each for each in error.args):
        error.args = tuple(
            _COLOUR.sub("", each) if isinstance(each, str) else each for each in error.args
        )


def said_by(error: BaseException) -> str:
    """What ``error`` says, its kind first, in one line and without OneFlow's colours.

    Of OneFlow's frames in C++ there is only the file of the innermost one, which names the
    operation: a check that failed there often says no more than "(5 vs 2)".
    """
    said = _COLOUR.sub("", str(error))
    frames = list(_CPP_FRAME.finditer(said))
    text = " ".join(said[: frames[0].start() if frames else None].split()).rstrip(".")[:300]
    if frames:
        text = f"{text}, in OneFlow's {frames[-1].group(1)}".lstrip(" ,")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_CPP_FRAME = re.compile(r'^\s*File ".*?([^/"]+)\.(?:cpp|cc|h|cu|cuh)", line \d+', re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PASSED_BY = ("ofengine", "oneflow", "contextlib")


def warn(message: str) -> None:
    """Warn with an :class:`OFEngineWarning` at the line of the user's that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, OFEngineWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
