"""Batches, and what they come in."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import oneflow as flow


def numbered_batches(count: int, start: int = 0) -> List[Any]:
    """Batches of one sample of two features, whose every number is their index, from ``start``."""
    return [flow.ones(1, 2) * (start + index) for index in range(count)]


def sized(*sizes: int) -> List[Any]:
    """Batches of so many samples of two features; all numbers of the one at index i are i + 1."""
    return [flow.ones(size, 2) * (index + 1) for index, size in enumerate(sizes)]


def batches(count: int = 2) -> List[Any]:
    """Batches of two samples of two features; all numbers of the one at index i are i + 1."""
    return sized(*[2] * count)


def random_rows(sizes: Sequence[int], columns: int, seed: int = 0) -> List[Any]:
    """Batches of so many rows each of normal numbers; the same for the same arguments."""
    generator = np.random.RandomState(seed)
    return [
        flow.tensor(generator.standard_normal((size, columns)).astype("float32")) for size in sizes
    ]


def image_batches(
    sizes: Sequence[int],
    shape: Tuple[int, ...] = (3, 8, 8),
    classes: int = 5,
    seed: int = 0,
) -> List[Tuple[Any, Any]]:
    """Batches of so many random images each, with labels; the same for the same arguments.

    An image is an array of any ``shape``: ``(4,)`` gives rows of four numbers.
    """
    generator = np.random.RandomState(seed)
    return [
        (
            flow.tensor(generator.standard_normal((size, *shape)).astype("float32")),
            flow.tensor(generator.randint(0, classes, size)),
        )
        for size in sizes
    ]


class OfUnknownLength:
    """Batches behind an iterable without ``__len__``, each pass with its own.

    Args:
        passes: the batches of each pass; the last is repeated for further passes.
    """

    def __init__(self, *passes: Iterable[Any]) -> None:
        self._passes = [list(batches) for batches in passes]
        self.begun = 0
        """How many passes were begun."""

    def __iter__(self) -> Iterator[Any]:
        batches = self._passes[min(self.begun, len(self._passes) - 1)]
        self.begun += 1
        return (batch for batch in batches)


class OfClaimedLength:
    """Batches whose ``len`` is what is claimed, not how many there are."""

    def __init__(self, claimed: int, batches: Sequence[Any]) -> None:
        self._claimed, self._batches = claimed, batches

    def __len__(self) -> int:
        return self._claimed

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)
