"""The graphs of graph mode: what is traced for a step, an update, an evaluation."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow.graphs import allow_backward, in_full_precision, precision_of
from ofengine._oneflow.late_inputs import LateInputs
from ofengine._oneflow.tracing import (
    answering_as_modules,
    assignments_in_trace,
    build_parameters,
    hold,
    identity,
    instance_in_trace,
)
from ofengine.data.structure import Structure, flatten, unflatten
from ofengine.errors import DataError, GraphModeError, warn
from ofengine.metrics.base import Metric
from ofengine.metrics.stage import Logged, LogSpec
from ofengine.modes.draws import Draw, Feed, no_numbers_frozen
from ofengine.modes.in_place import InPlace, Written
from ofengine.modes.spread import Spread
from ofengine.modes.steps import clip, split_outputs, step_arity
from ofengine.run.constants import constants_only
from ofengine.run.precision import FULL, LOSS_SCALES
from ofengine.run.state import Run
from ofengine.run.weighing import weight_of
from ofengine.task import TaskModule
from ofengine.tracing import Trace, TracedIndex, warn_of_assignments


class StepGraph(LateInputs):
    """A step of the task over the tensors of one batch; what comes out besides the loss."""

    trains = False
    """True where parameters are updated with the gradients of the step."""
    held: Sequence[Sequence[Any]] = ((),)
    """Within it the parameters that the step reads and is to have no gradients of."""

    def __init__(
        self, task: TaskModule, step: str, structure: Structure, extra: Sequence[Any]
    ) -> None:
        super().__init__()
        self.task = task
        self.origin = [task]  # in a list, or nn.Graph would make it a block
        self.step = step
        self.arity = step_arity(task, step, 2 + len(extra))
        self.structure = structure
        self.extra = tuple(extra)
        self.index = TracedIndex()
        self.logged = Logged([])
        """Which of the logged values is where."""
        self.frozen: List[Any] = []
        """For each of the tensors that hold them None; a number or metric where that was logged."""
        self.updates: List[Tuple[Metric, List[str]]] = []
        """The metrics that the step updates, and what their sums are called."""
        self.assigned: List[str] = []
        self.written: List[Written] = []
        """What the last outputs are written back into after each run."""
        self.rest: Structure = flatten(None, [])
        self.random_calls: List[Callable[[], Draw]] = []
        self.spread: Optional[Spread] = None
        """Where several ranks trace the step over global tensors: how these lie."""

    def call_step(self, tensors: Sequence[Any]) -> Any:
        """Trace the task's step; note what it logs, return (outputs, logged).

        Behind what is logged are the sums of metrics. The numbers of its random calls become
        further inputs.
        """
        batch = unflatten(self.structure, iter(tensors))
        # A step may reach them by other ways than their modules, as eager tensors.
        build_parameters(self.task)
        hold(self.task, self.held[0])
        arguments = (batch, self.index, *self.extra)[: self.arity]
        task = instance_in_trace(self.task)
        spread = self.spread
        feed_of = Feed(self.add_input) if spread is None else spread.feed(self.add_input)
        feeding = feed_of.replacing_calls()
        answering = answering_as_modules(self.task)
        self.in_place = InPlace(self.task, self.step, tensors, self.trains)
        with contextlib.ExitStack() as stack:
            trace, feed = stack.enter_context(Trace()), stack.enter_context(feeding)
            guarding = constants_only(), no_numbers_frozen(self.step), self.in_place.noting()
            for each in (answering, *guarding):
                stack.enter_context(each)
            outputs = getattr(task, self.step)(*arguments)
        self._tell_of_changes(batch, tensors)
        self.random_calls = feed.met
        self.assigned = assignments_in_trace(task)
        self.updates = [(metric, list(sums)) for metric, sums in trace.updates]
        counted = [value for _, sums in trace.updates for value in sums.values()]
        logs = trace.logs if spread is None else spread.logs(trace.logs)
        return outputs, [*self._together(logs), *counted]

    def _tell_of_changes(self, batch: Any, tensors: Sequence[Any]) -> None:
        """Warn where the step has put other entries into its batch, or has taken some out."""
        found: List[Any] = []
        try:
            same = flatten(batch, found) == self.structure
        except DataError:
            same = False
        if not same or [*map(id, found)] != [*map(id, tensors)]:
            warn(
                f"{self.step} changes the entries of its batch: a compiled step has a copy of it, "
                "and whoever reads that batch afterwards (a hook, the next epoch) finds it as it "
                "was, and in eager mode changed. Write into a dict or a list of its own, as in "
                "batch = dict(batch)."
            )

    def _together(self, logs: Sequence[Tuple[LogSpec, Any]]) -> List[Any]:
        """The logged tensors, those of one kind stacked: each output costs about what a step does.

        Notes which value is where.
        """
        kinds: Dict[Any, List[Any]] = {}
        places: List[Tuple[LogSpec, Any, int]] = []
        counted: List[Tuple[LogSpec, Any, int]] = []
        for number, (spec, value) in enumerate(logs):
            stacks = isinstance(value, flow.Tensor) and value.is_global == bool(self.spread)
            kind = (value.dtype, value.device) if stacks else number
            alike = kinds.setdefault(kind, [])
            (counted if isinstance(value, Metric) else places).append((spec, kind, len(alike)))
            alike.append(value)
        order = {kind: place for place, kind in enumerate(kinds)}
        self.logged = Logged(
            *([(spec, order[kind], at) for spec, kind, at in each] for each in (places, counted))
        )
        together = [flow.stack(each) if len(each) > 1 else each[0] for each in kinds.values()]
        self.frozen = [None if isinstance(each, flow.Tensor) else each for each in together]
        return [each for each in together if isinstance(each, flow.Tensor)]

    def put_out(self, outputs: Any, logged: List[Any], first: List[Any]) -> List[Any]:
        """The graph's outputs: ``first``, what was logged, the tensors in ``outputs``."""
        warn_of_assignments(self.step, self.assigned)
        rest: List[Any] = []
        try:
            self.rest = flatten(outputs, rest, f"{self.step} returns")
        except DataError as error:
            raise GraphModeError(str(error)) from None
        if self.spread is not None:
            first, logged = self.spread.whole(first), self.spread.whole(logged)
            rest = self.spread.rows(rest, len(first) + len(logged))
        # One tensor may not be put out twice.
        put_out = [*first, *(identity(tensor) for tensor in [*logged, *rest])]
        written = self.in_place.written()
        self.written = [each for each, _ in written]
        values = [value for _, value in written]
        if self.spread is not None:
            values = self.spread.whole(values)
        return [*put_out, *map(identity, values)]


class _TrainStepGraph(StepGraph):
    trains = True

    def __init__(self, run: Run, structure: Structure) -> None:
        super().__init__(run.task, "training_step", structure, (run.name,) if run.name else ())
        self.held = [run.others]  # in a list, as origin is

    def trained_loss(self, tensors: Sequence[Any], scale: Any, parameters: Sequence[Any]) -> Any:
        """Forward and backward; (loss, outputs besides it, logged, its weight where it has one)."""
        outputs, logged = self.call_step(tensors)
        name = type(self.origin[0]).__name__
        loss, rest = split_outputs(outputs, name)
        weights: List[Any] = []
        if scale is not None and "weight" in rest:
            scale = weight_of(loss, rest["weight"])
            weights.append(scale)
        scaled = loss if scale is None else loss * scale
        precision = precision_of(self)
        factor = LOSS_SCALES.get(precision, 1.0)
        with self.in_place.in_backward():
            (scaled if factor == 1.0 else scaled * factor).backward()
        self.in_place.tell_what_was_switched()
        if precision != FULL:  # before whatever reads gradients: clipping, other ranks
            for each in (p for p in parameters if p.grad is not None):
                each.grad = in_full_precision(each.grad) * (1.0 / factor)
        return loss, rest, logged, weights


class TrainGraph(_TrainStepGraph):
    """Forward, backward, clipping and update in one."""

    def __init__(self, run: Run, structure: Structure) -> None:
        super().__init__(run, structure)
        self.run = run
        self.add_optimizer(run.made.optimizer)

    def build(self, tensors: List[Any], late: List[Any]) -> List[Any]:
        """Trace the whole step."""
        loss, rest, logged, _ = self.trained_loss(tensors, None, self.run.parameters)
        if self.spread is not None:
            self.spread.gradients(self.run.parameters)
        clip(self.run)
        return self.put_out(rest, logged, [loss])


class GradientGraph(_TrainStepGraph):
    """Forward and backward; the gradients are outputs."""

    def __init__(self, run: Run, structure: Structure) -> None:
        super().__init__(run, structure)
        self.averages = run.settings.windows.most > 1
        self.parameters = [run.parameters]
        self.having: List[int] = []
        self.weighs = False
        """True where the step returns a weight, which is the output behind the gradients."""
        allow_backward(self)

    def build(self, tensors: List[Any], scale: Any, late: List[Any]) -> List[Any]:
        """Trace forward and backward of ``loss * scale``, of the loss where a batch is a step."""
        scale = scale if self.averages else None
        (parameters,) = self.parameters
        loss, rest, logged, weights = self.trained_loss(tensors, scale, parameters)
        self.weighs = bool(weights)
        self.having = [i for i, p in enumerate(parameters) if p.grad is not None and p.grad.is_lazy]
        gradients = [parameters[i].grad for i in self.having]
        return self.put_out(rest, logged, [loss, *gradients, *weights])


class ApplyGraph(nn.Graph):
    """Clipping and update, from gradients that are inputs."""

    def __init__(self, run: Run, having: Sequence[int]) -> None:
        super().__init__()
        self.task = run.task
        self.run = run
        self.having = tuple(having)
        self.add_optimizer(run.made.optimizer)

    def build(self, gradients: List[Any]) -> Any:
        """Trace the update."""
        lazy = build_parameters(self.task)
        anchor = min((p for p in lazy if p.requires_grad), key=lambda p: p.numel()).sum()
        anchor.backward()  # a graph with an optimizer must have a loss
        parameters = self.run.parameters
        for parameter in parameters:
            parameter.grad = None
        for index, gradient in zip(self.having, gradients):
            parameters[index].grad = gradient
        clip(self.run)
        return anchor


class EvalGraph(StepGraph):
    """A step without gradients."""

    def build(self, tensors: List[Any], late: List[Any]) -> List[Any]:
        """Trace the step."""
        with flow.no_grad():
            outputs, logged = self.call_step(tensors)
            # A graph must put out something, even where the step neither logs nor returns.
            filler = identity(tensors[0]) if tensors else flow.zeros(1)
            return self.put_out(outputs, logged, []) or [filler]
