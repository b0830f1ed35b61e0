"""What both modes do with a step: call it, take its outputs apart, clip its gradients."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Iterable, Tuple

import oneflow as flow
from oneflow import nn

from ofengine.data.structure import describe_returned
from ofengine.errors import ConfigurationError
from ofengine.run.state import Run


def step_arity(task: nn.Module, step: str, most: int) -> int:
    """How many of (batch, batch_idx, dataloader_idx) the task's ``step`` takes: 1 to ``most``.

    ``most`` is 2 for ``training_step`` and 3 for the others.
    """
    parameters = list(inspect.signature(getattr(task, step)).parameters.values())
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


def split_outputs(outputs: Any, task_name: str) -> Tuple[Any, Dict[str, Any]]:
    """The loss and the rest of what ``training_step`` returned, checked."""
    rest: Dict[str, Any] = {}
    loss = outputs
    if isinstance(outputs, dict):
        if "loss" not in outputs:
            raise ConfigurationError(
                f"{task_name}.training_step returned a dict without the key 'loss' "
                f"(its keys: {list(outputs)})."
            )
        rest = {key: value for key, value in outputs.items() if key != "loss"}
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


def clip_in_groups(optimizer: Any) -> None:
    """Clip the groups that ask for it by ``clip_grad_max_norm``, each alone, as graphs do."""
    for group in optimizer.param_groups:
        if "clip_grad_max_norm" in group and "clip_grad_norm_type" in group:
            nn.utils.clip_grad_norm_(
                group.parameters, group["clip_grad_max_norm"], group["clip_grad_norm_type"]
            )


def clip(run: Run) -> None:
    """Clip the gradients of all parameters that train together, where that was asked for."""
    settings = run.settings
    if settings.gradient_clip_val is not None:
        clip_gradients(run.parameters, settings.gradient_clip_val, settings.gradient_clip_algorithm)


def clip_gradients(parameters: Iterable[Any], clip_val: float, algorithm: str) -> None:
    """Clip the gradients of all parameters together, replacing each ``.grad``.

    With the algorithm "norm", all gradients are multiplied by
    ``min(1, clip_val / (total_norm + 1e-6))`` where ``total_norm`` is the 2-norm of all of them
    taken as one vector, as in ``oneflow.nn.utils.clip_grad_norm_``; with "value", each entry is
    limited to [-clip_val, clip_val]. Works on eager and on lazy gradients alike.
    """
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not having:
        return
    if algorithm == "value":
        for parameter in having:
            parameter.grad = parameter.grad.clamp(min=-clip_val, max=clip_val)
        return
    norms = [flow.linalg.vector_norm(parameter.grad.detach()) for parameter in having]
    total = flow.linalg.vector_norm(flow.stack(norms))
    factor = flow.clamp(clip_val / (total + 1e-6), max=1.0)
    for parameter in having:
        parameter.grad = parameter.grad * factor
