"""Batch norm in a compiled step, made to leave behind what it does in eager mode."""

from __future__ import annotations

import contextlib
import types
from typing import Any, Dict, Iterator

from oneflow import nn

from ofengine._oneflow.tracing import module_of

_UNCOUNTED = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""They have the counter of batch norm, and leave it alone."""


@contextlib.contextmanager
def counted_batch_norms(task: nn.Module, calls: Dict[Any, int]) -> Iterator[None]:
    """While tracing, count the calls of each batch norm that counts its batches.

    A compiled batch norm updates its running statistics but not ``num_batches_tracked``: the calls
    are added up after the steps.
    """
    layers = [
        module
        for module in task.modules()
        if getattr(module, "num_batches_tracked", None) is not None
        and not isinstance(module, _UNCOUNTED)
    ]

    def handle(layer: Any, x: Any, *addend: Any) -> Any:
        origin = module_of(layer)
        if layer.training:  # a step may have called eval() of it
            calls[origin] = calls.get(origin, 0) + 1
        return type(origin).forward(layer, x, *addend)

    for layer in layers:
        layer.forward = types.MethodType(handle, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
