"""Graph mode: each step is a static graph, compiled once for each shape of batch.

Without accumulation a step is one graph: forward, backward, clipping and update. With
accumulation a gradient graph runs for each batch of a window, its gradients are added up as
eager mode adds them, and an apply graph does clipping and update, whatever the window's
length. All graphs that update share one memory for the optimizer's state and step counter.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs
from ofengine._oneflow.barriers import put_gradient
from ofengine._oneflow.launch_race import mend_or_tell
from ofengine._oneflow.session import start_session
from ofengine.data.structure import KIND, Structure, flatten, unflatten
from ofengine.modes.batch_norms import BatchNorms
from ofengine.modes.compiled import Changes, Compilations, Compiled, warn_of_many_graphs
from ofengine.modes.compiling import (
    check_inputs,
    configure,
    refuse_doubles,
    refuse_what_graphs_ignore,
    trace,
    wait_for_reads,
    warn_of_draws,
)
from ofengine.modes.draws import Draws
from ofengine.modes.eager_update import EagerUpdate, eager_update
from ofengine.modes.guards import Guards
from ofengine.modes.in_place import tell_what_is_forgotten, write_back
from ofengine.modes.own_graphs import check_own_graph, gradients_are_left, loss_of
from ofengine.modes.shared_state import SharedState
from ofengine.modes.step_graphs import (
    ApplyGraph,
    EvalGraph,
    GradientGraph,
    StepGraph,
    TrainGraph,
)
from ofengine.modes.steps import refuse_own_update, trained_parameters
from ofengine.run.mode import HookCalls, ParameterStates
from ofengine.run.state import Run
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")
_EMPTY = flatten({}, [])
_TABLE_STEPS = 10_000
"""How many steps of rates are compiled in at first where the run's length is not known."""
USED_UP = "the rates compiled in are used up"


class GraphMode:
    """Runs the steps of one task as static graphs. See :class:`ofengine.run.mode.Mode`."""

    def __init__(self, run: Run, task: TaskModule, calls: HookCalls) -> None:
        start_session()
        mend_or_tell()
        self._run = run
        self.task = task
        self._before_compile = calls["on_before_graph_compile"]
        self._accumulates = run.settings.accumulates
        self._steps, self._applies, self._evals = Compilations(), Compilations(), Compilations()
        self._guards, self._changes = Guards(), Changes()
        self._barrier = self._guards.barrier
        self._barrier.turn_on(task)
        self._state = SharedState(run, task, self.rebuild)
        self._structure: Structure = flatten(None, [])
        self._window_scales: Dict[int, Any] = {}
        self._update: Optional[EagerUpdate] = None
        """What updates in the place of a graph."""
        self._tells = True
        """False where another rank records what a step logs."""
        self._rates_until = math.inf
        """The first step whose rates are not compiled in, or infinite where all are."""

    # ------------------------------------------------------------------ training

    def start(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        refuse_own_update(self._run.made.optimizer)
        self._run.made.optimizer.zero_grad(set_to_none=True)  # what a run that was cut off left
        self._update = eager_update(self._run)
        self._accumulates = self._accumulates or self._update is not None
        self._barrier.take()  # the way to the device wrote into every parameter

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        accumulates = self._accumulates
        if self._barrier.hit:
            self._look_again()
            accumulates = accumulates or gradients_are_left(self._run)
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():  # nn.Graph would write over what it views
                tensors[index] = tensor.contiguous()
        key = (accumulates, structure, *map(KIND, tensors))
        compiled = self._steps.active.get(key)  # as get(), without its call
        if compiled is None or (compiled.looks and compiled.watch.may_differ()):
            compiled = self._steps.find(key)
        if compiled is not None and self._run.progress.global_step >= compiled.rates_until:
            self.rebuild(USED_UP)
            compiled = None
        if compiled is None:
            compiled, updates = self._trace_step(structure, tensors, accumulates)
            self._watch(compiled, updates)
            self._keep_step(key, compiled)
        graph = compiled.graph
        if accumulates:
            result = self._accumulate(compiled, tensors, window, closes)
        elif isinstance(graph, TrainGraph):
            if compiled.draws.any:
                tensors += compiled.draws.draw()
            outputs = graphs.run_compiled(graph, tensors)
            if len(outputs) == 1 and graph.rest == _EMPTY and not graph.frozen:
                result = {"loss": outputs[0]}
            else:
                result = {**(self._take_outputs(graph, outputs[1:]) or {}), "loss": outputs[0]}
        else:
            result = {"loss": loss_of(graph, graph(*tensors))}
        norms = compiled.batch_norms
        norms.runs += 1
        if norms.again:
            norms.take_over()
        return result

    def _accumulate(
        self, compiled: Compiled, tensors: List[Any], window: int, closes: bool
    ) -> Dict[str, Any]:
        graph = compiled.graph
        tensors.append(self._window_scale(window))
        if compiled.draws.any:
            tensors += compiled.draws.draw()
        outputs = graphs.run_compiled(graph, tensors)
        stop = 1 + len(graph.having)
        parameters, weighing = self._run.parameters, self._run.weighing
        total: Dict[int, Any] = {}
        for index, parameter in enumerate(parameters):  # no comprehension, which is a call
            if parameter.grad is not None:
                total[index] = parameter.grad
        if graph.weighs:
            weighing.add(outputs[stop])
            stop += 1
        for index, gradient in zip(graph.having, outputs[1:stop]):
            total[index] = total[index] + gradient if index in total else gradient
        if closes:
            self._apply(window, total)
        else:
            for index in graph.having:
                put_gradient(parameters[index], total[index])
        return {**(self._take_outputs(graph, outputs[stop:]) or {}), "loss": outputs[0]}

    def _apply(self, window: int, total: Dict[int, Any]) -> None:
        """Update by the gradients that a window has added up, by the number of their parameter."""
        having = tuple(sorted(total))
        gradients = [total[index] for index in having]
        if self._run.weighing.batches:
            gradients = self._run.weighing.close(gradients, window, type(self.task).__name__)
        if self._update is not None:
            hit = self._barrier.hit
            self._update(zip(having, gradients))
            self._barrier.hit = hit  # which its own gradients are not
            return
        apply = self._applies.active.get(having) or self._applies.find(having)
        if apply is not None and self._run.progress.global_step >= apply.rates_until:
            self._applies.clear()  # only these have rates
            apply = None
        if apply is None:
            apply = self._trace_apply(having, gradients)
            self._watch(apply, updates=True)
            self._tell_change(self._applies.add(having, apply))
        graphs.run_compiled(apply.graph, gradients)
        self._run.made.optimizer.zero_grad(set_to_none=True)

    def _window_scale(self, window: int) -> Any:
        """``1 / window`` as a tensor of no dimension on the device."""
        scale = self._window_scales.get(window)
        if scale is None:
            scale = flow.tensor(1.0 / window, dtype=flow.float32).to(self._run.settings.device)
            self._window_scales[window] = scale
        return scale

    def _take_outputs(self, graph: StepGraph, outputs: Sequence[Any]) -> Any:
        """Record what the step logged and counted; return what it returned."""
        if graph.written:
            write_back(graph.written, outputs[-len(graph.written) :])
        rest = iter(outputs)
        if graph.frozen:
            values = [next(rest) if number is None else number for number in graph.frozen]
            if self._tells:
                self._run.metrics.record_traced(graph.logged, values)
        for metric, names in graph.updates:
            sums = {name: next(rest) for name in names}
            if self._tells:
                metric.add(sums)
        return {} if graph.rest == _EMPTY else unflatten(graph.rest, rest)

    def settle(self) -> None:
        """Count the batches of batch norms, which compiled steps leave out."""
        for compiled in self._steps:
            compiled.batch_norms.settle()

    def default_train_graph(self) -> nn.Graph:
        """See :class:`~ofengine.run.mode.Mode`."""
        return TrainGraph(self._run, self._structure)

    def lower_rates(self, graph: nn.Graph) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        if self._update is not None:
            return  # it takes them from the groups
        start, total = self._run.progress.global_step, self._run.total_steps
        stop = start + max(_TABLE_STEPS, start) if total is None else max(total, start + 1)
        before = self._state.read()[0] - start  # steps of an earlier fit with this optimizer
        until = self._run.rates.lower_into(graph, start, stop, before)
        self._rates_until = math.inf if until is None else until

    def _keep_step(self, key: Hashable, compiled: Compiled) -> None:
        self._tell_change(self._steps.add(key, compiled))
        warn_of_many_graphs(len(self._steps))

    def _trace_step(
        self, structure: Structure, tensors: List[Any], accumulates: bool
    ) -> Tuple[Compiled, bool]:
        """A graph for such batches; and whether it updates the parameters."""
        refuse_what_graphs_ignore(self.task)
        self.settle()  # an older graph for these shapes may be let go
        inputs: List[Any] = [tensors]
        what, updates = "training_step", not accumulates
        if accumulates:
            graph: Any = self._gradient_graph(structure)
            inputs.append(self._window_scale(1))
        else:
            self._structure = structure
            graph = self.task.build_graph()
            if not isinstance(graph, TrainGraph):
                check_own_graph(graph, self._run, [c.graph for c in self._steps])
                tell_what_is_forgotten(graph)
                inputs, what = tensors, f"{type(graph).__name__}.build"
        compiled = Compiled(graph, batch_norms=self._batch_norms())
        with compiled.batch_norms.counting(self.task, graph):
            self._compile(compiled, inputs, what, updates)
        return compiled, updates

    def _gradient_graph(self, structure: Structure) -> GradientGraph:
        return GradientGraph(self._run, structure)

    def _batch_norms(self) -> BatchNorms:
        return BatchNorms()

    def _trace_apply(self, having: Tuple[int, ...], gradients: Sequence[Any]) -> Compiled:
        apply = Compiled(ApplyGraph(self._run, having))
        self._compile(apply, [gradients], "the optimizer step", updates=True)
        return apply

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self) -> Tuple[int, ParameterStates]:
        """See :class:`~ofengine.run.mode.Mode`."""
        return self._state.read()

    def load_optimizer_state(self, steps: int, states: ParameterStates) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        self._state.load(steps, states)

    def gradients(self) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        return {n: p.grad for n, p in self.task.named_parameters() if p.grad is not None}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        for name, parameter in self.task.named_parameters():
            put_gradient(parameter, gradients.get(name))

    # ------------------------------------------------------------------ evaluation

    def evaluated(self, step: str, dataloader_idx: int) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """See :class:`~ofengine.run.mode.Mode`."""
        if self._barrier.hit:
            self._look_again()
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():  # nn.Graph would write over what it views
                tensors[index] = tensor.contiguous()
        key = (step, dataloader_idx, structure, *map(KIND, tensors))
        compiled = self._evals.get(key)
        if compiled is None:
            refuse_what_graphs_ignore(self.task)
            graph = EvalGraph(self.task, step, structure, (dataloader_idx,))
            compiled = Compiled(graph)
            self._compile(compiled, [tensors], step, updates=False)
            self._watch(compiled, updates=False)
            self._tell_change(self._evals.add(key, compiled))
        graph = compiled.graph
        outputs = graphs.run_compiled(graph, [*tensors, *compiled.draws.draw()])
        return self._take_outputs(graph, outputs)

    # ------------------------------------------------------------------ guards

    def _watch(self, compiled: Compiled, updates: bool) -> None:
        """Watch what the trace of ``compiled`` read."""
        groups = self._run.made.optimizer.param_groups if updates else ()
        compiled.watch = self._guards.watch(self.task, groups)
        compiled.looks = compiled.watch.looks
        wait_for_reads(compiled, self.task, updates)

    def _look_again(self) -> None:
        """Something was written that a trace may have read: see which graphs still stand."""
        places, tensors = self._barrier.take()
        if tensors:
            replaced, name = self._guards.what_was_written(self.task, tensors)
            if name:
                self._let_go_of(replaced, name)
            training = trained_parameters(self._run) if self._run.optimization else []
            if [*map(id, training)] != [*map(id, self._run.parameters)]:
                gradients, had = self.gradients(), {*map(id, self._run.parameters)}
                self._run.parameters = training
                self.load_gradients(gradients)
                trains = had and self is self._run.training_mode  # and not eager mode meanwhile
                for each in training if trains else ():
                    if id(each) not in had:  # OneFlow, too, begins anew with what thaws
                        put_gradient(each, None)
                self.rebuild("other parameters train from here on")
        for kind in (self._steps, self._applies, self._evals):
            kind.look_again(places)

    def _let_go_of(self, replaced: Sequence[str], name: str) -> None:
        """These parameters and buffers have other memory now, or ``name`` is another."""
        self._evals.clear()
        self.rebuild(f"{name} is another")
        self._changes.note(name)

    def _tell_change(self, name: Optional[str]) -> None:
        if name is not None:
            log.info(
                "step %d: compiled again: %s is another.", self._run.progress.global_step, name
            )
            self._changes.note(name)

    # ------------------------------------------------------------------ compiling

    def rebuild(self, reason: str) -> None:
        """Compile the training graphs anew at the next step, over the same optimizer state."""
        if not len(self._steps) and not len(self._applies):
            return
        log.info("step %d: compiling again: %s", self._run.progress.global_step, reason)
        self.settle()
        self._steps.clear()
        self._applies.clear()

    def _check(self, inputs: Any, what: str) -> None:
        check_inputs(inputs, what)

    def _compile(self, compiled: Compiled, inputs: Sequence[Any], what: str, updates: bool) -> None:
        """Compile a graph for ``inputs``; where it ``updates``, over the shared state."""
        graph = compiled.graph
        self._check(inputs, what)
        is_ours = isinstance(graph, (StepGraph, ApplyGraph))
        self._rates_until = math.inf  # unless it is told so before the trace
        configure(graph, self.task, self._run.settings, is_ours)
        if updates or (self._update is not None and isinstance(graph, GradientGraph)):
            for call in self._before_compile:
                call(graph)
        if updates:
            refuse_doubles(self.task, self._run.parameters)
            self._state.share_with(graph)
        compiling = partial(graphs.trace_and_compile, as_eager=is_ours)
        is_step = isinstance(graph, StepGraph)
        if is_step:
            inputs = [*inputs, graph.late]
        trace(self.task, self._guards, graph, compiling, inputs, what)
        compiled.rates_until = self._rates_until
        if is_step:
            compiled.draws = Draws(graph.random_calls)
            graph.late.clear()
        warn_of_draws(graph, what, is_ours)
        if updates:
            self._state.take_from(graph)

    def close(self) -> None:
        """Let the graphs go, but not the optimizer's state: it may be saved yet."""
        self.settle()
        self._state.detach()
        self._steps.clear()
        self._applies.clear()
        self._evals.clear()
        self._barrier.turn_off()
