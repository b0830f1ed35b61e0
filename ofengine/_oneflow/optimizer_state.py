"""What an optimizer keeps of each parameter, by the names of eager mode and of graphs."""

from __future__ import annotations

from typing import Any, Dict, Tuple

from oneflow.optim import Optimizer


def default_options(optimizer: Optimizer) -> Dict[str, Any]:
    """The options that every group of ``optimizer`` has."""
    return optimizer._default_options


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


def load_optimizer_state(
    optimizer: Optimizer, parameters: Dict[str, Any], steps: int, states: ParameterStates
) -> None:
    """The inverse of :func:`optimizer_state`; ``parameters`` by name."""
    optimizer._state["step"] = steps
    for name, kept in states.items():
        optimizer._state.setdefault(parameters[name], {}).update(kept)


def split_graph_state(key: str) -> Tuple[str, str]:
    """The parameter's name in the graph, and eager mode's name of what is kept of it."""
    parameter, _, suffix = key.rpartition("-")
    return parameter, _KEY_OF_SUFFIX.get(suffix, suffix)


def graph_state_name(parameter: str, key: str) -> str:
    """The inverse of :func:`split_graph_state`."""
    return f"{parameter}-{_SUFFIX_OF_KEY.get(key, key)}"
