"""Batches straight from a dataset in memory: the same numbers, not sample by sample.

``DataLoader(dataset)`` makes a PIL image and a chain of small tensors of every sample.
:func:`in_memory_loader` takes the rows of a whole batch out of the dataset's array and applies
the transforms to all of them at once (:mod:`ofengine.data.transforms`). Order, random draws and
every bit are those of the DataLoader, so one may be put in the place of the other, in the middle
of a run too.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Callable, List, Optional, Sequence, Tuple

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
from ofengine.constructors import tells_unknown_arguments
from ofengine.data.transform_chain import steps_of
from ofengine.data.transforms import Crop, Pad, Resize, Step, draw
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import check_count

_MOST_KEPT = 2**30
"""Bytes of images that are kept once they were resized; of more, each is resized every time."""


@tells_unknown_arguments
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
    batch_transform: Optional[Callable[..., Any]] = None,
) -> DataLoader:
    """A DataLoader over ``dataset`` that takes whole batches at once.

    The batches are those of ``DataLoader(dataset, batch_size, shuffle=shuffle,
    drop_last=drop_last, generator=generator)``, bit for bit and in the same order. With a
    ``batch_transform``, those of a DataLoader with ``collate_fn=lambda samples:
    batch_transform(*default_collate(samples))``.

    Args:
        dataset: flowvision's CIFAR10, CIFAR100, MNIST or FashionMNIST, :class:`ImageArrays`,
            :class:`CachedImageFolder`, a ``TensorDataset``, or a ``Subset`` of one. Of
            flowvision's transforms, ``Compose``, ``ToTensor``, ``Normalize``, ``Resize``,
            ``RandomResizedCrop``, ``RandomCrop``, ``CenterCrop``, ``Pad``, ``ColorJitter``,
            ``RandomErasing`` and the two flips have a form for batches. What stands before the
            first that draws is done once for each image, where a ``Resize`` is among it, and
            kept, up to a gibibyte of all images.
        batch_size: samples in a batch.
        shuffle: a new order in each epoch.
        drop_last: leave out a last batch of fewer samples.
        generator: a ``oneflow.Generator`` for the order. Default: the one that all
            DataLoaders share.
        batch_transform: called with the tensors of each batch, gives the batch: flowvision's
            ``Mixup``, or a function of your own. It may write to them.

    Raises:
        ConfigurationError: at once for another dataset or transform, with the way out.
    """
    batch_size = check_count("batch_size", batch_size, 1, "a whole number from 1 on")
    batched = _Batched(dataset, batch_transform)
    _check_mixup(batched, batch_size, drop_last)
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

    def __init__(self, dataset: Any, transform: Optional[Callable[..., Any]]) -> None:
        self.dataset = dataset
        self.transform = transform
        self._rows: Optional[Any] = None
        while isinstance(dataset, Subset):
            own = np.asarray(dataset.indices)
            self._rows = own if self._rows is None else own[self._rows]
            dataset = dataset.dataset
        self._source = dataset
        self._steps: List[Step] = []
        if isinstance(dataset, TensorDataset):
            self._take = self._tensors
            return
        if not _is_known(dataset):
            raise ConfigurationError(
                f"in_memory_loader cannot take batches out of {type(dataset).__name__}: give "
                "flowvision's CIFAR10, CIFAR100, MNIST or FashionMNIST, ofengine.ImageArrays, "
                "ofengine.CachedImageFolder or a TensorDataset, or use "
                "oneflow.utils.data.DataLoader."
            )
        data = dataset.data
        data = data.numpy() if isinstance(data, flow.Tensor) else data
        self._data = data[..., None] if data.ndim == 3 else data
        targets = dataset.targets
        if isinstance(targets, flow.Tensor):
            targets = targets.numpy()
        self._targets = targets.tolist() if isinstance(targets, np.ndarray) else targets
        transform = getattr(dataset, "rest_of_transform", dataset.transform)
        self._steps = steps_of(transform, self._data.shape[1:])
        resized = [isinstance(step, Resize) for step in self._steps]
        kept = sum(1 for _ in itertools.takewhile(_is_fixed, self._steps))
        if any(resized[:kept]):
            self._data = _Kept(self._data, self._steps[:kept])
            del self._steps[:kept]
        self._take = self._images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> Any:
        """The batch of these samples."""
        rows = np.asarray(indices)
        batch = self._take(rows if self._rows is None else self._rows[rows])
        return batch if self.transform is None else self.transform(*batch)

    @property
    def highest_target(self) -> Optional[int]:
        """None where the targets are no whole numbers, or are changed before they are used."""
        if isinstance(self._source, TensorDataset):
            return None
        of_own = all(isinstance(each, (int, np.integer)) for each in self._targets)
        is_known = of_own and self._source.target_transform is None and len(self._targets)
        return int(max(self._targets)) if is_known else None

    def _tensors(self, rows: Any) -> Any:
        chosen = flow.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
        return tuple(each[chosen.to(each.device)] for each in self._source.tensors)

    def _images(self, rows: Any) -> Any:
        targets = [self._targets[row] for row in rows.tolist()]
        change = self._source.target_transform

        def change_target(sample: int) -> None:
            targets[sample] = change(targets[sample])

        drawn = draw(self._steps, len(rows), None if change is None else change_target)
        images: Any = self._data[rows]
        for step, of_step in zip(self._steps, drawn):
            images = step.apply(images, of_step)
        return flow.from_numpy(images), collate(targets)


class _Kept:
    """Images behind ``steps``, which draw nothing; each is made when it is first asked for."""

    def __init__(self, data: Any, steps: Sequence[Step]) -> None:
        self._data, self._steps = data, steps
        shape = self._made(data[:1]).shape
        self._keeps = len(data) * int(np.prod(shape)) <= _MOST_KEPT
        if self._keeps:
            self._images = np.empty((len(data), *shape[1:]), dtype=np.uint8)
            self._is_there = np.zeros(len(data), dtype=bool)

    def _made(self, images: Any) -> Any:
        for step in self._steps:
            images = step.apply(images, [None] * len(images))
        return images

    def __getitem__(self, rows: Any) -> Any:
        if not self._keeps:
            return self._made(self._data[rows])
        missing = rows[~self._is_there[rows]]
        if len(missing):
            self._images[missing] = self._made(self._data[missing])
            self._is_there[missing] = True
        return self._images[rows]


def _is_fixed(step: Step) -> bool:
    return isinstance(step, (Resize, Crop, Pad))


def _check_mixup(batched: _Batched, batch_size: int, drop_last: bool) -> None:
    """Refuse what flowvision's ``Mixup`` would fail at, in the middle of an epoch as a rule."""
    mixup = batched.transform
    if mixup is not None and not callable(mixup):
        raise ConfigurationError(
            f"batch_transform={mixup!r}: give a function of a batch's tensors, as "
            "flowvision.data.Mixup(num_classes=10)."
        )
    try:
        from flowvision.data import Mixup
    except ImportError:
        return
    if not isinstance(mixup, Mixup):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of names that it has no more
        has_bool = hasattr(np, "bool")
    if mixup.mode in ("elem", "pair") and not has_bool:
        raise ConfigurationError(
            f"Mixup(mode={mixup.mode!r}) needs np.bool, which numpy {np.__version__} has not: "
            'write mode="batch".'
        )
    last = 0 if drop_last else len(batched) % batch_size
    odd = next((size for size in (batch_size, last) if size % 2), None)
    if odd is not None:
        raise ConfigurationError(
            f"Mixup takes an even number of samples, and a batch has {odd}: "
            + ("give an even batch_size." if odd == batch_size else "write drop_last=True.")
        )
    most = batched.highest_target
    if most is not None and most >= mixup.num_classes:
        raise ConfigurationError(
            f"Mixup(num_classes={mixup.num_classes}) and the target {most} do not fit together: "
            f"write num_classes={most + 1} or more."
        )


def _is_known(dataset: Any) -> bool:
    if isinstance(dataset, ImageArrays):
        return type(dataset).__getitem__ is ImageArrays.__getitem__
    try:
        from flowvision.datasets import CIFAR10, MNIST

        from ofengine.data.image_folder import CachedImageFolder
    except ImportError:
        return False
    known = (CIFAR10.__getitem__, MNIST.__getitem__, CachedImageFolder.__getitem__)
    return getattr(type(dataset), "__getitem__", None) in known
