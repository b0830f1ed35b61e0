"""One sentence, with the user's own line, for an error raised while a step was traced."""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from types import FrameType, TracebackType
from typing import Iterator, Optional, Tuple

from ofengine.errors import GraphModeError
from ofengine.tracing import TracedIndex, would_freeze

_ENGINE_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What the text of an exception tells about the step it comes from.
_READS_VALUES = {
    "tensor.numpy() is not allowed": "reads a tensor's value (`.numpy()`, `float()`, `int()`, "
    "`bool()`, `if tensor`, an f-string)",
    "Only eager scalar tensor support GetItem": "reads a tensor's value (`.item()` or nonzero)",
    "Advanced indexing by boolean(mask)": "indexes with a boolean mask, whose result has no fixed "
    "shape",
}
_OTHERWISE_WRONG = {
    "only support types: Tensor/None": "returns something that is no tensor: return the loss, a "
    "tuple or a dict of tensors",
    "Loss blob not found": "never calls backward(): call it on the loss",
    "must be a variable created in nn.Graph": "returns no tensor: return the loss",
}


def explain(error: BaseException, step: str, index: Optional[TracedIndex] = None) -> GraphModeError:
    """One sentence for an error raised while ``step`` was traced, with the user's own line."""
    line = _user_line(error.__traceback__)
    at = f" at {line}" if line else ""
    if index is not None and (index.used or _uses_index(error)):
        error = would_freeze("batch_idx")
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # OneFlow colours its messages
    if isinstance(error, GraphModeError):
        return GraphModeError(f"{text} ({step}{at})." if line else text)
    for needle, reason in _READS_VALUES.items():
        if needle in text:
            return GraphModeError(
                f"{step} {reason}{at}. A static graph has no values while it is traced: use tensor "
                "operations (flow.where instead of if, self.log instead of .item()), move it into "
                f"a hook, or use {_way_out(step)}."
            )
    for needle, reason in _OTHERWISE_WRONG.items():
        if needle in text:
            return GraphModeError(f"{step} {reason}{at}.")
    first = text.splitlines()[0] if text else ""
    return GraphModeError(
        f"{step} cannot be compiled into a static graph{at}: {type(error).__name__}: {first}"
    )


def _uses_index(error: BaseException) -> bool:
    """True where OneFlow refused an argument in a line of the user's that names the index."""
    if not isinstance(error, (TypeError, RuntimeError, IndexError, ValueError)):
        return False
    frame, number = _user_frame(error.__traceback__)
    if frame is None:
        return False
    line = linecache.getline(frame.f_code.co_filename, number)
    names = [name for name, value in frame.f_locals.items() if isinstance(value, TracedIndex)]
    body = re.sub(r"lambda[^:]*:", "", line)
    return any(re.search(rf"\b{re.escape(name)}\b", body) for name in names)


def _way_out(step: str) -> str:
    argument = "eval_mode" if step in ("validation_step", "test_step", "predict_step") else "mode"
    return f'Trainer({argument}="eager")'


def _user_frame(trace: Optional[TracebackType]) -> Tuple[Optional[FrameType], int]:
    """The innermost frame that is the user's own, and its line."""
    found: Tuple[Optional[FrameType], int] = (None, 0)
    prefixes = tuple(_foreign_prefixes())
    for frame, number in traceback.walk_tb(trace):
        if not frame.f_code.co_filename.startswith(prefixes):
            found = (frame, number)
    return found


def _user_line(trace: Optional[TracebackType]) -> str:
    """``file:line: code`` of the innermost frame that is the user's own, or ""."""
    frame, number = _user_frame(trace)
    if frame is None:
        return ""
    path = frame.f_code.co_filename
    return f"{path}:{number}: `{linecache.getline(path, number).strip()}`"


def _foreign_prefixes() -> Iterator[str]:
    yield _ENGINE_DIR + os.sep
    yield "<frozen"
    for name in ("oneflow", "flowvision", "numpy"):
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            yield os.path.dirname(module.__file__) + os.sep
    yield os.path.dirname(os.__file__) + os.sep
