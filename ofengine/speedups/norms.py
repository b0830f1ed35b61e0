"""LayerNorm in operators that OneFlow's CPU computes fast.

OneFlow's own kernel goes through a batch element by element, and so does any operator with an
operand that is broadcast along the last dimension: 46 ns an element. The same numbers stretched
along that dimension by a product with a row of ones, which is exact, cost a hundredth of that.
"""

from __future__ import annotations

import functools
from typing import Any, Tuple

import oneflow as flow
from oneflow.autograd import Function

from ofengine.speedups.functions import refuse_second_derivatives, stretched


@functools.lru_cache(maxsize=None)
def _layer_norm_with(eps: float) -> Any:
    """The function with this ``eps``: OneFlow hands tensors alone to one."""

    class LayerNormRows(Function):
        """``(x - mean) / sqrt(var + eps) * weight + bias`` of each row of a matrix."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
            width = x.shape[1]
            centred = x - stretched(x.mean(1, keepdim=True), width)
            variance = flow.square(centred).mean(1, keepdim=True)
            scale = stretched(flow.rsqrt(variance + eps), width)
            normal = centred * scale
            ctx.save_for_backward(normal, scale, weight)
            return normal * weight + bias

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Tuple[Any, ...]:
            refuse_second_derivatives()
            normal, scale, weight = ctx.saved_tensors
            width = normal.shape[1]
            inner = grad * weight
            along = stretched((inner * normal).mean(1, keepdim=True), width)
            inner = inner - stretched(inner.mean(1, keepdim=True), width)
            return (inner - normal * along) * scale, (grad * normal).sum(0), grad.sum(0)

    return LayerNormRows


def layer_norm(x: Any, width: int, weight: Any, bias: Any, eps: float) -> Any:
    """LayerNorm over the last dimensions of ``x``, which have ``width`` elements together."""
    rows = _layer_norm_with(eps).apply(x.reshape(-1, width), weight.reshape(-1), bias.reshape(-1))
    return rows.reshape(x.shape)
