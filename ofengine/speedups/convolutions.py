"""Convolutions in operators that OneFlow's CPU computes fast.

A convolution of one element is a product of matrices. In one of each channel by itself, the images
of a batch lie in one row, with zeros between their rows, and what a tap of the kernel sees is this
very row, shifted: a contiguous piece of it.
"""

from __future__ import annotations

import functools
from typing import Any, Iterable, List, NamedTuple, Tuple

import oneflow as flow
from oneflow.autograd import Function

from ofengine.speedups.functions import refuse_second_derivatives, stretched


class Geometry(NamedTuple):
    """A two-dimensional convolution of stride 1 that keeps the size of an image."""

    images: int
    channels: int
    height: int
    width: int
    kernel: Tuple[int, int]
    """Both odd; the padding is half of each, rounded down."""

    @property
    def gaps(self) -> Tuple[int, int]:
        """Zeros below and to the right of an image, which serve the next one too."""
        return self.kernel[0] // 2, self.kernel[1] // 2

    @property
    def plane(self) -> int:
        """How much of the row an image's channel takes."""
        below, right = self.gaps
        return (self.height + below) * (self.width + right)

    @property
    def shifts(self) -> List[int]:
        """How far the row is shifted for each tap of the kernel, row by row; from 0 on."""
        wide = self.width + self.gaps[1]
        return [u * wide + v for u in range(self.kernel[0]) for v in range(self.kernel[1])]

    def spread(self, x: Any) -> Any:
        """The images with their gaps, a matrix with a row for each image."""
        below, right = self.gaps
        images, channels, height, width = x.shape
        zeros = x.new_zeros((images, channels, height, right))
        wide = flow.cat([x, zeros], 3).reshape(images, channels, -1)
        zeros = x.new_zeros((images, channels, below * (width + right)))
        return flow.cat([wide, zeros], 2).reshape(images, -1)

    def cropped(self, spread: Any) -> Any:
        """The inverse of :meth:`spread`."""
        below, right = self.gaps
        planes = spread.reshape(self.images, -1, self.height + below, self.width + right)
        return planes[:, :, : self.height, : self.width].contiguous()

    def shifted(self, spread: Any, backwards: bool = False) -> Iterable[Any]:
        """``spread`` as each tap of the kernel sees it; or as seen from the tap, ``backwards``."""
        shifts = self.shifts
        zeros = spread.new_zeros((shifts[-1] // 2,))
        row = flow.cat([zeros, spread.reshape(-1), zeros])
        size = row.shape[0] - shifts[-1] // 2 * 2
        for shift in reversed(shifts) if backwards else shifts:
            yield row[shift : shift + size].reshape(self.images, -1)


def _weighed(seen: Iterable[Any], weights: Any) -> Any:
    """The sum of what the taps see, each times its weights."""
    products = (each * weights[number] for number, each in enumerate(seen))
    return functools.reduce(lambda total, product: total + product, products)


@functools.lru_cache(maxsize=256)
def _depthwise(geometry: Geometry) -> Any:
    """A convolution of each channel by itself."""
    taps, channels, plane = len(geometry.shifts), geometry.channels, geometry.plane

    def stretched_weights(weight: Any) -> Any:
        column = weight.reshape(channels, taps).t().reshape(-1, 1)
        return stretched(column, plane).reshape(taps, -1)

    class Depthwise(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.save_for_backward(x, weight)
            seen = geometry.shifted(geometry.spread(x))
            return geometry.cropped(_weighed(seen, stretched_weights(weight)))

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            refuse_second_derivatives()
            x, weight = ctx.saved_tensors
            spread = geometry.spread(grad)
            of_taps = [
                (each * spread).reshape(-1, plane).sum(1).reshape(-1, channels).sum(0)
                for each in geometry.shifted(geometry.spread(x))
            ]
            of_weight = flow.stack(of_taps, 1).reshape(weight.shape)
            seen = geometry.shifted(spread, backwards=True)
            of_x = _weighed(seen, stretched_weights(weight))
            return geometry.cropped(of_x), of_weight

    return Depthwise


def depthwise(x: Any, weight: Any) -> Any:
    """``conv2d(x, weight, groups=channels)`` with one filter a channel, which keeps the size."""
    images, channels, height, width = x.shape
    kernel = weight.shape[2], weight.shape[3]
    return _depthwise(Geometry(images, channels, height, width, kernel)).apply(x, weight)


def pointwise(x: Any, weight: Any) -> Any:
    """``conv2d(x, weight)`` with a kernel of one element."""
    images, channels, height, width = x.shape
    flat = flow.matmul(weight.reshape(-1, channels), x.reshape(images, channels, -1))
    return flat.reshape(images, -1, height, width)


def with_bias(y: Any, bias: Any) -> Any:
    """``y`` with ``bias`` added to each of its channels."""
    images, _, height, width = y.shape
    planes = stretched(bias.reshape(-1, 1), height * width).reshape(-1)
    return (y.reshape(images, -1) + planes).reshape(y.shape)
