"""What is done to a task on the side, and undone: a step that is computed once more, for its own.

:class:`Kept` remembers a task and puts it back; ``trials`` does so around a whole run, and with
``trainer.leaving_no_trace()`` a callback does around a step.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Dict, Iterator, List, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow.session import synchronize
from ofengine.data.generators import (
    global_states,
    set_global_states,
    set_states_in,
    states_in,
)
from ofengine.errors import ConfigurationError
from ofengine.metrics.held import metrics_held
from ofengine.modes.several import frozen, stepping
from ofengine.modes.steps import split_outputs, step_arity
from ofengine.run.state import Run
from ofengine.run.view import Step


class Kept:
    """A task as it is now: tensors, gradients, attributes of its modules, sums of its metrics.

    Args:
        task: its parameters, buffers, gradients, ``requires_grad``, ``training`` and the
            attributes of all its modules are put back, down to lists and dicts of them.
    """

    def __init__(self, task: nn.Module) -> None:
        self._task = task
        self._attributes: List[Tuple[Dict[str, Any], Dict[str, Any]]] = []
        self._contents: List[Tuple[Any, Any]] = []
        self._tensors: Dict[int, Tuple[Any, Any, bool, Any]] = {}

    def remember(self, lends_gradients: bool = True) -> None:
        """Take note of all; where it ``lends_gradients``, they are None from here on."""
        for module in self._task.modules():
            self.remember_attributes(vars(module))
            for value in vars(module).values():
                self._remember_contents(value)
        for tensor in [*self._task.parameters(), *self._task.buffers()]:
            self._remember_tensor(tensor)
        for tensor, _, _, gradient in self._tensors.values() if lends_gradients else ():
            if gradient is not None:
                tensor.grad = None
        metrics = metrics_held(self._task, ()).values()
        self._metrics = [(metric, metric.all_sums()) for metric in metrics]

    def put_back(self) -> None:
        """Make all as it was."""
        synchronize()
        for attributes, kept in self._attributes:
            attributes.clear()
            attributes.update(kept)
        for container, kept in self._contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(kept)
        with flow.no_grad():
            for tensor, values, _, _ in self._tensors.values():
                tensor.copy_(values)
        for tensor, _, requires_grad, gradient in self._tensors.values():
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = gradient
        for metric, sums in self._metrics:
            metric.put_back(sums)

    def remember_attributes(self, attributes: Dict[str, Any]) -> None:
        """Keep ``attributes`` of an object, a shallow copy."""
        self._attributes.append((attributes, dict(attributes)))

    def _remember_contents(self, value: Any) -> None:
        if isinstance(value, flow.Tensor):
            self._remember_tensor(value)
        elif isinstance(value, (dict, list, set)):
            self._contents.append((value, copy.copy(value)))

    def _remember_tensor(self, tensor: Any) -> None:
        if id(tensor) not in self._tensors:
            gradient = tensor.grad if tensor.is_leaf else None
            kept = (tensor, tensor.detach().clone(), tensor.requires_grad, gradient)
            self._tensors[id(tensor)] = kept


class KeptRun:
    """All that a training step of ``run`` may change but what it returns, as it is now.

    Generators of the task and the global ones, and what was logged, besides the task itself.
    """

    def __init__(self, run: Run, lends_gradients: bool = True) -> None:
        self._run = run
        run.training_mode.settle()
        self._task = Kept(run.task)
        self._task.remember(lends_gradients)
        self._generators, self._held = global_states(), states_in(run.task, None)
        self._logged = run.metrics.logged_so_far()

    def put_back(self) -> None:
        """Make all as it was."""
        self._run.training_mode.settle()  # what compiled steps left pending is not to come later
        self._task.put_back()
        set_global_states(self._generators)
        set_states_in(self._run.task, None, self._held)
        self._run.metrics.forget_since(self._logged)
        synchronize()


def eager_step(run: Run) -> Step:
    """The loss of ``training_step``, computed eagerly in either mode.

    Of several optimizers the sum of those whose turn it is, each without gradients of the others'
    parameters; in a part of the run that of its own.
    """
    if run.parts:
        return _step_of_all(run)
    task, named = run.task, (run.name,) if run.name else ()
    takes_both = step_arity(task, "training_step", 2 + len(named)) > 1

    def step(batch: Any, batch_idx: int) -> Any:
        with flow.enable_grad(), frozen(run.others):
            given = (batch, batch_idx, *named) if takes_both else (batch,)
            outputs = task.training_step(*given)
        return split_outputs(outputs, type(task).__name__)[0]

    return step


def _step_of_all(run: Run) -> Step:
    steps = {name: eager_step(part) for name, part in run.parts.items()}

    def step(batch: Any, batch_idx: int) -> Any:
        losses = [steps[part.name](batch, batch_idx) for part in stepping(run, batch_idx)]
        return sum(losses[1:], losses[0])

    return step


@contextlib.contextmanager
def leaving_no_trace(run: Run) -> Iterator[Step]:
    """See :meth:`ofengine.run.view.RunView.leaving_no_trace`."""
    if run.mode is None or run.train is None:
        raise ConfigurationError(
            "leaving_no_trace() computes a training step: use it in a fit, from on_train_start on."
        )
    if run.ranks is not None:
        raise ConfigurationError(
            "leaving_no_trace() computes a step of this process alone, and several ranks train "
            "together: use it with devices=1."
        )
    kept = KeptRun(run)
    try:
        yield eager_step(run)
    finally:
        kept.put_back()
