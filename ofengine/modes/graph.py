"""Graph mode: each step is a static graph, compiled once for each shape of batch.

Without accumulation a step is one graph: forward, backward, clipping and update. With
accumulation a gradient graph runs for each batch of a window, its gradients are added up as
eager mode adds them, and an apply graph does clipping and update, whatever the window's
length. All graphs that update share one memory for the optimizer's state and step counter.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Hashable, List, Optional, Sequence, Tuple

import attrs
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine import _oneflow
from ofengine._launch_race import mend_or_tell
from ofengine.data import Structure, describe, flatten, unflatten
from ofengine.errors import ConfigurationError, GraphModeError, OFEngineError, warn
from ofengine.hooks import HookRunner, overrides
from ofengine.modes.batch_norms import counted_batch_norms
from ofengine.modes.compiling import (
    compile_quietly,
    no_garbage_collected,
    refuse_what_graphs_ignore,
)
from ofengine.modes.draws import (
    Draws,
    DrawsMet,
    active_dropouts,
    warn_of_unfed,
)
from ofengine.modes.step_graphs import (
    ApplyGraph,
    EvalGraph,
    GradientGraph,
    ProbeGraph,
    StepGraph,
    TrainGraph,
)
from ofengine.task import TaskModule
from ofengine.tracing import explain

if TYPE_CHECKING:
    from ofengine.trainer import Trainer

log = logging.getLogger("ofengine")


_MANY_GRAPHS = 8


def has_own_graph(task: TaskModule) -> bool:
    """True where the user overrides ``build_graph``."""
    return overrides(task, "build_graph", TaskModule)


@attrs.define
class _Compiled:
    """A graph, with what its calls need."""

    graph: Any
    draws: Draws
    batch_norms: Dict[Any, int] = attrs.Factory(dict)
    """How often one run calls each batch norm."""
    runs: int = 0
    """Runs since ``num_batches_tracked`` was brought up to date."""


class GraphMode:
    """Runs the steps of one task as static graphs."""

    def __init__(self, trainer: Trainer, task: TaskModule, hooks: HookRunner) -> None:
        _oneflow.start_session()
        mend_or_tell()
        self.trainer = trainer
        self.task = task
        self._hooks = hooks
        self._steps: Dict[Hashable, _Compiled] = {}
        self._applies: Dict[Tuple[int, ...], _Compiled] = {}
        self._evals: Dict[Hashable, _Compiled] = {}
        self._states: Dict[str, Any] = {}
        self._parameter_of: Dict[str, str] = {}
        self._resumed: Optional[Tuple[int, _oneflow.ParameterStates]] = None
        self._structure: Structure = flatten(None, [])
        self._gradients: Dict[int, Any] = {}
        self._window_scales: Dict[int, Any] = {}
        self.rates_until: Optional[int] = None
        """The first step whose rates are not compiled in, or None where all are."""
        self.compilations = 0
        """How many graphs were compiled so far."""
        self.rebuilds = 0
        """How often training graphs were compiled anew, for other rates or parameters."""
        self._draws = False
        """True where training steps draw outside of dropout layers."""

    # ------------------------------------------------------------------ training

    def start(self, optimizer: Optimizer) -> None:
        """Training with ``optimizer`` is about to begin."""

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """Forward and backward of one batch; the update where it ``closes`` its window."""
        trainer = self.trainer
        if self.rates_until is not None and trainer.steps_done >= self.rates_until:
            self.rebuild("the rates compiled in are used up")
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        key = (structure, *[(tensor.shape, tensor.dtype) for tensor in tensors])
        compiled = self._steps.get(key)
        if compiled is None:
            compiled = self._steps[key] = self._compile_step(structure, tensors)
            if len(self._steps) == _MANY_GRAPHS:
                warn(
                    f"{_MANY_GRAPHS} graphs were compiled for training so far, one for each shape "
                    "of batch and each constant in it (a number or text): each takes seconds and "
                    "memory. Pad the batches to few shapes, and keep constants out of them."
                )
        compiled.runs += 1
        graph = compiled.graph
        if trainer.accumulate_grad_batches > 1:
            return self._accumulate(compiled, tensors, window, closes)
        if isinstance(graph, TrainGraph):
            outputs = _oneflow.run_compiled(graph, [*tensors, *compiled.draws.draw()])
            return {**(self._take_outputs(graph, outputs[1:]) or {}), "loss": outputs[0]}
        loss = _loss_of(graph(*tensors))
        if loss.numel() != 1:
            raise ConfigurationError(
                f"{type(graph).__name__}.build returned a loss of shape {tuple(loss.shape)}: "
                "reduce it to one element, for example with .mean()."
            )
        return {"loss": loss.reshape(()) if loss.ndim else loss}

    def _accumulate(
        self, compiled: _Compiled, tensors: List[Any], window: int, closes: bool
    ) -> Dict[str, Any]:
        graph = compiled.graph
        inputs = [*tensors, *compiled.draws.draw(), self._window_scale(window)]
        outputs = _oneflow.run_compiled(graph, inputs)
        stop = 1 + len(graph.having)
        total = self._gradients
        for index, gradient in zip(graph.having, outputs[1:stop]):
            total[index] = total[index] + gradient if index in total else gradient
        if closes:
            having = tuple(sorted(total))
            apply = self._applies.get(having)
            gradients = [total[index] for index in having]
            if apply is None:
                apply = self._applies[having] = _Compiled(ApplyGraph(self, having), Draws())
                self._compile(apply.graph, [gradients], "the optimizer step", updates=True)
            _oneflow.run_compiled(apply.graph, gradients)
            self._gradients = {}
        return {**(self._take_outputs(graph, outputs[stop:]) or {}), "loss": outputs[0]}

    def _window_scale(self, window: int) -> Any:
        """``1 / window`` as a tensor of no dimension on the device."""
        scale = self._window_scales.get(window)
        if scale is None:
            scale = flow.tensor(1.0 / window, dtype=flow.float32).to(self.trainer.device)
            self._window_scales[window] = scale
        return scale

    def _take_outputs(self, graph: StepGraph, outputs: Sequence[Any]) -> Any:
        """Record what the step logged; return what it returned."""
        logged = len(graph.specs)
        metrics = self.trainer.metrics
        if logged:
            metrics.record_traced(graph.specs, outputs[:logged])
        if graph.constants:
            metrics.record_traced(*zip(*graph.constants))
        return unflatten(graph.rest, iter(outputs[logged:]))

    def settle(self) -> None:
        """Bring up to date what compiled steps leave behind: batch norms' count of batches."""
        for compiled in self._steps.values():
            for layer, calls in compiled.batch_norms.items():
                layer.num_batches_tracked.add_(calls * compiled.runs)
            compiled.runs = 0

    def default_train_graph(self) -> nn.Graph:
        """What ``TaskModule.build_graph`` returns unless it is overridden."""
        return TrainGraph(self, self._structure)

    def _compile_step(self, structure: Structure, tensors: List[Any]) -> _Compiled:
        refuse_what_graphs_ignore(self.task)
        draws = Draws()
        if not has_own_graph(self.task) and (self._draws or active_dropouts(self.task)):
            try:
                probe = ProbeGraph(self.task, "training_step", structure, ())
                self._trace(probe, _oneflow.trace_only, [tensors], "training_step")
            except DrawsMet as met:
                draws = Draws(met.calls)
        try:
            return self._compile_step_with(draws, structure, tensors)
        except DrawsMet as met:  # nothing told so before
            self._draws = True
            return self._compile_step_with(Draws(met.calls), structure, tensors)

    def _compile_step_with(
        self, draws: Draws, structure: Structure, tensors: List[Any]
    ) -> _Compiled:
        compiled = _Compiled(None, draws)
        inputs: List[Any] = [tensors, draws.placeholders()]
        what, updates = "training_step", True
        if self.trainer.accumulate_grad_batches > 1:
            graph: Any = GradientGraph(self, structure)
            inputs.append(self._window_scale(1))
            updates = False
        else:
            self._structure = structure
            graph = self.task.build_graph()
            if not isinstance(graph, TrainGraph):
                self._check_own_graph(graph)
                inputs, what = tensors, f"{type(graph).__name__}.build"
        compiled.graph = graph
        with counted_batch_norms(self.task, compiled.batch_norms):
            self._compile(graph, inputs, what, updates)
        return compiled

    def _check_own_graph(self, graph: Any) -> None:
        """Refuse what a graph of the user's own cannot be made to do."""
        name = type(graph).__name__
        if not isinstance(graph, nn.Graph):
            raise ConfigurationError(
                f"build_graph() returned {describe(graph)}: return an instance of a "
                "oneflow.nn.Graph subclass."
            )
        if _oneflow.is_compiled(graph) or any(graph is c.graph for c in self._steps.values()):
            raise ConfigurationError(
                f"build_graph() returned a {name} that was compiled before: it is called once for "
                "each shape of batch, and must make a new graph each time."
            )
        optimizers = _oneflow.optimizers_of(graph)
        if optimizers != [self.trainer.optimizer]:
            raise ConfigurationError(
                f"{name} must train with the task's optimizer: call "
                "self.add_optimizer(task.optimizer) once in its __init__, where task.optimizer is "
                "what configure_optimizers() returned."
            )
        if self.trainer.gradient_clip_val is not None:
            raise ConfigurationError(
                f"gradient_clip_val cannot reach into {name}: clip in its build, after backward, "
                "or leave build_graph() as it is."
            )
        if any(s is not self.trainer.lr_scheduler for s in _oneflow.schedulers_of(graph)):
            raise ConfigurationError(
                f"{name} has a scheduler that the rate plan does not know: return it from "
                "configure_optimizers() too."
            )

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self) -> Tuple[int, _oneflow.ParameterStates]:
        """The optimizer's steps, and what it keeps of each parameter by name; live memory."""
        if not self._states:  # nothing was compiled yet
            return self._resumed or (0, {})
        states: _oneflow.ParameterStates = {}
        for name, tensor in self._states.items():
            parameter, key = _oneflow.split_graph_state(name)
            if parameter in self._parameter_of:
                states.setdefault(self._parameter_of[parameter], {})[key] = tensor
        return int(self._states[_oneflow.TRAIN_STEP].item()), states

    def load_optimizer_state(self, steps: int, states: _oneflow.ParameterStates) -> None:
        """Go on from what :meth:`optimizer_state` of either mode gave."""
        self._resumed = (steps, states)

    def gradients(self) -> Dict[str, Any]:
        """What an accumulation window that is not closed yet has added up, by parameter."""
        names = {id(p): name for name, p in self.task.named_parameters()}
        parameters = self.trainer.parameters
        return {names[id(parameters[i])]: grad for i, grad in self._gradients.items()}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """Go on from what :meth:`gradients` of either mode gave."""
        index_of = {id(p): index for index, p in enumerate(self.trainer.parameters)}
        parameters = dict(self.task.named_parameters())
        self._gradients = {index_of[id(parameters[n])]: g for n, g in gradients.items()}

    def _take_resumed_state(self, graph: nn.Graph) -> None:
        """Let the first graph that updates begin with the state of a checkpoint."""
        if self._resumed is None:
            return
        steps, states = self._resumed
        self._resumed = None
        in_graph = {name: key for key, name in self._parameter_of.items()}
        for name, kept in states.items():
            for key, tensor in kept.items():
                if name in in_graph:
                    self._states[_oneflow.graph_state_name(in_graph[name], key)] = tensor
        device = self.trainer.device
        self._states[_oneflow.TRAIN_STEP] = flow.tensor([steps], dtype=flow.int64).to(device)

    # ------------------------------------------------------------------ evaluation

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """``validation_step``, ``test_step`` or ``predict_step`` on one batch, no gradients."""
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        key = (step, dataloader_idx, structure, *[(t.shape, t.dtype) for t in tensors])
        compiled = self._evals.get(key)
        if compiled is None:
            refuse_what_graphs_ignore(self.task)
            graph = EvalGraph(self.task, step, structure, (dataloader_idx,))
            compiled = self._evals[key] = self._compile_eval(graph, tensors, Draws())
        graph = compiled.graph
        outputs = _oneflow.run_compiled(graph, [*tensors, *compiled.draws.draw()])
        return self._take_outputs(graph, outputs)

    def _compile_eval(self, graph: EvalGraph, tensors: List[Any], draws: Draws) -> _Compiled:
        inputs = [tensors, draws.placeholders()]
        try:
            self._compile(graph, inputs, graph.step, updates=False)
        except DrawsMet as met:
            again = EvalGraph(self.task, graph.step, graph.structure, graph.extra)
            return self._compile_eval(again, tensors, Draws(met.calls))
        return _Compiled(graph, draws)

    # ------------------------------------------------------------------ compiling

    def rebuild(self, reason: str) -> None:
        """Compile the training graphs anew at the next step, over the same optimizer state."""
        if not self._steps and not self._applies:
            return
        log.info("step %d: compiling again: %s", self.trainer.global_step, reason)
        self.settle()
        self.rebuilds += 1
        self._steps.clear()
        self._applies.clear()

    def _compile(self, graph: nn.Graph, inputs: Sequence[Any], what: str, updates: bool) -> None:
        """Compile ``graph`` for ``inputs``; where it ``updates``, over the shared state."""
        if _oneflow.graphs_compiled() >= _oneflow.MOST_GRAPHS:
            raise GraphModeError(
                f"this process has compiled {_oneflow.graphs_compiled():,} graphs, and OneFlow "
                "aborts a process at about the 1,365th: go on in a new one, from a checkpoint with "
                "fit(..., ckpt_path='last')."
            )
        is_ours = isinstance(graph, (StepGraph, ApplyGraph))
        self.task.configure_graph(graph.config)
        steps = _oneflow.micro_batches(graph)
        if steps > 1 and is_ours:
            mend = (
                "call it on the config of the graph that build_graph() makes"
                if has_own_graph(self.task)
                else f"use Trainer(accumulate_grad_batches={steps}), which accumulates whole "
                "batches in both modes"
            )
            raise ConfigurationError(
                f"configure_graph called set_gradient_accumulation_steps({steps}), which would cut "
                f"each batch into {steps}: {mend}."
            )
        if updates:
            self._hooks.fire("on_before_graph_compile", graph)
            names = {id(p): name for name, p in self.task.named_parameters()}
            for key, parameter in _oneflow.parameter_names(graph).items():
                if id(parameter) in names:
                    self._parameter_of[key] = names[id(parameter)]
            self._take_resumed_state(graph)
            if self._states:
                _oneflow.share_optimizer_states(graph, self._states)
        compiling = partial(_oneflow.trace_and_compile, as_eager=is_ours)
        self._trace(graph, compiling, inputs, what)
        own = "where that matters, leave build_graph() as it is"
        mend = "call flow.rand and its like by these names, or draw in the dataset"
        warn_of_unfed(what, _oneflow.random_operations(graph), mend if is_ours else own)
        self.compilations += 1
        if updates:
            # Kept where a graph has them no more: what is frozen now may train again later.
            self._states.update(_oneflow.optimizer_states(graph))

    def _trace(
        self, graph: nn.Graph, run: Callable[..., None], inputs: Sequence[Any], what: str
    ) -> None:
        _oneflow.mute(graph)
        self._forget_gradients()
        try:
            with compile_quietly(), no_garbage_collected():
                run(graph, inputs)
        except DrawsMet:
            raise
        except OFEngineError as error:
            if isinstance(error, ConfigurationError):
                raise
            raise explain(error, what, getattr(graph, "index", None)) from None
        except Exception as error:
            raise explain(error, what, getattr(graph, "index", None)) from error
        finally:
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Drop the lazy gradients of the last trace, over which no graph can be compiled."""
        for parameter in self.task.parameters():
            parameter.grad = None

    def close(self) -> None:
        """Let the graphs go, but not the optimizer's state: it may be saved yet."""
        self.settle()
        self._resumed = self.optimizer_state()
        self._steps.clear()
        self._applies.clear()
        self._evals.clear()
        self._states.clear()


def _loss_of(outputs: Any) -> Any:
    """The loss among what a graph of the user's own returned."""
    if isinstance(outputs, dict) and "loss" in outputs:
        return outputs["loss"]
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    if not isinstance(outputs, flow.Tensor):
        raise ConfigurationError(
            f"the graph of build_graph() returned {describe(outputs)}, which holds no loss: let "
            "build return the loss, a tuple with the loss first, or a dict with it under 'loss'."
        )
    return outputs
