"""flowvision's transforms for whole batches, with the random draws of one sample after another.

A chain of transforms becomes steps. A step first *draws* what its transform draws for each sample,
then is *applied* to all of them. What does the same to each value of a channel (``ToTensor``,
``Normalize``) becomes one table of 256 numbers a channel, which flowvision's own code makes.
"""

from __future__ import annotations

import abc
from typing import Any, Callable, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow

from ofengine._oneflow.handover import empty
from ofengine.errors import ConfigurationError, said_by

Images = Any
"""A numpy array of uint8, (batch, height, width, channels)."""

ONEFLOW, NUMPY, PYTHON = "oneflow", "numpy", "python"
"""The global generators that transforms draw from."""


class Step(abc.ABC):
    """One transform, for batches. Subclasses say what they draw for a sample, and do it to all."""

    generators: FrozenSet[str] = frozenset()
    """What it draws from."""

    def draw(self) -> Any:
        """What the transform draws for one sample: nothing, where a subclass does not say."""
        return None

    def draw_all(self, samples: int) -> Any:
        """What ``draw`` gives so often; only where nothing else uses the same generators."""
        return [self.draw() for _ in range(samples)]

    @abc.abstractmethod
    def apply(self, images: Any, drawn: Any) -> Any:
        """Transform the batch, which may be written to."""


def draw(
    steps: Sequence[Step], samples: int, each: Optional[Callable[[int], None]] = None
) -> List[Any]:
    """For each step what it draws for all samples, as if one sample were made after another.

    ``each`` is called for each sample after its steps have drawn: it may draw from anything.
    """
    counts = [sum(bool(s.generators & other.generators) for other in steps) for s in steps]
    alone = [each is None and count <= 1 for count in counts]
    drawn: List[Any] = [step.draw_all(samples) if is_alone else [] for step, is_alone in
                        zip(steps, alone)]  # fmt: skip
    together = [(step.draw, into.append) for step, into, is_alone in zip(steps, drawn, alone)
                if not is_alone]  # fmt: skip
    for sample in range(samples) if together or each is not None else ():
        for draw_one, append in together:
            append(draw_one())
        if each is not None:
            each(sample)
    return drawn


# ---------------------------------------------------------------------- pixels


class Flip(Step):
    """Along ``axis`` of an image, each image with the probability ``p``."""

    generators = frozenset({ONEFLOW})

    def __init__(self, p: float, axis: int) -> None:
        # ``axis`` is one of an image, which has one less than the batch.
        self.p, self.axis = p, axis

    def draw(self) -> Any:
        return flow.rand(1)

    def draw_all(self, samples: int) -> Any:
        return flow.rand(samples)

    def apply(self, images: Any, drawn: Any) -> Any:
        # Here the device is waited for; whatever can be done before, is.
        numbers_drawn = flow.cat(drawn) if isinstance(drawn, list) else drawn
        backwards = (slice(None),) * self.axis + (slice(None, None, -1),)
        for index in np.flatnonzero((numbers_drawn < self.p).numpy()).tolist():
            images[index] = images[index][backwards]
        return images


class Crop(Step):
    """To ``size``, at the same place of all."""

    def __init__(self, size: Sequence[int], top: int, left: int) -> None:
        self._rows, self._columns = slice(top, top + size[0]), slice(left, left + size[1])

    def apply(self, images: Images, drawn: Any) -> Images:
        return images[:, self._rows, self._columns]


class RandomCrop(Step):
    """To ``size``, each at a place of its own among ``places``, so many from top and left."""

    generators = frozenset({NUMPY})

    def __init__(self, size: Sequence[int], places: Tuple[int, int]) -> None:
        self._size, self._places = size, places

    def draw(self) -> Any:
        return [np.random.randint(0, most) for most in self._places]

    def draw_all(self, samples: int) -> Any:
        if self._places[0] == self._places[1]:
            return np.random.randint(0, self._places[0], (samples, 2)).tolist()
        return super().draw_all(samples)

    def apply(self, images: Images, drawn: Any) -> Images:
        height, width = self._size
        cropped = np.empty((len(images), height, width, images.shape[3]), dtype=images.dtype)
        for image, (top, left), out in zip(images, drawn, cropped):
            out[...] = image[top : top + height, left : left + width]
        return cropped


class Pad(Step):
    """By so many pixels of the value ``fill``."""

    def __init__(self, left: int, top: int, right: int, bottom: int, fill: int) -> None:
        self._sides, self._fill = (left, top, right, bottom), fill

    def apply(self, images: Images, drawn: Any) -> Images:
        left, top, right, bottom = self._sides
        samples, height, width, channels = images.shape
        shape = (samples, top + height + bottom, left + width + right, channels)
        padded = np.full(shape, self._fill, dtype=images.dtype)
        padded[:, top : top + height, left : left + width] = images
        return padded


class EachImage(Step):
    """By PIL, image by image. Subclasses say what is done to one."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = size
        """(height, width) of what comes out."""

    @abc.abstractmethod
    def one(self, image: Any, drawn: Any) -> Any:
        """Transform one PIL image."""

    def apply(self, images: Images, drawn: Any) -> Images:
        made = np.empty((len(images), *self.size, images.shape[3]), dtype=np.uint8)
        for pixels, each, out in zip(images, drawn, made):
            image = np.asarray(self.one(as_image(pixels), each))
            out[...] = image[..., None] if image.ndim == 2 else image
        return made


def as_image(pixels: Any) -> Any:
    """A PIL image of (height, width, channels)."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


class Resize(EachImage):
    """flowvision's ``Resize``."""

    def __init__(self, transform: Any, size: Sequence[int]) -> None:
        super().__init__(size)
        self._transform = transform

    def one(self, image: Any, drawn: Any) -> Any:
        return self._transform(image)


class RandomResizedCrop(EachImage):
    """flowvision's ``RandomResizedCrop``, out of images of the size of ``blank``."""

    generators = frozenset({NUMPY})

    def __init__(self, transform: Any, blank: Any) -> None:
        super().__init__(tuple(transform.size))
        self._transform, self._blank = transform, blank

    def draw(self) -> Any:
        of = self._transform
        return of.get_params(self._blank, of.scale, of.ratio)

    def one(self, image: Any, drawn: Any) -> Any:
        from flowvision.transforms.functional import resized_crop

        return resized_crop(image, *drawn, self._transform.size, self._transform.interpolation)


class ColorJitter(EachImage):
    """flowvision's ``ColorJitter``; what it draws is read once for a batch, not one by one."""

    generators = frozenset({ONEFLOW})

    def __init__(self, transform: Any, size: Sequence[int]) -> None:
        from flowvision.transforms import functional

        super().__init__(size)
        of, by = transform, functional
        ranges = (of.brightness, of.contrast, of.saturation, of.hue)
        own = (by.adjust_brightness, by.adjust_contrast, by.adjust_saturation, by.adjust_hue)
        self._ranges = [each for each in ranges if each is not None]
        # In the order of its numbers; what is switched off has a number too, and draws none.
        self._adjust = [f if each is not None else None for f, each in zip(own, ranges)]

    def draw(self) -> Any:
        order = flow.randperm(4)
        return order, [flow.empty(1).uniform_(low, high) for low, high in self._ranges]

    def apply(self, images: Images, drawn: Any) -> Images:
        orders = flow.stack([order for order, _ in drawn]).numpy().tolist()
        factors: List[Any] = [[]] * len(orders)
        if self._ranges:
            factors = flow.stack([flow.cat(each) for _, each in drawn]).numpy().tolist()
        return super().apply(images, list(zip(orders, factors)))

    def one(self, image: Any, drawn: Any) -> Any:
        order, factors = drawn
        given = iter(factors)
        by_number = [None if adjust is None else next(given) for adjust in self._adjust]
        for number in order:
            adjust = self._adjust[number]
            if adjust is not None:
                image = adjust(image, by_number[number])
        return image


# ---------------------------------------------------------------------- numbers


class Table(Step):
    """Each value of a channel by that of a table, which ``transforms`` make: (channels, 256)."""

    def __init__(self, transforms: Sequence[Any], channels: int) -> None:
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        made = transforms[0](np.repeat(ramp, channels, 2))
        for each in transforms[1:]:
            try:
                made = each(made)
            except Exception as error:
                raise ConfigurationError(
                    f"in_memory_loader: {each!r} does not fit images of {channels} channel(s) "
                    f"({said_by(error)}): give a number for each channel."
                ) from error
        self._table = made.numpy().reshape(-1, 256)

    def apply(self, images: Images, drawn: Any) -> Any:
        samples, height, width, _ = images.shape
        made = empty((samples, len(self._table), height, width), np.float32)
        for channel, values in enumerate(self._table):
            np.take(values, images[..., channel], mode="clip", out=made[:, channel])
        return made


class RandomErasing(Step):
    """flowvision's ``RandomErasing`` of arrays of numbers; ``after`` are what comes behind it."""

    def __init__(self, transform: Any, shape: Sequence[int], after: Sequence[Any]) -> None:
        if flow.device(transform.device).type != "cpu":
            raise ConfigurationError(
                f"in_memory_loader: RandomErasing(device={transform.device!r}) erases there, and "
                'the images of a loader are on the CPU: write RandomErasing(..., device="cpu").'
            )
        self._transform, self._after = transform, list(after)
        self._shape = flow.Size(shape)
        self._is_random = transform.per_pixel or transform.rand_color
        self.generators = frozenset({PYTHON, ONEFLOW} if self._is_random else {PYTHON})
        self._constant = self._finished(flow.zeros(shape[0], 1, 1))

    def _finished(self, block: Any) -> Any:
        for each in self._after:
            block = each(block)
        return block.numpy()

    def draw(self) -> Any:
        erased = _Erased(self._shape)
        self._transform(erased)
        return erased.blocks

    def apply(self, images: Any, drawn: Any) -> Any:
        for image, blocks in zip(images, drawn):
            for place, block in blocks:
                image[place] = self._finished(block) if self._is_random else self._constant
        return images


class _Erased:
    """Stands for an image: takes note of what is written where."""

    dtype = flow.float32

    def __init__(self, shape: Any) -> None:
        self._shape = shape
        self.blocks: List[Tuple[Any, Any]] = []

    def size(self) -> Any:
        return self._shape

    def __setitem__(self, place: Any, block: Any) -> None:
        self.blocks.append((place, block))
