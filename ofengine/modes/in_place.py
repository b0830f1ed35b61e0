"""What a compiled step writes in place, made what it is in eager mode, or refused.

A trace works on tensors that stand for the buffers and parameters of the task, for the batch, and
for tensors beside the task. What the step writes into one of these would be forgotten with its run.
Here the last value of each becomes an output of the graph and is written back after the run.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import attrs
import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs
from ofengine._oneflow.assignments import telling_assignments
from ofengine._oneflow.in_place import WritesInPlace, aliases
from ofengine._oneflow.lazy_names import name_of
from ofengine._oneflow.tracing import TracedState, replaces_buffer, states_of
from ofengine.errors import GraphModeError, warn
from ofengine.tracing import warn_of_changes

_OUTSIDE = "FreeEagerTensor"
"""How OneFlow begins the names of tensors that are neither of the batch nor of a module."""
_COUNTED = "num_batches_tracked"
"""The buffer in which batch norm counts its calls: these are added up without a run's outputs."""
_MEND = "write x = x * 2 in the place of x.mul_(2)"


@attrs.frozen
class Written:
    """A tensor that a step writes into."""

    tensor: Any
    places: Sequence[Tuple[nn.Module, str]]
    """The modules whose buffer or parameter it is, and its name there."""


def write_back(written: Sequence[Written], values: Sequence[Any]) -> None:
    """Write what a run has made of them."""
    with flow.no_grad():
        for each, value in zip(written, values):
            each.tensor.copy_(value)


class InPlace:
    """The writes of one trace of the step called ``what`` over ``batch``.

    Args:
        task: the proxy of the task.
        updates: True where the graph updates the parameters that train, or another does so with
            its gradients.
    """

    def __init__(self, task: Any, what: str, batch: Sequence[Any], updates: bool) -> None:
        self._task, self._what, self._updates = task, what, updates
        self._states = states_of(task)
        self._state_of = {id(state.tensor): state for state in self._states}
        """The states by the ``id`` of each tensor that stands for one."""
        self._unbuilt = [(state, proxy) for state in self._states for proxy in state.proxies]
        self._writes = WritesInPlace(self._twins)
        self._called = {name: f"self.{each.path}" for each in self._states for name in each.names}
        self._batch = {name_of(each) for each in batch}
        self._assigned: Dict[Tuple[int, str], Any] = {}
        self._switched: Dict[str, bool] = {}
        """Whether those parameters train now whose ``requires_grad`` the step has set."""
        self.in_backward = self._writes.in_backward

    @property
    def backward_began(self) -> int:
        """The number of operations before the backward pass; 0 where there was none."""
        return self._writes.backward[0]

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Trace the step in the block."""
        before = self._training()
        with self._writes.noting(), telling_assignments(self._assign):
            yield
        now = self._training()
        self._switched = {path: now[path] for path, trains in before.items() if now[path] != trains}

    def tell_what_was_switched(self) -> None:
        """Warn after the backward pass of what trained in it and the step has frozen, or so.

        What is switched before it is used, is so at each step.
        """
        found = [
            f"self.{each.path}.requires_grad"
            for each in self._states
            if self._switched.get(each.path, each.tensor.grad is not None)
            is not (each.tensor.grad is not None)
        ]
        warn_of_changes(self._what, found)

    def _training(self) -> Dict[str, bool]:
        """Which of the parameters and buffers that the trace has so far train."""
        built = ((each.path, each.built()) for each in self._states)
        return {path: lazy.requires_grad for path, lazy in built if lazy is not None}

    def _assign(self, module: nn.Module, name: str, value: Any) -> None:
        if replaces_buffer(module, name, value):
            self._assigned[(id(module), name)] = value

    def _twins(self, tensor: Any) -> List[Any]:
        if id(tensor) not in self._state_of:
            self._note_built()
        state = self._state_of.get(id(tensor))
        return [] if state is None else [state.tensor, state.lazy()]

    def _note_built(self) -> None:
        """Note the lazy tensors that the trace has made since the last look."""
        unbuilt = []
        for state, proxy in self._unbuilt:
            if proxy.build_finished:
                self._state_of[id(proxy.lazy_origin)] = state
            else:
                unbuilt.append((state, proxy))
        self._unbuilt = unbuilt

    def written(self) -> List[Tuple[Written, Any]]:
        """What is to be written back after each run, and the lazy tensors that hold it.

        Raises :class:`GraphModeError` where that cannot be what eager mode does.
        """
        self._check_views()
        found: Dict[int, Tuple[Written, Any]] = {}
        for state in self._states:
            keys = [(id(module), name) for module, name in state.places]
            value = next((self._assigned[k] for k in keys if k in self._assigned), state.built())
            if len(keys) > 1 and any(key in self._assigned for key in keys):
                raise GraphModeError(
                    f"{self._what} sets self.{state.path}, which the task holds at "
                    f"{len(keys)} places: only one of them would be another then. Write into it "
                    f"with self.{state.path}.copy_(...), or hold it at one place"
                )
            counted = any(name == _COUNTED for _, name in state.places)
            if counted or value is None or name_of(value) in state.names:
                continue
            if state.tensor.requires_grad and self._updates:
                raise GraphModeError(
                    f"{self._what} changes self.{state.path}, a parameter that trains"
                    f"{self._line_of(name_of(value))}, which a compiled step also updates: change "
                    "it in on_train_batch_start or on_train_batch_end"
                )
            found[id(state.tensor)] = Written(state.tensor, state.places), value
        counts = {
            id(state.tensor)
            for state in self._states
            if any(n == _COUNTED for _, n in state.places)
        }
        for tensor in self._writes.outside.values():
            if id(tensor) not in counts:  # a step may reach its layers as they are, eagerly
                found.setdefault(id(tensor), (Written(tensor, ()), tensor))
        return list(found.values())

    def _line_of(self, name: str) -> str:
        lines = [each.line for each in self._writes.noted if each.after == name]
        return f" at {lines[-1]}" if lines else ""

    def _check_views(self) -> None:
        called, batch = dict(self._called), set(self._batch)
        changes_batch, changes_saved = "", ""
        for alias in aliases(self._writes):
            before, after = alias.write.before, alias.write.after
            at = f" at {alias.write.line}" if alias.write.line else ""
            if before in called:
                called[after] = called[before]
            elif before in batch:
                batch.add(after)
            whole = before in called or before.startswith(_OUTSIDE)
            others = [called[name] for name in alias.memory if name in called]
            others += ["a tensor beside the task" for n in alias.memory if n.startswith(_OUTSIDE)]
            if alias.read or (others and not whole):
                of = f" of {others[0]}" if others else ""
                raise GraphModeError(
                    f"{self._what} writes in place into a view{of}{at}: in a static graph a view "
                    "is a tensor of its own, and what it is a view of would stay as it is. Write "
                    "x[:, 0] = ... in the place of x[:, 0].mul_(2), or make a new tensor of both"
                )
            if alias.memory & batch:
                changes_batch = changes_batch or at
            if alias.read_by_backward:
                changes_saved = changes_saved or at
        if changes_batch:
            warn(
                f"{self._what} changes its batch in place{changes_batch}: a compiled step works on "
                "a copy, and whoever reads that batch afterwards (a hook, the next epoch) finds it "
                f"as it was, and in eager mode changed. {_MEND}."
            )
        if changes_saved:
            warn(
                f"{self._what} changes a tensor in place{changes_saved} that the backward pass "
                "needs as it was: a compiled step computes the gradient of what was there, and "
                f"OneFlow's eager mode that of what it was changed to. {_MEND}."
            )


def tell_what_is_forgotten(graph: nn.Graph) -> None:
    """Warn at the trace of a graph of the user's own where its ``build`` writes into buffers."""
    build = graph.build

    def told(*args: Any, **kwargs: Any) -> Any:
        outputs = build(*args, **kwargs)
        written = [
            state.path
            for proxy in graphs.proxies_in(graph)
            for state in states_of(proxy)
            if all(name != _COUNTED for _, name in state.places)
            and state.built() is not None
            and not _is_unwritten(state)
        ]
        if written:
            warn(
                f"{type(graph).__name__}.build writes in place into {', '.join(written[:4])}: a "
                "graph of your own forgets that with each run. Leave build_graph() as it is, or "
                "return what is to be kept and write it in on_train_batch_end."
            )
        return outputs

    graph.build = told


def _is_unwritten(state: TracedState) -> bool:
    """True where the trace has left it as it was; a graph that cuts its batches repeats it."""
    name = name_of(state.built())
    repeated = [f"{each.rpartition('/')[0]}-repeat-" for each in state.names]
    return name in state.names or name.startswith(tuple(repeated))
