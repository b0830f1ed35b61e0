"""What is different while a step is being traced into a static graph.

A traced step runs once; the compiled graph runs ever after. Whatever Python value the step
read at the trace stays as it was. The values that would change from batch to batch
(``batch_idx``, ``current_epoch``, ``global_step``) are refused there instead of being frozen
silently, and logged tensors are collected so that they become outputs of the graph.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

import oneflow as flow

from ofengine.errors import GraphModeError, warn
from ofengine.lines import is_users_own

_active: Optional[Trace] = None
_NO_TEXT = (
    "a tensor is made a text inside a compiled step (print, str(), an f-string), where it has no "
    "values: log it, or return it and print it in on_train_batch_end"
)


class Trace:
    """Collects what ``log`` records while the ``with`` block traces a step."""

    def __init__(self) -> None:
        self.logs: List[Tuple[Any, Any]] = []
        """``(spec, value)`` in the order of the calls."""
        self.updates: List[Tuple[Any, Dict[str, Any]]] = []
        """``(metric, sums)`` of each update of a metric, in the order of the calls."""
        self.refused: Optional[GraphModeError] = None
        """The first refusal, which the user's code may have caught."""

    def __enter__(self) -> Trace:
        global _active
        self._outer = _active
        _active = self
        # OneFlow dies with a segmentation fault where what is neither tensor nor number is
        # added to a tensor, the index of a traced step for one.
        self._add = flow.Tensor.__add__
        flow.Tensor.__add__ = self._careful_add
        self._texts = flow.Tensor.__str__, flow.Tensor.__repr__
        flow.Tensor.__str__, flow.Tensor.__repr__ = map(self._no_text, self._texts)
        return self

    def __exit__(self, kind: Optional[type], *_: object) -> None:
        global _active
        _active = self._outer
        flow.Tensor.__add__ = self._add
        flow.Tensor.__str__, flow.Tensor.__repr__ = self._texts
        if kind is None and self.refused is not None:
            raise self.refused

    def _no_text(self, text: Callable[[Any], str]) -> Callable[[Any], str]:
        def of_values(tensor: Any) -> str:
            caller = sys._getframe(1).f_code.co_filename
            if tensor.is_lazy and is_users_own(caller):
                raise self.refuse(GraphModeError(_NO_TEXT))
            return text(tensor)

        return of_values

    def refuse(self, error: GraphModeError) -> GraphModeError:
        """Keep ``error``, which is about to be raised, for the end of the trace."""
        self.refused = self.refused or error
        return error

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
        if isinstance(value, float):
            warn(
                f"log({spec.name!r}, {value!r}) in a compiled step: a Python number is read once, "
                "at the trace, and stays as it is; log a tensor, or log it in on_train_batch_end.",
            )
        self.logs.append((spec, value))

    def record_update(self, metric: Any, sums: Dict[str, Any]) -> None:
        """Keep what one batch adds to ``metric``."""
        self.updates.append((metric, sums))


def active_trace() -> Optional[Trace]:
    """The trace going on, or None."""
    return _active


def forbid_in_trace(what: str) -> None:
    """Raise where ``what``, a value that changes from batch to batch, is read in a trace."""
    if _active is not None:
        raise _active.refuse(would_freeze(what))


def would_freeze(what: str) -> GraphModeError:
    """The error about ``what``, a value that changes from batch to batch, in a trace."""
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
        error = would_freeze("batch_idx")
        raise error if _active is None else _active.refuse(error)

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


def warn_of_changes(step: str, names: List[str]) -> None:
    """Warn where a step that is compiled changes what it should change for each batch."""
    if names:
        warn(
            f"{step} changes {', '.join(names[:5])} in a compiled step, whose Python runs once, "
            "at the trace, and not for each batch: do it in on_train_batch_end "
            "(on_validation_batch_end, ...), or make it a buffer, which a compiled step may change."
        )
