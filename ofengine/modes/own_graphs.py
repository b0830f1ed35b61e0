"""Graphs of the user's own, from ``build_graph``: what they must do, what they give back."""

from __future__ import annotations

from typing import Any, Iterable

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs
from ofengine.callback import overrides
from ofengine.data.structure import describe
from ofengine.errors import ConfigurationError, GraphModeError
from ofengine.run.state import Run
from ofengine.task import TaskModule


def has_own_graph(task: TaskModule) -> bool:
    """True where the user overrides ``build_graph``."""
    return overrides(task, "build_graph", TaskModule)


def check_own_graph(graph: Any, run: Run, known: Iterable[Any]) -> None:
    """Refuse what a graph of the user's own cannot be made to do; ``known`` are earlier ones."""
    name = type(graph).__name__
    if not isinstance(graph, nn.Graph):
        raise ConfigurationError(
            f"build_graph() returned {describe(graph)}: return an instance of a "
            "oneflow.nn.Graph subclass."
        )
    if graphs.is_compiled(graph) or any(graph is each for each in known):
        raise ConfigurationError(
            f"build_graph() returned a {name} that was compiled before: it is called once for "
            "each shape of batch, and must make a new graph each time."
        )
    optimizers = graphs.optimizers_of(graph)
    if optimizers != [run.made.optimizer]:
        raise ConfigurationError(
            f"{name} must train with the task's optimizer: call "
            "self.add_optimizer(task.optimizer) once in its __init__, where task.optimizer is "
            "what configure_optimizers() returned."
        )
    if run.settings.gradient_clip_val is not None:
        raise ConfigurationError(
            f"gradient_clip_val cannot reach into {name}: clip in its build, after backward, "
            "or leave build_graph() as it is."
        )
    if any(s is not run.made.scheduler for s in graphs.schedulers_of(graph)):
        raise ConfigurationError(
            f"{name} has a scheduler that the rate plan does not know: return it from "
            "configure_optimizers() too."
        )


def loss_of(graph: Any, outputs: Any) -> Any:
    """The loss, of no dimension, among what a run of the user's own ``graph`` gave."""
    if isinstance(outputs, dict) and "loss" in outputs:
        loss = outputs["loss"]
    elif isinstance(outputs, (tuple, list)) and outputs:
        loss = outputs[0]
    elif isinstance(outputs, flow.Tensor):
        loss = outputs
    else:
        raise ConfigurationError(
            f"the graph of build_graph() returned {describe(outputs)}, which holds no loss: let "
            "build return the loss, a tuple with the loss first, or a dict with it under 'loss'."
        )
    if loss.numel() == graphs.micro_batches(graph) > 1:
        return loss.mean()  # of the parts into which the graph cuts a batch
    if loss.numel() != 1:
        raise ConfigurationError(
            f"{type(graph).__name__}.build returned a loss of shape {tuple(loss.shape)}: "
            "reduce it to one element, for example with .mean()."
        )
    return loss.reshape(()) if loss.ndim else loss


def gradients_are_left(run: Run) -> bool:
    """True where a hook has left gradients to which those of the next step are to be added.

    Raises :class:`GraphModeError` where a graph of the user's own would leave them out.
    """
    are_left = any(each.grad is not None for each in run.parameters)
    if are_left and has_own_graph(run.task):
        raise GraphModeError(
            "parameters have a .grad, which a hook has left and to which eager mode would add the "
            f"step's, and {type(run.task).__name__}.build_graph() takes none: call "
            "optimizer.zero_grad(set_to_none=True) in that hook."
        )
    return are_left
