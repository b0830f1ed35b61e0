"""What is different while a step is being traced into a static graph.

A traced step runs once; the compiled graph runs ever after. Whatever Python value the step
read at the trace stays as it was. The values that would change from batch to batch
(``batch_idx``, ``current_epoch``, ``global_step``) are refused there instead of being frozen
silently, and logged tensors are collected so that they become outputs of the graph.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from types import FrameType, TracebackType
from typing import Any, Callable, Iterator, List, NoReturn, Optional, Tuple

import oneflow as flow

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
        # OneFlow dies with a segmentation fault where what is neither tensor nor number is
        # added to a tensor, the index of a traced step for one.
        self._add = flow.Tensor.__add__
        flow.Tensor.__add__ = self._careful_add
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = self._outer
        flow.Tensor.__add__ = self._add

    @property
    def _careful_add(self) -> Callable[[Any, Any], Any]:
        add = self._add

        def careful_add(left: Any, right: Any) -> Any:
            for operand in (left, right):
                if isinstance(operand, TracedIndex):
                    operand.refuse()
            return add(left, right)

        return careful_add

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
        raise _would_freeze(what)


def _would_freeze(what: str) -> GraphModeError:
    return GraphModeError(
        f"{what} cannot be used inside a compiled step: the step is traced once and would keep the "
        "value of its first batch for ever. Use it in a hook such as on_train_batch_end, put it "
        'into the batch as a tensor, or use Trainer(mode="eager")'
    )


class TracedIndex:
    """The ``batch_idx`` that a traced step is given: it may be passed on, but not used.

    No subclass of int: C code would read the number past every method of the class.
    """

    used = False
    """True once something tried; kept because C code may swallow the error."""

    def refuse(self, *_: Any) -> NoReturn:
        """Raise the error that every use of it raises."""
        self.used = True
        raise _would_freeze("batch_idx")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = refuse
    __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __round__ = refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = refuse
    __bool__ = __int__ = __float__ = __index__ = __complex__ = __array__ = refuse
    __str__ = __repr__ = __format__ = __hash__ = refuse


def warn_of_assignments(step: str, names: List[str]) -> None:
    """Warn where a step that is compiled sets attributes: they are set at the trace only."""
    if names:
        warn(
            f"{step} sets {', '.join(f'self.{name}' for name in names)} in a compiled step: that "
            "happens once, at the trace, and is forgotten; return or log the value instead.",
        )


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
        error = _would_freeze("batch_idx")
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
