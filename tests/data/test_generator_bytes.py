"""The state of a generator of OneFlow as bytes: what is none is refused, and never handed on.

OneFlow reads an "auto" generator's state as it tells its own lengths, and ends the process with a
segmentation fault where they are wrong.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import oneflow as flow
import pytest
from hypothesis import given, settings, strategies as st

from ofengine import CheckpointError
from ofengine.data.generator_state import check_state_of, set_state_of, state_of


def generator(kind: str, drawn: int = 3) -> Any:
    made = flow.Generator(kind)
    made.manual_seed(5)
    if drawn:
        flow.rand(drawn, generator=made)
    return made


KINDS = ["cpu", "auto"]


@functools.lru_cache(maxsize=None)
def _state(kind: str) -> Any:
    return state_of(generator(kind))


def a_state(kind: str) -> Any:
    """Where a generator of the ``kind`` stands; to be changed as one likes."""
    return copy.deepcopy(_state(kind))


def refused(kind: str, state: Any) -> None:
    """It is refused, and the generator stands where it stood."""
    asked, undisturbed = generator(kind), generator(kind)
    for check in (check_state_of, set_state_of):
        with pytest.raises(CheckpointError, match="the state of a random generator"):
            check(asked, state)
    assert flow.rand(9, generator=asked).tolist() == flow.rand(9, generator=undisturbed).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_length_or_kind(kind: str) -> None:
    state = state_of(generator(kind))
    raw = state["oneflow"]
    for wrong in (
        raw[:-1], raw[:0], raw[:32], raw[:40], np.concatenate([raw, raw]), raw[None], raw[0],
        raw.astype("int64"), raw.astype("float32"), np.zeros_like(raw, dtype="bool"),
    ):  # fmt: skip
        refused(kind, {**state, "oneflow": wrong})


def test_those_of_the_other_kind() -> None:
    for kind, other in (KINDS, KINDS[::-1]):
        refused(kind, state_of(generator(other)))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [-1, 0, 2, 99, 2**31, 2**62, -(2**63)])
def test_numbers_of_the_header_that_lie(place: int, value: int) -> None:
    state = a_state("auto")
    header = state["oneflow"][:40].view(np.int64)
    where = place + 1  # behind the seed
    if header[where] == value:
        return
    header[where] = value
    refused("auto", state)


@pytest.mark.parametrize("name", [b"cuda0", b"cpu:1", b"cpu,0", b"\xff\xff\xff\xff\xff", b",,,,,"])
def test_devices_that_are_not_here(name: bytes) -> None:
    state = a_state("auto")
    state["oneflow"][40:45] = np.frombuffer(name, dtype="uint8")
    refused("auto", state)


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_are_none(kind: str) -> None:
    state = a_state(kind)
    at = 0 if kind == "cpu" else 45
    for value in (2**32, 2**64 - 1):
        state["oneflow"][at : at + 8] = np.array([value], dtype="uint64").view("uint8")
        refused(kind, state)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    start=st.integers(0, 60), values=st.binary(min_size=1, max_size=12),
    position=st.sampled_from([None, 1, 3, 624]),
)  # fmt: skip
def test_whatever_is_written_into_the_header_is_taken_or_refused(
    start: int, values: bytes, position: Any
) -> None:
    state = a_state("auto")
    state["oneflow"][start : start + len(values)] = np.frombuffer(values, dtype="uint8")
    if position is not None:
        state["position"] = position
    asked = generator("auto")
    try:
        check_state_of(asked, state)
    except CheckpointError:
        return
    set_state_of(asked, state)
    flow.rand(3, generator=asked).numpy()


def test_a_generator_that_nobody_drew_from_has_a_state_too() -> None:
    fresh, other = generator("auto", drawn=0), generator("auto")
    check_state_of(other, state_of(fresh))
    set_state_of(other, state_of(fresh))
    expected = generator("auto", drawn=0)
    assert flow.rand(5, generator=other).tolist() == flow.rand(5, generator=expected).tolist()
