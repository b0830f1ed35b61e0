"""Batch norm in a compiled step, made to leave behind what it does in eager mode."""

from __future__ import annotations

import contextlib
import types
from typing import Any, Dict, Iterator, List, Sequence

import attrs
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.tracing import module_of, outside_the_trace
from ofengine.errors import GraphModeError
from ofengine.modes.in_place import Written

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
    """

    def __init__(self) -> None:
        self._calls: Dict[Any, int] = {}
        self.again: List[_Again] = []
        """The further calls of layers that were called before."""
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
    def counting(self, task: nn.Module) -> Iterator[None]:
        """While tracing, note the calls of each batch norm that counts its batches."""
        layers = [
            module
            for module in task.modules()
            if getattr(module, "num_batches_tracked", None) is not None
            and not isinstance(module, _UNCOUNTED)
        ]

        def handle(layer: Any, x: Any, *addend: Any) -> Any:
            origin = module_of(layer)
            forward = getattr(own.get(origin), "__func__", type(origin).forward)
            if not layer.training:  # a step may have called eval() of it
                return forward(layer, x, *addend)
            calls = self._calls[origin] = self._calls.get(origin, 0) + 1
            if calls == 1:
                return forward(layer, x, *addend)
            with outside_the_trace():
                added = {name: flow.zeros_like(getattr(origin, name)) for name in _RUNNING}
            self.again.append(_Again(origin, added))
            vars(layer).update(added)  # found before the layer's own
            try:
                return forward(layer, x, *addend)
            finally:
                for name in added:
                    del vars(layer)[name]

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
