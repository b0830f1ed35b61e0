"""Batch norm in a compiled step, made to leave behind what it does in eager mode."""

from __future__ import annotations

import contextlib
import types
from typing import Any, Dict, Iterator, List, Sequence, Set

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.global_tensors import Ranks, local
from ofengine._oneflow.graphs import proxies_in
from ofengine._oneflow.lazy_names import name_of
from ofengine._oneflow.normalizations import read_behind_update
from ofengine._oneflow.traced_operations import TracedOperations
from ofengine._oneflow.tracing import module_of, outside_the_trace, states_of
from ofengine.errors import GraphModeError
from ofengine.modes.in_place import Written
from ofengine.ranks.meetings import Meetings
from ofengine.ranks.statistics import KINDS, update_by_calls

_UNCOUNTED = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""They have the counter of batch norm, and leave it alone."""
_RUNNING = ("running_mean", "running_var")


@attrs.frozen
class _Again:
    """A further call of one layer: what it adds to the running statistics, kept apart.

    A compiled graph may write each of them once. So a further call starts from 0 in tensors of
    its own, and what is there after a run is added as the call itself would: r * (1 - m) + added.
    """

    layer: Any
    added: Dict[str, Any]

    def take_over(self) -> None:
        with flow.no_grad():
            for name, added in self.added.items():
                getattr(self.layer, name).mul_(1.0 - self.layer.momentum).add_(added)
                added.zero_()


class BatchNorms:
    """The calls of batch norms in one compiled step.

    A compiled batch norm updates its running statistics but not ``num_batches_tracked``: the calls
    are added up after the steps.

    Args:
        apart: keep apart what each call adds, the first ones too, for :meth:`exchange`.
    """

    def __init__(self, apart: bool = False) -> None:
        self._apart = apart
        self._calls: Dict[Any, int] = {}
        self._used: Set[Any] = set()
        """The layers that were called in eval mode."""
        self._own: Set[Any] = set()
        """The layers of which a call in training mode updates the running statistics themselves."""
        self._updated: Dict[Any, Set[str]] = {}
        """Of layers called in training mode, the names of what is kept apart for their means."""
        self.again: List[_Again] = []
        """The further calls of layers that were called before; all calls, where these are apart."""
        self.runs = 0
        """Runs since :meth:`settle`."""

    @property
    def scratch(self) -> List[Any]:
        """Tensors that the graph writes besides its buffers."""
        return [tensor for each in self.again for tensor in each.added.values()]

    def take_over(self) -> None:
        """Add what the last run's further calls left to the running statistics."""
        for each in self.again:
            each.take_over()

    def exchange(self, ranks: Meetings, each_its_own: bool) -> None:
        """Add what the last run's calls on all ranks have left, rank by rank.

        ``each_its_own``: False where all ranks had the same batch, which counts once.
        """
        if self.again:
            kept = [local(tensor) for tensor in self.scratch]
            flat = np.concatenate([each.numpy().reshape(-1) for each in kept]).astype(np.float64)
            rows = ranks.gather(flat) if each_its_own else flat[None]
            update_by_calls([each.layer for each in self.again], rows)
            for each in kept:
                each.zero_()
        self.runs += ranks.size if each_its_own else 1

    def refuse(self, written: Sequence[Written]) -> None:
        """Raise where a step writes into running statistics that a layer of it updates too."""
        for each in written:
            for module, name in each.places:
                if name in _RUNNING and module in self._calls:
                    raise GraphModeError(
                        f"the step writes into {name} of a {type(module).__name__} that it also "
                        "calls in training mode: call eval() of the layer in __init__, or write "
                        "into it in on_train_batch_end"
                    )

    def settle(self) -> None:
        """Bring ``num_batches_tracked`` up to date."""
        for layer, calls in self._calls.items():
            layer.num_batches_tracked.add_(calls * self.runs)
        self.runs = 0

    @contextlib.contextmanager
    def counting(self, task: nn.Module, graph: nn.Graph) -> Iterator[None]:
        """While ``graph`` is traced, note the calls of each batch norm that counts its batches."""
        kept = vars(graph).get("build")
        build = graph.build

        def checked(*args: Any, **kwargs: Any) -> Any:
            outputs = build(*args, **kwargs)
            self._refuse_late_reads(task, graph, outputs)
            return outputs

        vars(graph)["build"] = checked
        try:
            with self._noting_calls(task):
                yield
        finally:
            del vars(graph)["build"]
            if kept is not None:
                vars(graph)["build"] = kept

    @contextlib.contextmanager
    def _noting_calls(self, task: nn.Module) -> Iterator[None]:
        layers = [module for module in task.modules() if self._replaces(module)]

        def handle(layer: Any, x: Any, *addend: Any) -> Any:
            origin = module_of(layer)
            forward = getattr(own.get(origin), "__func__", type(origin).forward)
            if not layer.training:  # a step may have called eval() of it
                self._used.add(origin)
                return forward(layer, x, *addend)
            return self._call(layer, origin, forward, x, *addend)

        own = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
        for layer in layers:
            vars(layer)["forward"] = types.MethodType(handle, layer)
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer)["forward"]
                if layer in own:
                    vars(layer)["forward"] = own[layer]

    def _replaces(self, module: nn.Module) -> bool:
        """True for a layer whose calls are noted."""
        counts = getattr(module, "num_batches_tracked", None) is not None
        return counts and not isinstance(module, _UNCOUNTED)

    def _call(self, layer: Any, origin: Any, forward: Any, x: Any, *addend: Any) -> Any:
        """A call of ``origin`` in training mode, for which ``layer`` stands in the trace."""
        calls = self._calls[origin] = self._calls.get(origin, 0) + 1
        updated = self._updated.setdefault(origin, set())
        if calls == 1 and not self._apart and origin not in self._used:
            self._own.add(origin)
            return forward(layer, x, *addend)
        with outside_the_trace():
            added = {name: flow.zeros_like(getattr(origin, name)) for name in _RUNNING}
        self.again.append(_Again(origin, added))
        vars(layer).update(added)  # found before the layer's own
        try:
            return forward(layer, x, *addend)
        finally:
            updated.add(name_of(added["running_mean"]))
            for name in added:
                del vars(layer)[name]

    def _refuse_late_reads(self, task: nn.Module, graph: nn.Graph, outputs: Any) -> None:
        """Raise where the step reads running statistics after a call that changes them."""
        if not self._updated:
            return
        names: Dict[Any, Set[str]] = {}
        for state in (each for proxy in proxies_in(graph) for each in states_of(proxy)):
            for module, name in state.places:
                if module in self._updated and name in _RUNNING:
                    names.setdefault(module, set()).update(state.names)
        forward = getattr(getattr(graph, "in_place", None), "backward_began", 0)
        step = TracedOperations()
        for layer, means in self._updated.items():
            own = names.get(layer, set())
            means = means | own if layer in self._own else means
            if read_behind_update(step, means, own, outputs, forward):
                paths = {module: path for path, module in task.named_modules()}
                raise GraphModeError(
                    f"the step reads the running statistics of self.{paths[layer]}, itself or by "
                    "a call in eval mode, after a call in training mode has changed them, which a "
                    "static graph cannot: read them in on_train_batch_end, call in eval mode "
                    "before the call in training mode and under oneflow.no_grad(), or use "
                    'Trainer(mode="eager")'
                )


class BatchNormsOfAll(BatchNorms):
    """Batch norms of one compiled step that normalize by the rows of all ranks.

    OneFlow's own takes a rank's rows for all. Means over global tensors are those of all rows, so
    here a call is made of simple operations; what it writes into the running statistics is written
    back as what a step writes elsewhere.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def exchange(self, ranks: Meetings, each_its_own: bool) -> None:
        """Nothing needs to be exchanged: all rows were one batch."""
        self.runs += 1

    def refuse(self, written: Sequence[Written]) -> None:
        """Nothing: what a step writes into running statistics comes in its order."""

    def _replaces(self, module: nn.Module) -> bool:
        return isinstance(module, KINDS)

    def _call(self, layer: Any, origin: Any, forward: Any, x: Any, *addend: Any) -> Any:
        layer._check_input_dim(x)
        others, shape = [0, *range(2, x.ndim)], (1, x.shape[1], *[1] * (x.ndim - 2))
        mean = self._ranks.whole(x.mean(dim=others))
        centred = x - mean.reshape(shape)
        variance = self._ranks.whole((centred * centred).mean(dim=others))
        if layer.running_mean is not None:
            self._calls[origin] = self._calls.get(origin, 0) + 1
            count = x.numel() // x.shape[1]
            unbiased = variance * (count / max(count - 1, 1))
            for name, value in zip(_RUNNING, (mean, unbiased)):
                kept = getattr(layer, name) * (1.0 - layer.momentum)
                getattr(layer, name).copy_(kept + value.detach() * layer.momentum)
        scale = 1.0 / (variance + layer.eps).sqrt()
        if layer.weight is None:
            return centred * scale.reshape(shape)
        return centred * (scale * layer.weight).reshape(shape) + layer.bias.reshape(shape)
