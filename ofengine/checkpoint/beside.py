"""What a task and callbacks hold that trains along and is in no ``state_dict``.

Buffers with ``persistent=False``, tensors that are plain attributes of a module, and optimizers
that are not the run's own: where training changes them, a checkpoint keeps them.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, Iterator, List, Mapping, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_copies import other_state, replace_other_state
from ofengine.checkpoint.checks import Misfit, array, by_name, check_fits, listed, number, plain
from ofengine.checkpoint.file import array_of
from ofengine.run.state import Run, State

MOST_NEW = 2**16
"""A tensor that was not there when training began, or had another shape, is kept up to so many
numbers: it may be what a step keeps for a mean, or just its last activations."""
_HELD_BY_MODULES = ("_parameters", "_modules", "_buffers")
_RATES = ("lr", "initial_lr")
"""The options of an optimizer that go on as they were; of all others the code's count."""


# ---------------------------------------------------------------------- tensors


def tensors_beside(task: nn.Module) -> Dict[str, Any]:
    """The tensors of ``task`` that are in no ``state_dict``, by place; live memory."""
    kept = {id(tensor) for tensor in task.state_dict(keep_vars=True).values()}
    found: Dict[str, Any] = {}
    for name, module in task.named_modules():
        for place, holder, key in _places(module):
            tensor = holder[key]
            is_own = isinstance(tensor, flow.Tensor) and not isinstance(tensor, nn.Parameter)
            if is_own and not tensor.is_lazy and id(tensor) not in kept:
                found[f"{name}.{place}" if name else place] = tensor
    return found


def _places(module: nn.Module) -> Iterator[Tuple[str, Any, Any]]:
    """(place, what holds it, under which key) of whatever ``module`` holds itself."""
    attributes = vars(module)
    for key in attributes.get("_buffers", {}):
        yield key, attributes["_buffers"], key
    for name, value in attributes.items():
        if name in _HELD_BY_MODULES:
            continue
        yield name, attributes, name
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", value, i) for i in range(min(len(value), 100)))
        elif isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", value, key) for key in list(value)[:100])


def digest_of(tensor: Any) -> str:
    """What tells the numbers, shape and dtype of ``tensor`` from others."""
    values = np.ascontiguousarray(tensor.numpy())
    text = f"{values.dtype}{values.shape}".encode()
    return hashlib.blake2b(text + values.tobytes(), digest_size=16).hexdigest()


def changed_tensors(
    run: Run, copies: Mapping[str, Any]
) -> Tuple[Dict[str, np.ndarray], Dict[str, str]]:
    """The tensors that training has changed so far, and digests of those left out, by place.

    A tensor is among them for good once a checkpoint had it. ``copies`` stand for some of them.
    """
    begun = run.tensors_at_start
    changed: Dict[str, np.ndarray] = {}
    left_out: Dict[str, str] = {}
    for place, tensor in tensors_beside(run.task).items():
        tensor = copies.get(place, tensor)
        shape, before = begun.get(place, (None, ""))
        if place not in run.changed_before and shape == tuple(tensor.shape):
            if digest_of(tensor) == before:
                continue
        elif shape != tuple(tensor.shape) and tensor.numel() > MOST_NEW:
            left_out[place] = digest_of(tensor)  # told where the run is resumed
            continue
        changed[place] = array_of(tensor)
    return changed, left_out


def check_tensors(task: nn.Module, kept: Mapping[str, np.ndarray], where: str) -> None:
    """Raise :class:`CheckpointError` where a tensor that is there has another shape or dtype."""
    own = tensors_beside(task)
    for place, values in kept.items():
        if place in own:
            shape, dtype = tuple(own[place].shape), own[place].numpy().dtype
            check_fits(values, array("biuf", shape, dtype), f"{where}: the tensor {place!r}")


def put_tensors(task: nn.Module, kept: Mapping[str, np.ndarray], device: Any) -> List[str]:
    """Write ``kept`` into the tensors of ``task``; return the places that take none.

    An attribute that is None gets a new tensor; one that is not there is not made.
    """
    own, lost = tensors_beside(task), []
    modules = dict(task.named_modules())
    for place, values in kept.items():
        tensor = own.get(place)
        if tensor is not None and _is_like(tensor, values):
            with flow.no_grad():
                tensor.copy_(flow.tensor(values, dtype=tensor.dtype).to(tensor.device))
            continue
        module, name = modules.get(place.rpartition(".")[0]), place.rpartition(".")[2]
        held = {} if module is None else {**vars(module).get("_buffers", {}), **vars(module)}
        if held.get(name, ...) is not None:
            lost.append(place)
            continue
        setattr(module, name, flow.tensor(values).to(device))
    return lost


def _is_like(tensor: Any, values: np.ndarray) -> bool:
    return tuple(tensor.shape) == values.shape and tensor.numpy().dtype == values.dtype


# ---------------------------------------------------------------------- optimizers


def other_optimizers(run: Run) -> Dict[str, Optimizer]:
    """The optimizers that the task's modules and the callbacks hold, but the run's, by place."""
    owners = [(f"task.{name}" if name else "task", m) for name, m in run.task.named_modules()]
    owners += [(callback.state_key, callback) for callback in run.callbacks]
    found: Dict[str, Optimizer] = {}
    seen: Set[int] = {id(each.made.optimizer) for each in run.each().values()}
    for owner, each in owners:
        for name, value in vars(each).items():
            for place, inner in _one_by_one(name, value):
                if isinstance(inner, Optimizer) and id(inner) not in seen:
                    seen.add(id(inner))
                    place = f"{owner}.{place}"
                    found[f"{place} ({len(found)})" if place in found else place] = inner
    return found


def _one_by_one(name: str, value: Any) -> Iterator[Tuple[str, Any]]:
    """What an attribute is, or the list or dict that it is holds."""
    if isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", inner) for i, inner in enumerate(value[:100]))
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", value[key]) for key in list(value)[:100])
    else:
        yield name, value


def states_of_others(run: Run) -> State:
    """What the other optimizers keep, by place; none that made no step."""
    return {
        place: state
        for place, state in (
            (place, _as_arrays(*other_state(each))) for place, each in other_optimizers(run).items()
        )
        if state["steps"] or state["states"]
    }


def _as_arrays(kind: str, steps: int, options: List[State], states: State) -> State:
    arrays = {
        name: {key: array_of(value) for key, value in kept.items()} for name, kept in states.items()
    }
    return {"class": kind, "steps": steps, "options": options, "states": arrays}


def check_others(others: Mapping[str, Optimizer], kept: Mapping[str, State], where: str) -> None:
    """Raise :class:`CheckpointError` where one that is there could not take its state."""
    for place, state in kept.items():
        if place in others:
            check_fits(state, _as(others[place]), f"{where}: the optimizer {place}")


def _as(optimizer: Optimizer) -> Any:
    """The check of a state for ``optimizer``."""
    kind, _, options, _ = other_state(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group.parameters]

    def check(state: State, place: str) -> None:
        if state["class"] != kind:
            raise Misfit(f"it was a {state['class']}, and is a {kind} now")
        listed(by_name(plain), len(options))(state["options"], "options")
        for index, before in enumerate(state["options"]):
            for key in _RATES:
                number(0)(before.get(key, 0.0), f"options/{index}/{key}")
        for index, held in state["states"].items():
            if not index.isdecimal() or int(index) >= len(parameters):
                raise Misfit(f"it kept something of parameter {index}, which is not there")
            parameter = parameters[int(index)]
            shape, dtype = tuple(parameter.shape), parameter.numpy().dtype
            by_name(array("f", shape, dtype))(held, f"states/{index}")

    return check


def put_others(others: Mapping[str, Optimizer], kept: Mapping[str, State], device: Any) -> None:
    """Let those that are there go on from ``kept``, which was checked."""
    for place, state in kept.items():
        if place in others:
            states = {
                index: {key: flow.tensor(values).to(device) for key, values in held.items()}
                for index, held in state["states"].items()
            }
            rates = [{key: each[key] for key in _RATES if key in each} for each in state["options"]]
            replace_other_state(others[place], state["steps"], rates, states)
