"""Subclasses of OneFlow's layers, by the same names, that compute in faster operators.

Without ``super()``: a graph calls ``forward`` with a stand-in for the layer.
"""

from __future__ import annotations

import math
from typing import Any

import oneflow as flow
from oneflow import nn

from ofengine._oneflow.global_tensors import computes_on
from ofengine.speedups import activations, convolutions, norms, recurrent

# What benchmarks/cpu_speedups.py found: beyond these OneFlow's own are as fast, or faster.
_LEAST_KERNEL, _MOST_COLUMNS = 25, 64


def is_for_cpu(x: Any) -> bool:
    """True for what the faster operators are for: float32 on a CPU."""
    return x.dtype == flow.float32 and computes_on(x) == "cpu" and x.numel() > 0


class LayerNorm(nn.LayerNorm):
    """See :func:`ofengine.speedups.norms.layer_norm`."""

    def forward(self, x: Any) -> Any:
        """The normalized input, of its shape."""
        shape = tuple(self.normalized_shape)
        fits = x.ndim > len(shape) and tuple(x.shape[-len(shape) :]) == shape
        if not fits or not is_for_cpu(x):
            return nn.LayerNorm.forward(self, x)
        return norms.layer_norm(x, math.prod(shape), self.weight, self.bias, self.eps)


class GELU(nn.GELU):
    """See :func:`ofengine.speedups.activations.gelu`."""

    def forward(self, input: Any) -> Any:
        """GELU of each element."""
        return activations.gelu(input) if is_for_cpu(input) else nn.GELU.forward(self, input)


class SiLU(nn.SiLU):
    """See :func:`ofengine.speedups.activations.silu`."""

    def forward(self, x: Any) -> Any:
        """SiLU of each element."""
        return activations.silu(x) if is_for_cpu(x) else nn.SiLU.forward(self, x)


class Conv2d(nn.Conv2d):
    """See :mod:`ofengine.speedups.convolutions`."""

    def forward(self, x: Any) -> Any:
        """The convolution of a batch of images."""
        fits = x.ndim == 4 and x.shape[1] == self.in_channels and x.shape[3] <= _MOST_COLUMNS
        if not fits or not is_for_cpu(x):
            return nn.Conv2d.forward(self, x)
        y = convolutions.depthwise(x, self.weight)
        return y if self.bias is None else convolutions.with_bias(y, self.bias)


class LSTM(nn.LSTM):
    """See :mod:`ofengine.speedups.recurrent`."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The last layer's output, and the last (h, c) of each layer."""
        if not _fits_cells(self, input, hx):
            return nn.LSTM.forward(self, input, hx)
        kinds = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * bool(self.bias)]
        weights = [
            tuple(getattr(self, f"{kind}_l{number}") for kind in kinds)
            for number in range(self.num_layers)
        ]
        x = input.transpose(0, 1).contiguous() if self.batch_first else input
        if hx is None:
            zeros = x.new_zeros((self.num_layers, x.shape[1], self.hidden_size))
            hx = zeros, zeros
        y, h, c = recurrent.lstm(x, weights, *hx)
        return y.transpose(0, 1).contiguous() if self.batch_first else y, (h, c)


def _fits_cells(layer: Any, x: Any, hx: Any) -> bool:
    if not isinstance(x, flow.Tensor) or x.ndim != 3 or not is_for_cpu(x):
        return False
    drops = layer.dropout and layer.num_layers > 1 and layer.training
    if drops or x.shape[2] != layer.input_size:
        return False
    state = layer.num_layers, x.shape[0 if layer.batch_first else 1], layer.hidden_size
    return hx is None or all(tuple(each.shape) == state and is_for_cpu(each) for each in hx)


def has_faster(layer: nn.Module) -> bool:
    """True where ``layer``, with the options it has, can compute in faster operators."""
    if isinstance(layer, nn.LayerNorm):
        return layer.weight is not None and layer.bias is not None
    if isinstance(layer, nn.GELU):
        return layer.approximate == "none"
    if isinstance(layer, nn.LSTM):
        return not layer.bidirectional and layer.proj_size == 0
    if not isinstance(layer, nn.Conv2d):
        return True
    kernel = tuple(layer.kernel_size)
    keeps_size = (
        tuple(layer.stride) == (1, 1)
        and tuple(layer.dilation) == (1, 1)
        and all(k % 2 for k in kernel)
        and tuple(layer.padding) == tuple(k // 2 for k in kernel)
        and layer.padding_mode == "zeros"
    )
    each_alone = 1 < layer.groups == layer.in_channels == layer.out_channels
    return keeps_size and each_alone and math.prod(kernel) >= _LEAST_KERNEL
