"""What is different while a step is being traced into a static graph.

A traced step runs once; the compiled graph runs ever after. Whatever Python value the step
read at the trace stays as it was. The values that would change from batch to batch
(``batch_idx``, ``current_epoch``, ``global_step``) are refused there instead of being frozen
silently, and logged tensors are collected so that they become outputs of the graph.
"""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from types import TracebackType
from typing import Any, Iterator, List, NoReturn, Optional, Tuple

from ofengine.errors import GraphModeError, warn

_ENGINE_DIR = os.path.dirname(os.path.abspath(__file__))
_active: Optional[Trace] = None


class Trace:
    """Collects what ``log`` records while the ``with`` block traces a step."""

    def __init__(self) -> None:
        self.logs: List[Tuple[Any, Any]] = []
        """``(spec, value)`` in the order of the calls."""

    def __enter__(self) -> Trace:
        global _active
        self._outer = _active
        _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = self._outer

    def record(self, spec: Any, value: Any) -> None:
        """Keep one logged value; a plain number is frozen, so say so."""
        if not hasattr(value, "is_lazy"):
            warn(
                f"log({spec.name!r}, {value!r}) in a compiled step: a Python number is read once, "
                "at the trace, and stays as it is; log a tensor, or log it in on_train_batch_end.",
            )
        self.logs.append((spec, value))


def active_trace() -> Optional[Trace]:
    """The trace going on, or None."""
    return _active


def forbid_in_trace(what: str) -> None:
    """Raise where ``what``, a value that changes from batch to batch, is read in a trace."""
    if _active is not None:
        raise GraphModeError(
            f"{what} cannot be used inside a compiled step: the step is traced once and would "
            "keep the value of its first batch for ever. Use it in a hook such as "
            'on_train_batch_end, put it into the batch as a tensor, or use Trainer(mode="eager")'
        )


class TracedIndex(int):
    """The ``batch_idx`` that a traced step is given: any use of it is an error."""

    def _refuse(self, *_: Any) -> NoReturn:
        forbid_in_trace("batch_idx")
        raise AssertionError("a TracedIndex outlived its trace")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = _refuse
    __divmod__ = __pow__ = __neg__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = _refuse
    __str__ = __repr__ = __format__ = __hash__ = _refuse


def warn_of_assignments(step: str, names: List[str]) -> None:
    """Warn where a step that is compiled sets attributes: they are set at the trace only."""
    if names:
        warn(
            f"{step} sets {', '.join(f'self.{name}' for name in names)} in a compiled step: that "
            "happens once, at the trace, and is forgotten; return or log the value instead.",
        )


_REASONS: Tuple[Tuple[str, str], ...] = (
    (
        "tensor.numpy() is not allowed",
        "reads a tensor's value (`.numpy()`, `float()`, `int()`, `bool()`, `if tensor`, an "
        "f-string)",
    ),
    ("Only eager scalar tensor support GetItem", "reads a tensor's value (`.item()` or nonzero)"),
    ("Advanced indexing by boolean(mask)", "indexes with a boolean mask, whose result has no "
     "fixed shape"),
    ("only support types: Tensor/None", "returns or logs something that is no tensor"),
)  # fmt: skip


def explain(error: BaseException, step: str) -> GraphModeError:
    """One sentence for an error raised while ``step`` was traced, with the user's own line."""
    text = str(error)
    line = _user_line(error.__traceback__)
    at = f" at {line}" if line else ""
    if isinstance(error, GraphModeError):
        return GraphModeError(f"{text} ({step}{at})." if line else text)
    for needle, reason in _REASONS:
        if needle in text:
            return GraphModeError(
                f"{step} {reason}{at}. A static graph has no values while it is traced: use tensor "
                "operations (flow.where instead of if, self.log instead of .item()), move it into "
                'a hook, or use Trainer(mode="eager").'
            )
    first = text.strip().splitlines()[0] if text.strip() else ""
    return GraphModeError(
        f"{step} cannot be compiled into a static graph{at}: {type(error).__name__}: {first}"
    )


def _user_line(trace: Optional[TracebackType]) -> str:
    """``file:line: code`` of the innermost frame that is the user's own, or ""."""
    found = ""
    for frame, number in traceback.walk_tb(trace):
        path = frame.f_code.co_filename
        if not any(path.startswith(prefix) for prefix in _foreign_prefixes()):
            found = f"{path}:{number}: `{linecache.getline(path, number).strip()}`"
    return found


def _foreign_prefixes() -> Iterator[str]:
    yield _ENGINE_DIR + os.sep
    yield "<frozen"
    for name in ("oneflow", "flowvision", "numpy"):
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            yield os.path.dirname(module.__file__) + os.sep
    yield os.path.dirname(os.__file__) + os.sep
