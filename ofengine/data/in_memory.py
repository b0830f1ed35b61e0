"""Batches straight from a dataset in memory: the same numbers, not sample by sample.

``DataLoader(dataset)`` makes a PIL image and a chain of small tensors of every sample.
:func:`in_memory_loader` takes the rows of a whole batch out of the dataset's array and applies
the transforms to all of them at once. Order, random draws and every bit are those of the
DataLoader, so one may be put in the place of the other, in the middle of a run too.
"""

from __future__ import annotations

import numbers
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from ofengine._oneflow.loaders import collate
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import check_count

Images = Any
"""A numpy array of uint8, (batch, height, width, channels)."""


class ImageArrays(Dataset):
    """Images and labels in memory, with the transforms of flowvision.

    Args:
        data: uint8, (images, height, width, channels) or (images, height, width).
        targets: one label for each image.
        transform: of a PIL image; None gives the image itself.
        target_transform: of a label.

    Raises:
        ConfigurationError: the arguments do not fit together.
    """

    def __init__(
        self,
        data: Any,
        targets: Sequence[Any],
        transform: Optional[Callable[[Any], Any]] = None,
        target_transform: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self.data = np.asarray(data)
        if self.data.dtype != np.uint8 or self.data.ndim not in (3, 4):
            raise ConfigurationError(
                f"ImageArrays: data is an array of {self.data.dtype} with the shape "
                f"{self.data.shape}: give uint8, (images, height, width, channels)."
            )
        if len(targets) != len(self.data):
            raise ConfigurationError(
                f"ImageArrays: there are {len(self.data)} images and {len(targets)} targets."
            )
        self.targets = targets
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        """The transformed image and target of ``index``."""
        from PIL import Image

        image: Any = Image.fromarray(self.data[index])
        if self.transform is not None:
            image = self.transform(image)
        target = self.targets[index]
        target = target.item() if isinstance(target, (np.generic, flow.Tensor)) else target
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def in_memory_loader(
    dataset: Any,
    batch_size: int = 1,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: Any = None,
) -> DataLoader:
    """A DataLoader over ``dataset`` that takes whole batches at once.

    The batches are those of ``DataLoader(dataset, batch_size, shuffle=shuffle,
    drop_last=drop_last, generator=generator)``, bit for bit and in the same order.

    Args:
        dataset: flowvision's CIFAR10, CIFAR100, MNIST or FashionMNIST, :class:`ImageArrays`, a
            ``TensorDataset``, or a ``Subset`` of one. Of flowvision's transforms, ``Compose``,
            ``ToTensor``, ``Normalize``, ``RandomCrop``, ``CenterCrop``, ``Pad``,
            ``RandomHorizontalFlip`` and ``RandomVerticalFlip`` have a form for batches.
        batch_size: samples in a batch.
        shuffle: a new order in each epoch.
        drop_last: leave out a last batch of fewer samples.
        generator: a ``oneflow.Generator`` for the order. Default: the one that all
            DataLoaders share.

    Raises:
        ConfigurationError: at once for another dataset or transform, with the way out.
    """
    batch_size = check_count("batch_size", batch_size, 1, "a whole number from 1 on")
    batched = _Batched(dataset)
    if generator is None:
        generator = DataLoader(batched).generator  # all DataLoaders have one by default
    sampler: Any = SequentialSampler(dataset)
    if shuffle:
        sampler = RandomSampler(dataset, generator=generator)
    return DataLoader(
        batched,
        batch_size=None,
        sampler=_Rows(sampler, batch_size, drop_last),
        generator=generator,
        collate_fn=_as_it_is,
    )


class _Rows(BatchSampler):
    """Shows the generator where a DataLoader's own sampler has it, and a checkpoint looks."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        if hasattr(sampler, "generator"):
            self.generator = sampler.generator
        super().__init__(sampler, batch_size, drop_last)


def _as_it_is(batch: Any) -> Any:
    return batch


class _Batched(Dataset):
    """``dataset`` by lists of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._rows: Optional[Any] = None
        while isinstance(dataset, Subset):
            own = np.asarray(dataset.indices)
            self._rows = own if self._rows is None else own[self._rows]
            dataset = dataset.dataset
        self._source = dataset
        self._steps: List[_Step] = []
        if isinstance(dataset, TensorDataset):
            self._take = self._tensors
            return
        if not _is_known(dataset):
            raise ConfigurationError(
                f"in_memory_loader cannot take batches out of {type(dataset).__name__}: give "
                "flowvision's CIFAR10, CIFAR100, MNIST or FashionMNIST, ofengine.ImageArrays or a "
                "TensorDataset, or use oneflow.utils.data.DataLoader."
            )
        data = dataset.data
        self._data = data.numpy() if isinstance(data, flow.Tensor) else data
        targets = dataset.targets
        if isinstance(targets, flow.Tensor):
            targets = targets.numpy()
        self._targets = targets.tolist() if isinstance(targets, np.ndarray) else targets
        self._steps = _steps_of(dataset.transform, self._data.shape[1:3])
        self._take = self._images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> Any:
        """The batch of these samples."""
        rows = np.asarray(indices)
        return self._take(rows if self._rows is None else self._rows[rows])

    def _tensors(self, rows: Any) -> Any:
        chosen = flow.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
        return tuple(each[chosen.to(each.device)] for each in self._source.tensors)

    def _images(self, rows: Any) -> Any:
        images: Any = self._data[rows]
        images = images[..., None] if images.ndim == 3 else images
        for step, drawn in zip(self._steps, _draw(self._steps, len(rows))):
            images = step.apply(images, drawn)
        targets = [self._targets[row] for row in rows.tolist()]
        if self._source.target_transform is not None:
            targets = [self._source.target_transform(target) for target in targets]
        return images, collate(targets)


def _is_known(dataset: Any) -> bool:
    if isinstance(dataset, ImageArrays):
        return type(dataset).__getitem__ is ImageArrays.__getitem__
    try:
        from flowvision.datasets import CIFAR10, MNIST
    except ImportError:
        return False
    return getattr(type(dataset), "__getitem__", None) in (CIFAR10.__getitem__, MNIST.__getitem__)


# ---------------------------------------------------------------------- transforms


class _Step:
    """One transform, for batches. Subclasses say what they draw for a sample, and do it to all."""

    from_oneflow = False
    """True where it draws one number a sample, by ``oneflow.rand``."""

    def draw(self) -> Any:
        """What the transform draws for one sample."""

    def draw_all(self, samples: int) -> Any:
        """What ``draw`` gives so often; only where nothing else uses the same generator."""
        return [self.draw() for _ in range(samples)]

    def apply(self, images: Any, drawn: Any) -> Any:
        """Transform the batch."""
        raise NotImplementedError


def _draw(steps: Sequence[_Step], samples: int) -> Iterator[Any]:
    """For each step what it draws for all samples, in the order in which samples are made."""
    if sum(step.from_oneflow for step in steps) <= 1:  # others draw from numpy's generator
        by_oneflow = [step.draw_all(samples) if step.from_oneflow else None for step in steps]
        drawing = [step for step in steps if not step.from_oneflow]
        rows = [[step.draw() for step in drawing] for _ in range(samples)]
        by_numpy = iter(list(zip(*rows)))
        return iter(
            [drawn if step.from_oneflow else next(by_numpy, ()) for step, drawn in
             zip(steps, by_oneflow)]
        )  # fmt: skip
    return iter(list(zip(*([step.draw() for step in steps] for _ in range(samples)))))


class _Flip(_Step):
    from_oneflow = True

    def __init__(self, p: float, axis: int) -> None:
        self._p, self._axis = p, axis

    def draw(self) -> bool:
        return bool(flow.rand(1) < self._p)

    def draw_all(self, samples: int) -> Any:
        return (flow.rand(samples) < self._p).numpy()

    def apply(self, images: Images, drawn: Any) -> Images:
        flipped = np.asarray(drawn, dtype=bool)
        images[flipped] = np.flip(images[flipped], self._axis)
        return images


class _Crop(_Step):
    """To ``size`` at the place that ``place`` gives for each sample: (top, left)."""

    def __init__(self, size: Sequence[int], place: Callable[[], Tuple[int, int]]) -> None:
        self._size, self.draw = size, place  # type: ignore[method-assign]

    def apply(self, images: Images, drawn: Any) -> Images:
        height, width = self._size
        cropped = np.empty((len(images), height, width, images.shape[3]), dtype=images.dtype)
        for image, (top, left), out in zip(images, drawn, cropped):
            out[...] = image[top : top + height, left : left + width]
        return cropped


class _Pad(_Step):
    def __init__(self, left: int, top: int, right: int, bottom: int, fill: int) -> None:
        self._widths = ((0, 0), (top, bottom), (left, right), (0, 0))
        self._fill = fill

    def apply(self, images: Images, drawn: Any) -> Images:
        return np.pad(images, self._widths, constant_values=self._fill)


class _ToTensor(_Step):
    def apply(self, images: Images, drawn: Any) -> Any:
        tensor = flow.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return tensor.to(flow.float32).div(255)


class _Tensors(_Step):
    """A transform of tensors that takes batches by itself."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self._transform = transform

    def apply(self, images: Any, drawn: Any) -> Any:
        return self._transform(images)


def _steps_of(transform: Any, size: Sequence[int]) -> List[_Step]:
    """``transform`` for batches of images of ``size``: (height, width)."""
    from flowvision import transforms
    from PIL import Image

    steps: List[_Step] = []
    height, width = size

    def pad(left: int, top: int, right: int, bottom: int, fill: Any = 0) -> None:
        nonlocal height, width
        steps.append(_Pad(left, top, right, bottom, fill))
        height, width = height + top + bottom, width + left + right

    def pad_as(each: Any, padding: Any) -> None:
        sides = _sides(padding)
        plain = each.padding_mode == "constant" and isinstance(each.fill, numbers.Integral)
        if not plain or min(sides) < 0:
            raise _no_form(each)
        pad(*sides, each.fill)

    def crop(target: Sequence[int], place: Callable[[], Tuple[int, int]]) -> None:
        nonlocal height, width
        steps.append(_Crop(target, place))
        height, width = target

    for each in _flat(transform):
        kind, in_pixels = type(each), not any(isinstance(s, _ToTensor) for s in steps)
        if in_pixels and kind is transforms.RandomHorizontalFlip:
            steps.append(_Flip(each.p, 2))
        elif in_pixels and kind is transforms.RandomVerticalFlip:
            steps.append(_Flip(each.p, 1))
        elif in_pixels and kind is transforms.Pad:
            pad_as(each, each.padding)
        elif in_pixels and kind is transforms.CenterCrop:
            wanted_height, wanted_width = each.size
            more = max(wanted_height - height, 0), max(wanted_width - width, 0)
            if any(more):
                pad(more[1] // 2, more[0] // 2, (more[1] + 1) // 2, (more[0] + 1) // 2)
            at = round((height - wanted_height) / 2.0), round((width - wanted_width) / 2.0)
            crop(each.size, lambda at=at: at)  # type: ignore[misc]
        elif in_pixels and kind is transforms.RandomCrop and not each.pad_if_needed:
            if each.padding is not None:
                pad_as(each, each.padding)
            blank = Image.new("L", (width, height))
            own = each.get_params
            crop(each.size, lambda o=own, b=blank, s=each.size: o(b, s)[:2])  # type: ignore[misc]
        elif in_pixels and kind is transforms.ToTensor:
            steps.append(_ToTensor())
        elif not in_pixels and kind is transforms.Normalize:
            steps.append(_Tensors(each))
        else:
            raise _no_form(each)
    if not any(isinstance(step, _ToTensor) for step in steps):
        raise ConfigurationError(
            "in_memory_loader: the dataset's transform makes no tensors: add "
            "flowvision.transforms.ToTensor()."
        )
    return steps


def _no_form(transform: Any) -> ConfigurationError:
    return ConfigurationError(
        f"in_memory_loader has no form for batches of the transform {transform!r}, or not at this "
        "place: use oneflow.utils.data.DataLoader, or leave the transform out."
    )


def _flat(transform: Any) -> Iterator[Any]:
    from flowvision import transforms

    if type(transform) is transforms.Compose:
        for each in transform.transforms:
            yield from _flat(each)
    elif transform is not None:
        yield transform


def _sides(padding: Any) -> Tuple[int, int, int, int]:
    """Left, top, right and bottom of flowvision's ``padding``."""
    if isinstance(padding, numbers.Integral):
        padding = [padding]
    left, top, right, bottom = (list(padding) * 4)[:4] if len(padding) != 4 else padding
    return left, top, right, bottom
