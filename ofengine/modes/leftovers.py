"""What a traced step leaves behind in Python: told, and undone.

A trace runs the user's Python once, over tensors without values. What it puts into a list, a dict
or an object, to be looked at after the step, is of no use there; and a layer that it makes is
forgotten with the trace, so that it would never train.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Tuple

from oneflow import nn

from ofengine._oneflow.assignments import telling_assignments
from ofengine._oneflow.tracing import replaces_buffer
from ofengine.errors import GraphModeError, warn
from ofengine.modes import own_draws
from ofengine.modes.holders import Holders, holds_lazy, is_watched
from ofengine.task import TaskModule
from ofengine.tracing import warn_of_changes


@contextlib.contextmanager
def nothing_left_behind(
    task: TaskModule, what: str, has_read: Callable[[nn.Module, str], bool]
) -> Iterator[None]:
    """Trace the step that is called ``what`` in the block; ``has_read`` tells what it read so far.

    Afterwards each list, dict, set and object that the task, or a function of it, can reach holds
    what it held before where the trace has put tensors into it, and a warning tells so: an entry
    or attribute may be a table that is made once and kept.

    Another warning tells of numbers that it changes there, which stay as the trace has left them.

    Raises :class:`GraphModeError` where tensors are collected in a list, set or deque, and where a
    layer is set on a module.
    """
    names = {id(module): name for name, module in task.named_modules()}
    tensors_set: List[str] = []
    numbers_set: List[str] = []
    switches: Dict[str, Tuple[nn.Module, bool]] = {}

    def assigned(module: nn.Module, name: str, value: Any) -> None:
        path = ".".join(filter(None, ["self", names.get(id(module), "?"), name]))
        if _is_layer(value):
            raise GraphModeError(
                f"{path} is a layer that is made, or set, in a compiled step, where it would never "
                "train: make it in __init__ or in setup()"
            )
        if replaces_buffer(module, name, value):
            return  # it is written back
        if name == "training" and module is not task:
            if has_read(module, name) or path in switches:
                switches[path] = (module, value)  # it may be set back
            return
        # Of the task's own another warning tells; of OneFlow's own layers nobody needs to know.
        if module is not task and is_watched(type(module)):
            (tensors_set if holds_lazy(value) else numbers_set).append(path)

    holders = Holders(task)
    try:
        with telling_assignments(assigned):
            yield
    except BaseException:
        holders.undo()
        raise
    found = holders.undo()
    for place, value in holders.moved_on():
        raise own_draws.refuse(what, place, value)
    collected = sorted({place for place, holder in found if holder is not None})
    kept = sorted({*tensors_set, *(place for place, holder in found if holder is None)})
    if collected:
        raise GraphModeError(
            f"{what} collects tensors in {', '.join(collected)} in a compiled step, which is "
            "traced once, over tensors without values: return them and collect them in "
            "on_train_batch_end (on_validation_batch_end, ...), which is given what the step "
            "returns, or log them; a list of what the step itself needs can be a local variable"
        )
    if kept:
        warn(
            f"{what} puts tensors into {', '.join(kept)} in a compiled step, which is traced once, "
            "over tensors without values: they are taken out again. Return or log what is to be "
            "looked at after the step."
        )
    left = [path for path, (module, value) in switches.items() if module.training != value]
    changed = sorted({*numbers_set, *holders.changed(), *left})
    warn_of_changes(what, changed)


def _is_layer(value: Any) -> bool:
    """True for a parameter, or for a module that has some; not for one that stands in a trace."""
    if issubclass(type(value), nn.Module):
        return next(value.parameters(), None) is not None
    return isinstance(value, nn.Parameter)
