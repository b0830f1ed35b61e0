"""Layers that a static graph treats differently, dropout and batch norm, made to act alike.

A compiled batch norm updates its running statistics but not ``num_batches_tracked``: its calls
are counted at the trace, and added up after the steps.

A compiled ``nn.Dropout`` draws from a sequence of its own that starts anew with each graph, so
graphs for several batch shapes, or a resumed run, would repeat masks. Here the masks are inputs
of the graph instead. Each is drawn eagerly from the layer's own generator before the step, which
makes them exactly those of eager mode, whatever the shapes of the batches.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any, Callable, Dict, Iterator, List, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import module_of


class Masks:
    """The dropout calls of one traced step, in their order, and their masks."""

    def __init__(self, calls: List[Tuple[nn.Dropout, Tuple[int, ...], Any]]) -> None:
        self._sources = [(layer, flow.ones(shape, dtype=dtype)) for layer, shape, dtype in calls]

    def to(self, device: flow.device) -> Masks:
        """Draw on ``device`` from now on."""
        self._sources = [(layer, ones.to(device)) for layer, ones in self._sources]
        return self

    def placeholders(self) -> List[Any]:
        """Tensors of the masks' shapes; draws nothing."""
        return [ones for _, ones in self._sources]

    def draw(self) -> List[Any]:
        """The next mask for each call: 0 where dropped, ``1 / (1 - p)`` elsewhere."""
        return [layer(ones.clone() if layer.inplace else ones) for layer, ones in self._sources]


def active_dropouts(task: nn.Module) -> List[nn.Dropout]:
    """The dropout layers of ``task`` that draw masks now."""
    return [
        module
        for module in task.modules()
        if type(module) is nn.Dropout and module.training and module.p > 0
    ]


@contextlib.contextmanager
def recorded_dropout(
    task: nn.Module, calls: List[Tuple[nn.Dropout, Tuple[int, ...], Any]]
) -> Iterator[None]:
    """While tracing, append each dropout call to ``calls`` and let its input pass."""

    def handle(layer: Any, x: Any) -> Any:
        calls.append((module_of(layer), tuple(x.shape), x.dtype))
        return x

    with _replaced_forward(active_dropouts(task), handle):
        yield


@contextlib.contextmanager
def masked_dropout(task: nn.Module, masks: List[Any]) -> Iterator[None]:
    """While tracing, let each dropout call multiply with the next of ``masks``."""
    following = iter(masks)
    with _replaced_forward(active_dropouts(task), lambda layer, x: x * next(following)):
        yield


@contextlib.contextmanager
def counted_batch_norms(task: nn.Module, calls: Dict[Any, int]) -> Iterator[None]:
    """While tracing, count the calls of each batch norm that counts its batches."""
    layers = [
        module
        for module in task.modules()
        if module.training and getattr(module, "num_batches_tracked", None) is not None
    ]

    def handle(layer: Any, x: Any) -> Any:
        origin = module_of(layer)
        calls[origin] = calls.get(origin, 0) + 1
        return type(origin).forward(layer, x)

    with _replaced_forward(layers, handle):
        yield


@contextlib.contextmanager
def _replaced_forward(layers: List[Any], handle: Callable[[Any, Any], Any]) -> Iterator[None]:
    def forward(self: Any, x: Any, addend: Any = None) -> Any:
        result = handle(self, x)
        return result if addend is None else result + addend

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
