"""What an optimizer keeps of each parameter, by the names of eager mode and of graphs."""

from __future__ import annotations

import inspect
import traceback
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, Optional, Set, Tuple

from oneflow.optim import Optimizer
from oneflow.optim.optimizer import _decorate_step


def default_options(optimizer: Optimizer) -> Dict[str, Any]:
    """The options that every group of ``optimizer`` has."""
    return optimizer._default_options


def is_of_empty_list(error: IndexError) -> bool:
    """True where an optimizer raised ``error`` because it was given an empty list to train."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code is Optimizer._parse_input_parameters.__code__


def own_options(optimizer: Optimizer) -> Set[str]:
    """The options that ``optimizer`` writes itself, such as ``bias_correction1`` of Adam.

    They are those that nobody can give: no constructor of its classes takes them.
    """
    taken: Set[str] = set()
    for each in type(optimizer).__mro__:
        if "__init__" in vars(each) and each not in (Optimizer, object):
            taken.update(inspect.signature(vars(each)["__init__"]).parameters)
    return set(optimizer._default_options) - taken


def update_no_graph_makes(optimizer: Optimizer) -> Optional[str]:
    """The method of the user's own that updates in eager mode, but in no graph; None without one.

    A graph makes the update of that class which tells it how (``_generate_conf_for_graph``).
    """
    step = getattr(optimizer.step, "__code__", None)
    if step is not _decorate_step(None).__code__:  # as Optimizer.__init__ has made it
        return f"the step that was put into the {type(optimizer).__qualname__} object"
    for each in type(optimizer).__mro__:
        for method in ("step", "_single_tensor_update", "_fused_update"):
            if method in vars(each) and "_generate_conf_for_graph" not in vars(each):
                return f"{each.__qualname__}.{method}"
        if "_generate_conf_for_graph" in vars(each):
            break
    return None


@contextmanager
def clipped_in_build(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Compile graphs that leave out OneFlow's own clipping of groups: their build has clipped."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    asked = [group._enable_clip_grad for group in groups]
    for group in groups:
        group._enable_clip_grad = False
    try:
        yield
    finally:
        for group, ask in zip(groups, asked):
            group._enable_clip_grad = ask


@contextmanager
def leaving_out(optimizers: Iterable[Optimizer], parameters: Iterable[Any]) -> Iterator[None]:
    """In the block let ``optimizers`` have those of their parameters alone that are given.

    Of the others a graph knows nothing, and is not compiled; an eager step passes them by.
    """
    known = {id(each) for each in parameters}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    kept = [group._parameters for group in groups]
    for group, own in zip(groups, kept):
        group._parameters = [each for each in own if id(each) in known]
    try:
        yield
    finally:
        for group, own in zip(groups, kept):
            group._parameters = own


TRAIN_STEP = "System-Train-TrainStep"
"""The name of the step counter among the states of a graph."""

_SUFFIX_OF_KEY = {
    "momentum_buf": "momentum",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "max_v",
    "square_avg": "mean_square",
    "grad_avg": "mean_gradient",
    "sum": "sum",
    "square_avgs": "square_avgs",
    "acc_deltas": "acc_deltas",
}
"""How a graph calls what an optimizer keeps of a parameter in eager mode."""
_KEY_OF_SUFFIX = {suffix: key for key, suffix in _SUFFIX_OF_KEY.items()}

ParameterStates = Dict[str, Dict[str, Any]]
"""What an optimizer keeps of each parameter: tensors by eager mode's names."""


def optimizer_state(optimizer: Optimizer, names: Dict[int, str]) -> Tuple[int, ParameterStates]:
    """The steps that ``optimizer`` made and what it keeps, in eager mode; live memory.

    ``names`` are the parameters' names by their ``id``.
    """
    states = {
        names[id(parameter)]: dict(kept)
        for parameter, kept in optimizer._state.items()
        if not isinstance(parameter, str) and kept and id(parameter) in names
    }
    return int(optimizer._state.get("step", 0)), states


def split_graph_state(key: str) -> Tuple[str, str]:
    """The parameter's name in the graph, and eager mode's name of what is kept of it."""
    parameter, _, suffix = key.rpartition("-")
    return parameter, _KEY_OF_SUFFIX.get(suffix, suffix)


def graph_state_name(parameter: str, key: str) -> str:
    """The inverse of :func:`split_graph_state`."""
    return f"{parameter}-{_SUFFIX_OF_KEY.get(key, key)}"
