"""What a batch is made of, asked at each step: shapes, and whether there is a sample in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import oneflow as flow
import pytest

from ofengine.data.structure import describe_shapes, is_empty, shapes_of, size_of

IMAGES, LABELS = flow.zeros(4, 3, 2), flow.zeros(4, dtype=flow.int64)


@pytest.mark.parametrize(
    ("batch", "text", "size"),
    [
        (IMAGES, "[4, 3, 2] float32", 24),
        ((IMAGES, LABELS), "[4, 3, 2] float32, [4] int64", 28),
        ({"x": IMAGES, "more": [LABELS, 3, None]}, "x [4, 3, 2] float32, more [4] int64", 28),
        ([np.zeros((2, 5)), "a"], "[2, 5] float64", 10),
        ([IMAGES] * 9, ", ".join(["[4, 3, 2] float32"] * 8) + " and 1 more", 216),
        (7, "a int", 0),
    ],
)
def test_a_batch_in_words(batch: Any, text: str, size: int) -> None:
    assert (describe_shapes(batch), size_of(batch)) == (text, size)


@pytest.mark.parametrize(
    "batch",
    [flow.zeros(0, 2), (flow.zeros(0, 2), flow.zeros(0)), {"x": np.zeros((0, 3))}],
    ids=str,
)
def test_a_batch_without_samples(batch: Any) -> None:
    assert is_empty(batch)


@pytest.mark.parametrize(
    "batch",
    [IMAGES, flow.tensor(1.0), (flow.zeros(0, 4), IMAGES), [3], {"name": "a"}, None, [], {}],
    ids=str,
)
def test_a_batch_with_samples(batch: Any) -> None:
    assert not is_empty(batch)


def test_shapes_tell_batches_apart() -> None:
    alike = (IMAGES, {"y": LABELS}), (IMAGES + 1, {"y": LABELS + 1})
    assert shapes_of(alike[0]) == shapes_of(alike[1])
    assert shapes_of(alike[0]) != shapes_of((IMAGES, {"y": LABELS[:2]}))
