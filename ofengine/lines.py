"""The user's own line: in a traceback, or among those being run."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from types import FrameType, TracebackType
from typing import Iterator, Optional, Tuple

_ENGINE_DIR = os.path.dirname(os.path.abspath(__file__))


def user_frame(trace: Optional[TracebackType]) -> Tuple[Optional[FrameType], int]:
    """The innermost frame of a traceback that is the user's own, and its line."""
    found: Tuple[Optional[FrameType], int] = (None, 0)
    prefixes = tuple(_foreign_prefixes())
    for frame, number in traceback.walk_tb(trace):
        if not frame.f_code.co_filename.startswith(prefixes):
            found = (frame, number)
    return found


def user_line(trace: Optional[TracebackType]) -> str:
    """``file:line: `code``` of the innermost frame that is the user's own, or ""."""
    frame, number = user_frame(trace)
    return "" if frame is None else line_at(frame.f_code.co_filename, number)


def line_being_run() -> str:
    """``file:line: `code``` of the user's own line that led to this call, or ""."""
    prefixes = tuple(_foreign_prefixes())
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(prefixes):
            return line_at(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def is_users_own(path: str) -> bool:
    """True for a file of code that is neither the engine's, nor OneFlow's, nor Python's."""
    return not path.startswith(tuple(_foreign_prefixes()))


def line_at(path: str, number: int) -> str:
    """``file:line: `code``` of a line of a file."""
    return f"{path}:{number}: `{linecache.getline(path, number).strip()}`"


def _foreign_prefixes() -> Iterator[str]:
    yield _ENGINE_DIR + os.sep
    yield "<frozen"
    for name in ("oneflow", "flowvision", "numpy"):
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            yield os.path.dirname(module.__file__) + os.sep
    yield os.path.dirname(os.__file__) + os.sep
