"""What surrounds the compiling of a graph: what is refused before, what is kept away during it."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from typing import Any, Callable, Iterator, List, Sequence

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs
from ofengine._oneflow.lazy_names import forget_lazy_names
from ofengine._oneflow.operators import random_operations
from ofengine._oneflow.shapes import checking_shapes
from ofengine._oneflow.tracing import (
    calling_any_module,
    checkpointing_nothing,
    has_forward_hooks,
)
from ofengine.errors import ConfigurationError, GraphModeError, OFEngineError, warn
from ofengine.modes.compiled import Compiled
from ofengine.modes.draws import warn_of_unfed
from ofengine.modes.explain import explain
from ofengine.modes.guards import Guards
from ofengine.modes.in_place import Written
from ofengine.modes.labels import noting_labels
from ofengine.modes.leftovers import nothing_left_behind
from ofengine.modes.own_graphs import has_own_graph
from ofengine.run.precision import FULL
from ofengine.run.settings import Settings
from ofengine.task import TaskModule


def refuse_what_graphs_ignore(task: TaskModule) -> None:
    """Raise where a module does something that would silently be left out of a graph."""
    for name, module in task.named_modules():
        where = f"{type(task).__name__}.{name}" if name else type(task).__name__
        if has_forward_hooks(module):
            raise GraphModeError(
                f"{where} has a forward hook (register_forward_hook, register_forward_pre_hook or "
                "weight_norm), which OneFlow does not call in a static graph: write what it does "
                'into forward, or use mode="eager".'
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise GraphModeError(
                f"{where} has max_norm={module.max_norm}, to which OneFlow does not keep in a "
                'static graph: leave it out, or use mode="eager".'
            )


def refuse_doubles(task: TaskModule, parameters: Sequence[Any]) -> None:
    """Raise where a graph is to update float64; OneFlow's compiler ends the process at the next."""
    if any(each.dtype == flow.float64 for each in parameters):
        names = [n for n, p in task.named_parameters() if p.dtype == flow.float64]
        raise GraphModeError(
            f"{', '.join(names[:4])}{', ...' if names[4:] else ''} of {type(task).__name__} is "
            "float64, for which OneFlow's graphs have no update: call float() of the task, and of "
            'the batches, or use Trainer(mode="eager").'
        )


def check_inputs(inputs: Any, what: str) -> None:
    """Raise where a tensor is empty (OneFlow's compiler ends the process over it) or global."""
    if isinstance(inputs, (list, tuple)):
        for each in inputs:
            check_inputs(each, what)
    elif isinstance(inputs, flow.Tensor) and inputs.is_global:
        raise GraphModeError(
            f"the batch of {what} holds a global tensor, of shape {tuple(inputs.shape)}: a task "
            "trains on local tensors of one device. Take it with to_local()."
        )
    elif isinstance(inputs, flow.Tensor) and inputs.numel() == 0:
        raise GraphModeError(
            f"the batch of {what} holds an empty tensor, of shape {tuple(inputs.shape)}, which a "
            'static graph cannot take: leave it out of the batch, or use mode="eager" (for '
            'evaluation eval_mode="eager").'
        )


def configure(graph: nn.Graph, task: TaskModule, settings: Settings, is_ours: bool) -> None:
    """Set the switches of ``graph``, which is to be compiled; the task's are checked."""
    if graphs.graphs_compiled() >= graphs.MOST_GRAPHS:
        raise GraphModeError(
            f"this process has compiled {graphs.graphs_compiled():,} graphs, and OneFlow "
            "aborts a process at about the 1,365th: go on in a new one, from a checkpoint with "
            "fit(..., ckpt_path='last')."
        )
    if is_ours and settings.precision != FULL:
        graphs.mix_precision(graph, settings.precision)
    task.configure_graph(graph.config)
    _check_switches(graph, task, settings, is_ours)


def _check_switches(graph: nn.Graph, task: TaskModule, settings: Settings, is_ours: bool) -> None:
    """Refuse, of OneFlow's switches that ``graph`` has on, what would compute something else."""
    steps = graphs.micro_batches(graph)
    if steps > 1 and is_ours:
        mend = (
            "call it on the config of the graph that build_graph() makes"
            if has_own_graph(task)
            else f"use Trainer(accumulate_grad_batches={steps}), which accumulates whole "
            "batches in both modes"
        )
        raise ConfigurationError(
            f"configure_graph called set_gradient_accumulation_steps({steps}), which would cut "
            f"each batch into {steps}: {mend}."
        )
    if graphs.splits_optimizer_state(graph) and settings.world_size > 1:
        raise ConfigurationError(
            "enable_zero(True) leaves each rank a part of the optimizer's state, of which a "
            "checkpoint has the whole, and ends the process on CPUs: leave it out."
        )
    precision = graphs.precision_of(graph)
    if settings.precision != FULL:
        if is_ours and precision != settings.precision:
            raise ConfigurationError(
                f'configure_graph called enable_amp(), which makes precision="{precision}" of '
                f'Trainer(precision="{settings.precision}"): leave out one of them.'
            )
    elif precision != FULL and settings.device.type == "cpu":
        warn(
            "enable_amp(True) changes nothing on a CPU, where OneFlow computes in float32 all the "
            'same: leave it out, or use Trainer(device="cuda").'
        )


@contextlib.contextmanager
def no_garbage_collected() -> Iterator[None]:
    """Keep the garbage collector from deleting an old graph while a new one is compiled.

    ``nn.Graph.__del__`` resets a table of variables that all graphs share. Where that happens
    in the middle of a compilation, it fails: "must be a variable created in nn.Graph".
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def compile_quietly() -> Iterator[None]:
    """Hold back the copy of an exception's text that ``nn.Graph`` prints to stderr."""
    held, stderr = io.StringIO(), sys.stderr
    sys.stderr = held
    text = ""
    try:
        yield
    except BaseException as error:
        text = f"{error}\n" if str(error) else ""
        raise
    finally:
        sys.stderr = stderr
        stderr.write(held.getvalue().replace(text, "") if text else held.getvalue())


def trace(
    task: TaskModule,
    guards: Guards,
    graph: nn.Graph,
    run: Callable[[nn.Graph, Sequence[Any]], None],
    inputs: Sequence[Any],
    what: str,
) -> None:
    """Let ``run`` trace ``graph``, called ``what`` in errors; ``guards`` note what it reads."""
    graphs.mute(graph)
    forget_lazy_names()
    try:
        with _without_gradients(task), contextlib.ExitStack() as stack:
            stack.enter_context(nothing_left_behind(task, what, guards.has_read))
            stack.enter_context(noting_labels(task, graph, inputs))
            for each in (compile_quietly, no_garbage_collected, checking_shapes):
                stack.enter_context(each())
            stack.enter_context(checkpointing_nothing())
            stack.enter_context(calling_any_module())
            stack.enter_context(guards.reading())
            run(graph, inputs)
    except OFEngineError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise explain(error, what, getattr(graph, "index", None)) from None
    except Exception as error:
        raise explain(error, what, getattr(graph, "index", None)) from error


def warn_of_draws(graph: nn.Graph, what: str, is_ours: bool) -> None:
    """Tell of random numbers that ``graph``, called ``what``, draws otherwise than eager mode."""
    own = "where that matters, leave build_graph() as it is"
    mend = "call flow.rand and its like by these names, or draw in the dataset"
    warn_of_unfed(what, random_operations(graph), mend if is_ours else own)


def wait_for_reads(compiled: Compiled, task: TaskModule, updates: bool) -> None:
    """Let each run wait for what is done to the tensors that the trace of ``compiled`` read."""
    written: List[Written] = getattr(compiled.graph, "written", [])  # not of the user's own
    beside = [each.tensor for each in written if not each.places]
    compiled.batch_norms.refuse(written)
    read = compiled.watch.tensors(task)
    tensors = [*read, *compiled.batch_norms.scratch, *beside]
    graphs.depend_on(compiled.graph, list({id(each): each for each in tensors}.values()))
    if updates:
        warn_of_gradients(task, read)


def warn_of_gradients(task: TaskModule, beside: Sequence[Any]) -> None:
    """Tell of what trains among the tensors that a step reads and that are not its task's.

    An eager ``backward`` of the step adds to their ``.grad``, which a graph cannot do.
    """
    training = [each for each in beside if each.is_leaf and each.requires_grad]
    if training:
        shapes = ", ".join(str(tuple(each.shape)) for each in training[:4])
        warn(
            f"the step of {type(task).__name__} reads {len(training)} tensor(s) that train and are "
            f"in no module of the task (of shape {shapes}{', ...' if training[4:] else ''}): eager "
            "mode adds the step's gradients to theirs, graph mode does not. Call zero_grad() of "
            "their own optimizer before its backward(), and both modes are the same; and keep "
            "what it has come to in on_save_checkpoint()."
        )


@contextlib.contextmanager
def _without_gradients(task: TaskModule) -> Iterator[None]:
    """Trace without gradients, over which no graph can be compiled, and leave no lazy ones.

    Those that an eager window has added up so far come back: a validation in graph mode may be
    compiled in the middle of it.
    """
    kept = [(p, p.grad) for p in task.parameters() if p.grad is not None and not p.grad.is_lazy]
    for parameter in task.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in task.parameters():
            parameter.grad = None
        for parameter, gradient in kept:
            parameter.grad = gradient
