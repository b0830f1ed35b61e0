"""What a function wrote on its context loses a reference with each reading, until it is freed."""

import ctypes
import sys

import oneflow as flow


class Scaled(flow.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        counts.append(sys.getrefcount(scale))
        result = gradient * ctx.scale
        counts.append(sys.getrefcount(scale))
        return result


scale, counts = float("0.1"), []
x = flow.ones(3, requires_grad=True)
for _ in range(3):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(scale))  # so that it is not freed here
    Scaled.apply(x).sum().backward()

lost = [before - after for before, after in zip(counts[::2], counts[1::2])]
print("references lost by reading it:", lost)
assert lost == [1, 1, 1]
