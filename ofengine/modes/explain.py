"""One sentence, with the user's own line, for an error raised while a step was traced."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from typing import Any, Optional

from ofengine._oneflow.tracing import module_of
from ofengine.errors import DataError, GraphModeError, OFEngineError
from ofengine.lines import user_frame, user_line
from ofengine.tracing import TracedIndex, would_freeze

# What the text of an exception tells about the step it comes from.
_READS_VALUES = {
    "tensor.numpy() is not allowed": "reads a tensor's value (`.numpy()`, `float()`, `int()`, "
    "`bool()`, `if tensor`, an f-string)",
    "Only eager scalar tensor support GetItem": "reads a tensor's value (`.item()` or nonzero)",
    "Advanced indexing by boolean(mask)": "indexes with a boolean mask, whose result has no fixed "
    "shape",
}
_BACKWARD = "calls backward() itself: the Trainer calls backward, so leave it out"
_OTHERWISE_WRONG = {
    "has been released": _BACKWARD,
    "donot accept 'retain_graph'": _BACKWARD,
    "eager tensors supported only": "updates weights itself, as by optimizer.step(): the Trainer "
    "calls backward and the optimizer, so leave both out",
    "only support types: Tensor/None": "returns something that is no tensor: return the loss, a "
    "tuple or a dict of tensors",
    "Loss blob not found": "never calls backward(): call it on the loss",
    "Got input tensors with inconsistent attributes": "reads a tensor that is neither of its batch "
    "nor a parameter or buffer of the task, which a graph of several ranks does not take: make it "
    "a buffer, with self.register_buffer(...) in __init__",
    "must be a variable created in nn.Graph": "returns no tensor: return the loss",
}
_NOT_IN_GRAPHS = {
    "This is a oneflow bug": "does what OneFlow cannot trace (autograd.grad, unique, one_hot "
    "without num_classes, normal_, a write by tensors of indices): write it otherwise",
}


def explain(error: BaseException, step: str, index: Optional[TracedIndex] = None) -> OFEngineError:
    """One sentence for an error raised while ``step`` was traced, with the user's own line."""
    if isinstance(error, DataError):
        return error  # of the batch, and not of the trace
    error = error_in_property(error) or error
    line = user_line(error.__traceback__)
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
    for needle, reason in _NOT_IN_GRAPHS.items():
        if needle in text:
            return GraphModeError(
                f"{step} {reason}, or use {_way_out(step)}{at and f' ({at[1:]})'}."
            )
    first = text.splitlines()[0] if text else ""
    return GraphModeError(
        f"{step} cannot be compiled into a static graph{at}: {type(error).__name__}: {first}"
    )


def error_in_property(error: BaseException) -> Optional[AttributeError]:
    """What went wrong in a module's property, where ``error`` says that there is no such attribute.

    Where a property raises an AttributeError, Python asks ``__getattr__`` for it instead, which
    knows nothing of it.
    """
    if not isinstance(error, AttributeError):
        return None
    asked = [f.f_locals for f, _ in traceback.walk_tb(error.__traceback__)
             if f.f_code.co_name == "__getattr__"]  # fmt: skip
    for values in reversed(asked):
        module: Any = module_of(values.get("self"))
        name = values.get("name")
        own = inspect.getattr_static(type(module), name, None) if isinstance(name, str) else None
        if isinstance(own, property):
            try:
                own.__get__(module, type(module))
            except AttributeError as within:
                return error_in_property(within) or within
    return None


def _uses_index(error: BaseException) -> bool:
    """True where OneFlow refused an argument in a line of the user's that names the index."""
    if not isinstance(error, (TypeError, RuntimeError, IndexError, ValueError)):
        return False
    frame, number = user_frame(error.__traceback__)
    if frame is None:
        return False
    line = linecache.getline(frame.f_code.co_filename, number)
    names = [name for name, value in frame.f_locals.items() if isinstance(value, TracedIndex)]
    body = re.sub(r"lambda[^:]*:|^\s*def .*?\)[^:]*:", "", line)  # what follows its arguments
    return any(re.search(rf"\b{re.escape(name)}\b", body) for name in names)


def _way_out(step: str) -> str:
    argument = "eval_mode" if step in ("validation_step", "test_step", "predict_step") else "mode"
    return f'Trainer({argument}="eager")'
