"""What both modes do with a step: call it, take its outputs apart, clip its gradients."""

from __future__ import annotations

import inspect
import math
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_state import update_no_graph_makes
from ofengine.data.structure import describe_returned
from ofengine.errors import ConfigurationError, GraphModeError
from ofengine.run.lightning import STEP_ARGUMENTS, mend_for
from ofengine.run.state import Run
from ofengine.run.weighing import check_weight


def step_arity(task: nn.Module, step: str, most: int) -> int:
    """How many of (batch, batch_idx, dataloader_idx) the task's ``step`` takes: 1 to ``most``.

    ``most`` is 2 for ``training_step`` and 3 for the others. Of several optimizers
    ``training_step`` is given the name of one as the third.
    """
    parameters = list(inspect.signature(getattr(task, step)).parameters.values())
    if step == "training_step":
        _refuse_names(task, parameters, most)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return most
    if not positional or len(required) > most:
        raise ConfigurationError(
            f"{type(task).__name__}.{step}{inspect.signature(getattr(task, step))} cannot be "
            f"called: write `def {step}(self, batch, batch_idx)`."
        )
    return min(most, len(positional))


def _refuse_names(task: nn.Module, parameters: Sequence[inspect.Parameter], most: int) -> None:
    """Raise where ``training_step`` would be given something else than the argument's name says."""
    given = [p for p in parameters[:most] if p.kind is not p.VAR_KEYWORD]
    required = [p for p in parameters[most:] if p.default is p.empty]
    for each in parameters if most > 2 else [*given, *required]:
        mend = mend_for(STEP_ARGUMENTS, each.name)
        if mend is not None:
            raise ConfigurationError(
                f"{type(task).__name__}.training_step has the argument {each.name}, which is "
                f"Lightning's: {mend}."
            )
    if most > 2 and len(given) > 2 and _is_number(given[2]):
        raise ConfigurationError(
            f"{type(task).__name__}.training_step takes {given[2]} as its third argument, and is "
            "given the name of the optimizer there: write optimizer_name, a text, and compare it "
            "with the names that configure_optimizers() returns."
        )


def _is_number(parameter: inspect.Parameter) -> bool:
    """True where an argument is said, or called, to be one."""
    return parameter.annotation in (int, "int") or parameter.name.endswith(("idx", "index"))


def split_outputs(outputs: Any, task_name: str) -> Tuple[Any, Dict[str, Any]]:
    """The loss and the rest of what ``training_step`` returned, checked."""
    rest: Dict[str, Any] = {}
    loss = outputs
    if isinstance(outputs, dict):
        if "loss" not in outputs:
            keys = f"its keys: {list(outputs)}" if outputs else "it has no keys"
            raise ConfigurationError(
                f"{task_name}.training_step returned a dict without the key 'loss' ({keys})."
            )
        rest = {key: value for key, value in outputs.items() if key != "loss"}
        if "weight" in rest:
            weight = rest["weight"]
            if type(weight) is not flow.Tensor or weight.dim():  # others need no call
                check_weight(weight, task_name)
        loss = outputs["loss"]
    if not isinstance(loss, flow.Tensor):
        raise ConfigurationError(
            f"{task_name}.training_step returned {describe_returned(loss)} for the loss: return a "
            "tensor of one element, or a dict with it under 'loss'."
        )
    if loss.numel() != 1:
        raise ConfigurationError(
            f"{task_name}.training_step returned a loss of shape {tuple(loss.shape)}: reduce it to "
            "one element, for example with .mean()."
        )
    if not loss.requires_grad:
        raise ConfigurationError(
            f"the loss of {task_name}.training_step depends on no trainable parameter: was it "
            "detached, or is the whole model frozen?"
        )
    return (loss.reshape(()) if loss.dim() else loss), rest


def refuse_own_update(optimizer: Optimizer) -> None:
    """Raise where the user's own update would silently be left out of a graph."""
    own = update_no_graph_makes(optimizer)
    if own is not None:
        raise GraphModeError(
            f"{own} is not called in graph mode, where OneFlow makes the update in the graph: use "
            'mode="eager", or an optimizer of oneflow.optim as it is.'
        )


def clip(run: Run) -> None:
    """Clip the gradients as was asked for: of all parameters that have one, then in each group."""
    settings = run.settings
    if settings.gradient_clip_val is not None:
        every = [each for group in run.made.optimizer.param_groups for each in group.parameters]
        clip_gradients(every, settings.gradient_clip_val, settings.gradient_clip_algorithm)
    clip_in_groups(run.made.optimizer)


def clip_in_groups(optimizer: Optimizer) -> None:
    """Clip each group alone that asks for it by ``clip_grad_max_norm``.

    Graphs do the same and leave OneFlow's own pass out, which computes another norm: it adds up
    all squares of a group in one float32 number, parameter by parameter in the order of a hash.
    """
    for group in optimizer.param_groups:
        if "clip_grad_max_norm" in group and "clip_grad_norm_type" in group:
            clip_by_norm(
                group.parameters, group["clip_grad_max_norm"], group["clip_grad_norm_type"]
            )


def clip_gradients(parameters: Iterable[Any], clip_val: float, algorithm: str) -> None:
    """Clip the gradients of all parameters together, replacing each ``.grad``.

    The algorithm "norm" is :func:`clip_by_norm` with the 2-norm; "value" limits each entry to
    [-clip_val, clip_val]. Works on eager and on lazy gradients alike.
    """
    if algorithm == "norm":
        clip_by_norm(parameters, clip_val, 2.0)
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clamp(min=-clip_val, max=clip_val)


def clip_by_norm(parameters: Iterable[Any], max_norm: float, norm_type: float) -> None:
    """Multiply all gradients by ``min(1, max_norm / (total_norm + 1e-6))``, replacing each.

    ``total_norm`` is the norm of all of them taken as one vector. The operations are those of
    ``oneflow.nn.utils.clip_grad_norm_``, in its order; works on lazy gradients too.
    """
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not having:
        return
    gradients = [parameter.grad.detach() for parameter in having]
    norm_type = float(norm_type)
    if math.isinf(norm_type):
        largest = norm_type > 0
        norms = [each.abs().max() if largest else each.abs().min() for each in gradients]
        reduce = flow.max if largest else flow.min
        total = norms[0] if len(norms) == 1 else reduce(flow.stack(norms))
    else:
        norms = [flow.linalg.vector_norm(each, norm_type) for each in gradients]
        total = flow.linalg.vector_norm(flow.stack(norms), norm_type)
    factor = flow.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for parameter in having:
        parameter.grad = parameter.grad * factor


def trained_parameters(run: Run) -> List[Any]:
    """The parameters of all groups that train now, in the groups' order; none before ``fit``."""
    if run.optimization is None:
        return []
    return [
        parameter
        for group in run.optimization.optimizer.param_groups
        for parameter in group.parameters
        if parameter.requires_grad
    ]


def drop_gradients_of_frozen(optimizer: Optimizer) -> None:
    """Leave a parameter as it is that was frozen within an accumulation window."""
    for group in optimizer.param_groups:
        for parameter in group.parameters:
            if not parameter.requires_grad:
                parameter.grad = None
