"""An optimizer's state copied, put back, made anew; what an optimizer of a class keeps at all."""

from __future__ import annotations

import warnings
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_state import ParameterStates

State = Tuple[Dict[Any, Any], List[Dict[str, Any]]]
"""What an optimizer keeps, by parameter, and the options of its groups."""


def copied_state(optimizer: Optimizer) -> State:
    """A copy of all that ``optimizer`` keeps, for :func:`put_state_back`."""
    kept: Dict[Any, Any] = {}
    for key, value in optimizer._state.items():
        kept[key] = {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
    return kept, [dict(group.options) for group in optimizer.param_groups]


def put_state_back(optimizer: Optimizer, state: State) -> None:
    """Let ``optimizer`` be as it was when :func:`copied_state` was called."""
    kept, options = state
    optimizer._state.clear()
    optimizer._state.update(kept)
    for group, own in zip(optimizer.param_groups, options):
        group.options.clear()
        group.options.update(own)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, flow.Tensor) else value


def replace_state(
    optimizer: Optimizer, parameters: Dict[str, Any], steps: int, states: ParameterStates
) -> None:
    """Let ``optimizer`` keep ``states``, and of all other parameters what a new one keeps.

    Args:
        optimizer: the optimizer.
        parameters: its parameters by name.
        steps: the steps that it has made.
        states: what it is to keep of them, by name.
    """
    optimizer._state["step"] = steps
    for group in optimizer.param_groups:
        for parameter in group.parameters:
            if optimizer._state.get(parameter):
                twin = _another(optimizer, group.options, parameter)
                optimizer._state[parameter] = {} if twin is None else twin._state[parameter]
    for name, kept in states.items():
        optimizer._state[parameters[name]] = dict(kept)


def state_of(optimizer: Optimizer, parameter: Any) -> Dict[str, Any]:
    """What ``optimizer`` keeps of ``parameter``; live memory."""
    return dict(optimizer._state.get(parameter) or {})


def put_state_of(optimizer: Optimizer, parameter: Any, kept: Dict[str, Any]) -> None:
    """Let ``optimizer`` keep this of ``parameter``, and nothing else."""
    optimizer._state[parameter] = kept


def keys_kept(optimizer: Optimizer) -> List[Optional[FrozenSet[str]]]:
    """For each group the names of what ``optimizer`` keeps of a parameter that it has stepped.

    Found by letting another one of its class make a step; None where none can be made.
    """
    found: List[Optional[FrozenSet[str]]] = []
    for group in optimizer.param_groups:
        parameter = nn.Parameter(flow.ones(1))
        twin = _another(optimizer, group.options, parameter)
        if twin is None:
            found.append(None)
            continue
        parameter.grad = flow.zeros(1)
        twin.step()
        found.append(frozenset(twin._state[parameter]))
    return found


def _another(optimizer: Optimizer, options: Dict[str, Any], parameter: Any) -> Optional[Optimizer]:
    """An optimizer of the same class over ``parameter`` alone; None where it takes more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made: Optimizer = type(optimizer)([{**options, "params": [parameter]}])
        except Exception:  # of a user's own class, with other arguments
            return None
    return made


def other_state(optimizer: Optimizer) -> Tuple[str, int, List[Dict[str, Any]], ParameterStates]:
    """The class, the steps, the plain options of each group, and what is kept of each parameter.

    The parameters go by their number over all groups, as a text.
    """
    parameters = [p for group in optimizer.param_groups for p in group.parameters]
    states = {
        str(number): {k: v for k, v in kept.items() if isinstance(v, flow.Tensor)}
        for number, kept in enumerate(optimizer._state.get(p, {}) for p in parameters)
        if kept
    }
    options = [
        {key: value for key, value in group.options.items() if key != "params" and is_plain(value)}
        for group in optimizer.param_groups
    ]
    return type(optimizer).__qualname__, int(optimizer._state.get("step", 0)), options, states


def replace_other_state(
    optimizer: Optimizer, steps: int, options: List[Dict[str, Any]], states: ParameterStates
) -> None:
    """The inverse of :func:`other_state`; of the ``options`` those that are there are changed."""
    parameters = [p for group in optimizer.param_groups for p in group.parameters]
    replace_state(optimizer, {str(n): p for n, p in enumerate(parameters)}, steps, states)
    for group, kept in zip(optimizer.param_groups, options):
        group.options.update({key: value for key, value in kept.items() if key in group.options})


def is_plain(value: Any) -> bool:
    """True for None, booleans, numbers, texts, and lists and tuples of these."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))
