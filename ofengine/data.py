"""Batches: which ones, in which order, on which device, and in which accumulation window."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import oneflow as flow
from oneflow.utils.data import DataLoader

from ofengine.errors import ConfigurationError, DataError

Limit = Union[int, float, None]


class Step(NamedTuple):
    """One batch of an epoch, with its place in the accumulation window."""

    batch_idx: int
    batch: Any
    window: int
    """How many batches this window has."""
    closes_window: bool
    """True where the optimizer steps after this batch."""
    is_last: bool
    """True for the last batch of the epoch."""


class Batches:
    """A dataloader as the loops see it: limited, on the device, in windows.

    Args:
        source: any iterable of batches.
        limit: None for all; an int for so many batches; a float in [0, 1] for that share.
        limit_name: the Trainer's argument that ``limit`` comes from.
        device: where the tensors go.
        what: how errors call it, e.g. ``"train_dataloader"``.
        keep: hold the batches of the first pass and repeat them (``overfit_batches``).
    """

    def __init__(
        self,
        source: Iterable[Any],
        limit: Limit,
        device: flow.device,
        what: str,
        limit_name: str = "limit",
        keep: bool = False,
    ) -> None:
        if not hasattr(source, "__iter__") or isinstance(source, (str, bytes, dict, type)):
            raise DataError(
                f"{what} is {describe(source)}, which holds no batches: give a "
                "oneflow.utils.data.DataLoader or a list of batches."
            )
        self.source = source
        self.what = what
        self.device = device
        self.keep = keep
        self._kept: Optional[List[Any]] = None
        try:
            total: Optional[int] = len(source)  # type: ignore[arg-type]
        except TypeError:
            total = None
        if total == 0:
            raise DataError(f"{what} is empty: it has no batch (is batch_size larger than the "
                            "dataset, with drop_last=True?).")  # fmt: skip
        self.count = count_batches(total, limit, what, limit_name)
        """How many batches a pass has, or has at most; None where that shows only at its end."""
        self._total = total
        self.once = total is None and hasattr(source, "__next__")
        """True for a generator or iterator, which can be gone through only once."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of one pass, on the device."""
        if self._kept is not None:
            return iter(self._kept)
        batches = iter(self.source)
        if self.count is not None:
            batches = itertools.islice(batches, self.count)
        if self.device.type != "cpu":
            batches = (to_device(batch, self.device) for batch in batches)
        if self.keep:
            self._kept = list(batches)
            return iter(self._kept)
        return batches

    def steps(self, accumulate: int) -> Iterator[Step]:
        """The batches of one pass with their windows of ``accumulate`` batches.

        The window that the end of the pass cuts short has the number of batches it really has.
        Where the length is not known, up to ``accumulate`` batches are read ahead to find out.
        """
        batches = iter(self)
        if self.count is not None and self._total is not None:
            last = self.count - 1
            batch_idx = -1
            for batch_idx, batch in enumerate(batches):
                place = batch_idx % accumulate
                window = min(accumulate, self.count - (batch_idx - place))
                yield Step(batch_idx, batch, window, place == window - 1, batch_idx == last)
            if batch_idx < last:
                raise DataError(
                    f"{self.what} gave {batch_idx + 1} batches, though its length is "
                    f"{self._total}: correct its __len__, or remove it."
                )
            return
        batch_idx = 0
        window_batches = list(itertools.islice(batches, accumulate))
        while window_batches:
            following = list(itertools.islice(batches, accumulate))
            window = len(window_batches)
            for place, batch in enumerate(window_batches):
                closes = place == window - 1
                yield Step(batch_idx, batch, window, closes, closes and not following)
                batch_idx += 1
            window_batches = following

    def reseed(self, seed: int) -> None:
        """Make the next pass shuffle as a function of ``seed`` alone."""
        if isinstance(self.source, DataLoader):
            generator = flow.Generator("cpu")
            generator.manual_seed(seed)
            batch_sampler: Any = self.source.batch_sampler
            inner = getattr(batch_sampler, "sampler", None)
            holders: Tuple[Any, ...] = (self.source, self.source.sampler, batch_sampler, inner)
            for holder in holders:
                if hasattr(holder, "generator"):
                    holder.generator = generator


def count_batches(total: Optional[int], limit: Limit, what: str, limit_name: str) -> Optional[int]:
    """How many of ``total`` batches ``limit`` lets through (see :class:`Batches`)."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return total
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if total is None:
        raise ConfigurationError(
            f"{limit_name}={limit!r} is a share of {what}, whose length is not known: give a "
            "number of batches (an int)."
        )
    count = int(total * limit)
    if count == 0 and limit > 0:
        raise ConfigurationError(
            f"{limit_name}={limit!r} of the {total} batches of {what} is less than one batch: give "
            "a larger share, or a number of batches (an int)."
        )
    return count


def describe(value: Any) -> str:
    """``value`` in an error: "None", "the class X" or "a X"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


def describe_returned(value: Any) -> str:
    """As :func:`describe`, of what a user's method returned: None is "nothing"."""
    return "nothing" if value is None else describe(value)


def to_device(batch: Any, device: flow.device) -> Any:
    """``batch`` with every tensor in it, however nested, on ``device``."""
    if isinstance(batch, flow.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        moved = copy.copy(batch)  # a defaultdict keeps its factory
        moved.update((key, to_device(value, device)) for key, value in batch.items())
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batch_size_of(batch: Any) -> int:
    """The first dimension of the first tensor in ``batch`` that has one; 1 where none has."""
    return _first_dimension(batch) or 1


def _first_dimension(batch: Any) -> int:
    if isinstance(batch, flow.Tensor):
        return int(batch.shape[0]) if batch.ndim else 0
    if isinstance(batch, dict):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return 0
    return next((size for size in map(_first_dimension, batch) if size), 0)


class Structure(NamedTuple):
    """How the tensors of a batch are nested; two batches of one structure share a graph."""

    kind: Any
    """A container's type, ``flow.Tensor`` for a leaf, or None for a constant."""
    keys: Tuple[Any, ...]
    children: Tuple[Any, ...]


_LEAF = Structure(flow.Tensor, (), ())


def flatten(batch: Any, tensors: List[Any], what: str = "a batch holds") -> Structure:
    """Append the tensors in ``batch`` to ``tensors``, depth first; return their structure."""
    if isinstance(batch, flow.Tensor):
        tensors.append(batch)
        return _LEAF
    if isinstance(batch, dict):
        children = tuple(flatten(value, tensors, what) for value in batch.values())
        return Structure(type(batch), tuple(batch), children)
    if isinstance(batch, (list, tuple)):
        return Structure(type(batch), (), tuple(flatten(value, tensors, what) for value in batch))
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return Structure(None, (batch, type(batch)), ())  # 1 == True, but they trace differently
    if isinstance(batch, (np.ndarray, np.generic)):
        raise DataError(
            f"{what} a numpy array, which a static graph cannot take: turn it into a tensor "
            "with oneflow.from_numpy in the dataset or in collate_fn."
        )
    raise DataError(
        f"{what} {describe(batch)}, which a static graph cannot take: use tensors, "
        "numbers, strings and None in tuples, lists and dicts."
    )


def unflatten(structure: Structure, tensors: Iterator[Any]) -> Any:
    """The inverse of :func:`flatten`."""
    kind, keys, children = structure
    if kind is flow.Tensor:
        return next(tensors)
    if kind is None:
        return keys[0]
    values = [unflatten(child, tensors) for child in children]
    if issubclass(kind, dict):
        filled = kind()
        filled.update(zip(keys, values))
        return filled
    if hasattr(kind, "_fields"):
        return kind(*values)
    return kind(values)


def stage_loaders(
    loaders: Any, limit: Limit, device: flow.device, what: str, limit_name: str, keep: bool
) -> List[Batches]:
    """One :class:`Batches` for each dataloader of an evaluation stage (one or a list)."""
    if loaders is None:
        return []
    several = isinstance(loaders, (list, tuple)) and any(
        isinstance(loader, DataLoader) for loader in loaders
    )
    if several and not all(isinstance(loader, DataLoader) for loader in loaders):
        raise DataError(
            f"{what} mixes DataLoaders with other things: give one dataloader, or a list of "
            "oneflow.utils.data.DataLoader objects."
        )
    return [
        Batches(loader, limit, device, what, limit_name, keep)
        for loader in (loaders if several else [loaders])
    ]
