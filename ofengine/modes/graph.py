"""Graph mode: each step is a static graph, compiled once for each shape of batch.

Without accumulation a step is one graph: forward, backward, clipping and update. With
accumulation a gradient graph runs for each batch of a window, its gradients are added up as
eager mode adds them, and an apply graph does clipping and update, whatever the window's
length. All graphs that update share one memory for the optimizer's state and step counter.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Tuple

import attrs
import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs, optimizer_state
from ofengine._oneflow.launch_race import mend_or_tell
from ofengine._oneflow.operators import random_operations
from ofengine._oneflow.session import start_session
from ofengine.data.structure import Structure, flatten, unflatten
from ofengine.errors import ConfigurationError, GraphModeError, OFEngineError, warn
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
from ofengine.modes.explain import explain
from ofengine.modes.own_graphs import check_own_graph, has_own_graph, loss_of
from ofengine.modes.step_graphs import (
    ApplyGraph,
    EvalGraph,
    GradientGraph,
    ProbeGraph,
    StepGraph,
    TrainGraph,
)
from ofengine.run.mode import HookCalls, ParameterStates
from ofengine.run.state import Run
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")


_MANY_GRAPHS = 8
_TABLE_STEPS = 10_000
"""How many steps of rates are compiled in at first where the run's length is not known."""


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
    """Runs the steps of one task as static graphs. See :class:`ofengine.run.mode.Mode`."""

    def __init__(self, run: Run, task: TaskModule, calls: HookCalls) -> None:
        start_session()
        mend_or_tell()
        self._run = run
        self.task = task
        self._before_compile = calls["on_before_graph_compile"]
        self._accumulates = run.settings.accumulate_grad_batches > 1
        self._steps: Dict[Hashable, _Compiled] = {}
        self._applies: Dict[Tuple[int, ...], _Compiled] = {}
        self._evals: Dict[Hashable, _Compiled] = {}
        self._states: Dict[str, Any] = {}
        self._parameter_of: Dict[str, str] = {}
        self._resumed: Optional[Tuple[int, ParameterStates]] = None
        self._structure: Structure = flatten(None, [])
        self._gradients: Dict[int, Any] = {}
        self._window_scales: Dict[int, Any] = {}
        self._rates_until: Optional[int] = None
        """The first step whose rates are not compiled in, or None where all are."""
        self._draws = False
        """True where training steps draw outside of dropout layers."""

    # ------------------------------------------------------------------ training

    def start(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        until = self._rates_until
        if until is not None and self._run.progress.global_step >= until:
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
        if self._accumulates:
            return self._accumulate(compiled, tensors, window, closes)
        if isinstance(graph, TrainGraph):
            outputs = graphs.run_compiled(graph, [*tensors, *compiled.draws.draw()])
            return {**(self._take_outputs(graph, outputs[1:]) or {}), "loss": outputs[0]}
        loss = loss_of(graph(*tensors))
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
        outputs = graphs.run_compiled(graph, inputs)
        stop = 1 + len(graph.having)
        total = self._gradients
        for index, gradient in zip(graph.having, outputs[1:stop]):
            total[index] = total[index] + gradient if index in total else gradient
        if closes:
            having = tuple(sorted(total))
            apply = self._applies.get(having)
            gradients = [total[index] for index in having]
            if apply is None:
                apply = self._applies[having] = _Compiled(ApplyGraph(self._run, having), Draws())
                self._compile(apply.graph, [gradients], "the optimizer step", updates=True)
            graphs.run_compiled(apply.graph, gradients)
            self._gradients = {}
        return {**(self._take_outputs(graph, outputs[stop:]) or {}), "loss": outputs[0]}

    def _window_scale(self, window: int) -> Any:
        """``1 / window`` as a tensor of no dimension on the device."""
        scale = self._window_scales.get(window)
        if scale is None:
            scale = flow.tensor(1.0 / window, dtype=flow.float32).to(self._run.settings.device)
            self._window_scales[window] = scale
        return scale

    def _take_outputs(self, graph: StepGraph, outputs: Sequence[Any]) -> Any:
        """Record what the step logged; return what it returned."""
        logged = len(graph.specs)
        metrics = self._run.metrics
        if logged:
            metrics.record_traced(graph.specs, outputs[:logged])
        if graph.constants:
            metrics.record_traced(*zip(*graph.constants))
        return unflatten(graph.rest, iter(outputs[logged:]))

    def settle(self) -> None:
        """Count the batches of batch norms, which compiled steps leave out."""
        for compiled in self._steps.values():
            for layer, calls in compiled.batch_norms.items():
                layer.num_batches_tracked.add_(calls * compiled.runs)
            compiled.runs = 0

    def default_train_graph(self) -> nn.Graph:
        """See :class:`~ofengine.run.mode.Mode`."""
        return TrainGraph(self._run, self._structure)

    def lower_rates(self, graph: nn.Graph) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        start, total = self._run.progress.global_step, self._run.total_steps
        stop = start + max(_TABLE_STEPS, start) if total is None else max(total, start + 1)
        self._rates_until = self._run.rates.lower_into(graph, start, stop)

    def _compile_step(self, structure: Structure, tensors: List[Any]) -> _Compiled:
        refuse_what_graphs_ignore(self.task)
        draws = Draws()
        if not has_own_graph(self.task) and (self._draws or active_dropouts(self.task)):
            try:
                probe = ProbeGraph(self.task, "training_step", structure, ())
                self._trace(probe, graphs.trace_only, [tensors], "training_step")
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
        if self._accumulates:
            graph: Any = GradientGraph(self._run, structure)
            inputs.append(self._window_scale(1))
            updates = False
        else:
            self._structure = structure
            graph = self.task.build_graph()
            if not isinstance(graph, TrainGraph):
                check_own_graph(graph, self._run, [c.graph for c in self._steps.values()])
                inputs, what = tensors, f"{type(graph).__name__}.build"
        compiled.graph = graph
        with counted_batch_norms(self.task, compiled.batch_norms):
            self._compile(graph, inputs, what, updates)
        return compiled

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self) -> Tuple[int, ParameterStates]:
        """See :class:`~ofengine.run.mode.Mode`."""
        if not self._states:  # nothing was compiled yet
            return self._resumed or (0, {})
        states: ParameterStates = {}
        for name, tensor in self._states.items():
            parameter, key = optimizer_state.split_graph_state(name)
            if parameter in self._parameter_of:
                states.setdefault(self._parameter_of[parameter], {})[key] = tensor
        return int(self._states[optimizer_state.TRAIN_STEP].item()), states

    def load_optimizer_state(self, steps: int, states: ParameterStates) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        self._resumed = (steps, states)

    def gradients(self) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        names = {id(p): name for name, p in self.task.named_parameters()}
        parameters = self._run.parameters
        return {names[id(parameters[i])]: grad for i, grad in self._gradients.items()}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        index_of = {id(p): index for index, p in enumerate(self._run.parameters)}
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
                    self._states[optimizer_state.graph_state_name(in_graph[name], key)] = tensor
        device = self._run.settings.device
        self._states[optimizer_state.TRAIN_STEP] = flow.tensor([steps], dtype=flow.int64).to(device)

    # ------------------------------------------------------------------ evaluation

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """See :class:`~ofengine.run.mode.Mode`."""
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        key = (step, dataloader_idx, structure, *[(t.shape, t.dtype) for t in tensors])
        compiled = self._evals.get(key)
        if compiled is None:
            refuse_what_graphs_ignore(self.task)
            graph = EvalGraph(self.task, step, structure, (dataloader_idx,))
            compiled = self._evals[key] = self._compile_eval(graph, tensors, Draws())
        graph = compiled.graph
        outputs = graphs.run_compiled(graph, [*tensors, *compiled.draws.draw()])
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
        log.info("step %d: compiling again: %s", self._run.progress.global_step, reason)
        self.settle()
        self._steps.clear()
        self._applies.clear()

    def _compile(self, graph: nn.Graph, inputs: Sequence[Any], what: str, updates: bool) -> None:
        """Compile ``graph`` for ``inputs``; where it ``updates``, over the shared state."""
        if graphs.graphs_compiled() >= graphs.MOST_GRAPHS:
            raise GraphModeError(
                f"this process has compiled {graphs.graphs_compiled():,} graphs, and OneFlow "
                "aborts a process at about the 1,365th: go on in a new one, from a checkpoint with "
                "fit(..., ckpt_path='last')."
            )
        is_ours = isinstance(graph, (StepGraph, ApplyGraph))
        self.task.configure_graph(graph.config)
        steps = graphs.micro_batches(graph)
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
            for call in self._before_compile:
                call(graph)
            names = {id(p): name for name, p in self.task.named_parameters()}
            for key, parameter in graphs.parameter_names(graph).items():
                if id(parameter) in names:
                    self._parameter_of[key] = names[id(parameter)]
            self._take_resumed_state(graph)
            if self._states:
                graphs.share_optimizer_states(graph, self._states)
        compiling = partial(graphs.trace_and_compile, as_eager=is_ours)
        self._trace(graph, compiling, inputs, what)
        own = "where that matters, leave build_graph() as it is"
        mend = "call flow.rand and its like by these names, or draw in the dataset"
        warn_of_unfed(what, random_operations(graph), mend if is_ours else own)
        if updates:
            # Kept where a graph has them no more: what is frozen now may train again later.
            self._states.update(graphs.optimizer_states(graph))

    def _trace(
        self, graph: nn.Graph, run: Callable[..., None], inputs: Sequence[Any], what: str
    ) -> None:
        graphs.mute(graph)
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
