"""A chain of flowvision's transforms as steps for batches of images of one size."""

from __future__ import annotations

import itertools
import numbers
from typing import Any, Iterator, List, Sequence, Tuple

from ofengine.data.transforms import (
    ColorJitter,
    Crop,
    Flip,
    Pad,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    Step,
    Table,
)
from ofengine.errors import ConfigurationError

__all__ = ["flat", "steps_of"]


def steps_of(transform: Any, shape: Sequence[int]) -> List[Step]:
    """``transform`` for batches of images of ``shape``: (height, width, channels).

    Raises:
        ConfigurationError: a transform has no form for batches, or not at its place.
    """
    from flowvision import transforms
    from flowvision.data import RandomErasing as Erasing

    every = list(flat(transform))
    in_pixels = list(itertools.takewhile(lambda each: type(each) is not transforms.ToTensor, every))
    chain = _Pixels(shape)
    for each in in_pixels:
        chain.add(each)
    behind = every[len(in_pixels) + 1 :]
    if len(every) == len(in_pixels):
        raise ConfigurationError(
            "in_memory_loader: the dataset's transform makes no tensors: add "
            "flowvision.transforms.ToTensor()."
        )
    values = [each for each in behind if type(each) is transforms.Normalize]
    # Flips at the end are the same of numbers, and there as late as can be: they wait for the
    # device.
    flips = list(itertools.takewhile(lambda step: isinstance(step, Flip), reversed(chain.steps)))
    steps = chain.steps[: len(chain.steps) - len(flips)]
    steps.append(Table([every[len(in_pixels)], *values], shape[2]))
    steps += [Flip(flip.p, flip.axis + 1) for flip in reversed(flips)]  # type: ignore[attr-defined]
    for place, each in enumerate(behind, 1):
        if type(each) is Erasing:
            after = [later for later in behind[place:] if later in values]
            steps.append(RandomErasing(each, (shape[2], *chain.size), after))
        elif each not in values:
            raise _no_form(each)
    return steps


class _Pixels:
    """The steps of the transforms before ``ToTensor``."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.size: Tuple[int, int] = (shape[0], shape[1])
        """(height, width) behind the steps so far."""
        self.steps: List[Step] = []

    def add(self, each: Any) -> None:
        """Add the form of one transform."""
        from flowvision import transforms

        kind = type(each)
        if kind is transforms.RandomHorizontalFlip:
            self.steps.append(Flip(each.p, 1))
        elif kind is transforms.RandomVerticalFlip:
            self.steps.append(Flip(each.p, 0))
        elif kind is transforms.Pad:
            self._pad_as(each, each.padding)
        elif kind is transforms.CenterCrop:
            self._center_crop(each.size)
        elif kind is transforms.RandomCrop:
            self._random_crop(each)
        elif kind is transforms.Resize:
            size = each(self._blank()).size[::-1]
            if size != self.size:  # or PIL copies
                self._add(Resize(each, size), size)
        elif kind is transforms.RandomResizedCrop:
            self._add(RandomResizedCrop(each, self._blank()), tuple(each.size))
        elif kind is transforms.ColorJitter:
            self.steps.append(ColorJitter(each, self.size))
        else:
            raise _no_form(each)

    def _blank(self) -> Any:
        from PIL import Image

        return Image.new("L", self.size[::-1])

    def _add(self, step: Step, size: Any) -> None:
        self.steps.append(step)
        self.size = size

    def _pad(self, left: int, top: int, right: int, bottom: int, fill: Any = 0) -> None:
        size = self.size[0] + top + bottom, self.size[1] + left + right
        self._add(Pad(left, top, right, bottom, fill), size)

    def _pad_as(self, each: Any, padding: Any) -> None:
        sides = _sides(padding)
        plain = each.padding_mode == "constant" and isinstance(each.fill, numbers.Integral)
        if not plain or min(sides) < 0:
            raise _no_form(each)
        self._pad(*sides, each.fill)

    def _center_crop(self, wanted: Sequence[int]) -> None:
        more = [max(want - has, 0) for want, has in zip(wanted, self.size)]
        if any(more):
            self._pad(more[1] // 2, more[0] // 2, (more[1] + 1) // 2, (more[0] + 1) // 2)
        top, left = (round((has - want) / 2.0) for want, has in zip(wanted, self.size))
        self._add(Crop(wanted, top, left), (wanted[0], wanted[1]))

    def _random_crop(self, each: Any) -> None:
        height, width = each.size
        if each.padding is not None:
            self._pad_as(each, each.padding)
        if each.pad_if_needed and self.size[1] < width:
            self._pad_as(each, (width - self.size[1], 0))
        if each.pad_if_needed and self.size[0] < height:
            self._pad_as(each, (0, height - self.size[0]))
        places = self.size[0] - height + 1, self.size[1] - width + 1
        if min(places) < 1:
            raise ConfigurationError(
                f"in_memory_loader: {each!r} is larger than the images, which are "
                f"{self.size[0]} x {self.size[1]} there: give a smaller size, or a larger padding."
            )
        if places != (1, 1):  # or it draws nothing
            self._add(RandomCrop(each.size, places), (height, width))


def _no_form(transform: Any) -> ConfigurationError:
    return ConfigurationError(
        f"in_memory_loader has no form for batches of the transform {transform!r}, or not at this "
        "place: use oneflow.utils.data.DataLoader, or leave the transform out."
    )


def flat(transform: Any) -> Iterator[Any]:
    """The transforms of a ``Compose``, and of those in it, one after the other."""
    from flowvision import transforms

    if type(transform) is transforms.Compose:
        for each in transform.transforms:
            yield from flat(each)
    elif transform is not None:
        yield transform


def _sides(padding: Any) -> Tuple[int, int, int, int]:
    """Left, top, right and bottom of flowvision's ``padding``."""
    if isinstance(padding, numbers.Integral):
        padding = [padding]
    left, top, right, bottom = (list(padding) * 4)[:4] if len(padding) != 4 else padding
    return left, top, right, bottom
