"""What a checkpoint file can hold, and that nothing but a whole one is ever read."""

from __future__ import annotations

import json
import math
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights
from hypothesis import given, settings, strategies as st
from oneflow import nn
from safetensors.numpy import save

from ofengine import CheckpointError
from ofengine.checkpoint import (
    Checkpoint,
    encode,
    load_weights,
    read,
    save_weights,
    write,
)

FILES = Path(__file__).parent / "files"
"""Files of every format version: version 1 was written by the code of that time."""

NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
    "float32", "float64",
)  # fmt: skip


def there_and_back(path: Path, state: Any) -> Any:
    kept = read(write(path, {}, {"kept": state})).state
    assert kept is not None
    return kept["kept"]


def same(ours: Any, theirs: Any) -> bool:
    """Equal in value, type, shape and bits; NaN equals NaN."""
    if isinstance(ours, np.ndarray):
        return (
            isinstance(theirs, np.ndarray)
            and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            and ours.tobytes() == theirs.tobytes()
        )
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, float) and math.isnan(ours):
        return isinstance(theirs, float) and math.isnan(theirs)
    return type(ours) is type(theirs) and repr(ours) == repr(theirs)  # -0.0 is not 0.0


# ---------------------------------------------------------------------- there and back

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters()),
    st.integers(2**63, 2**200), st.integers(-(2**200), -(2**63)),
)  # fmt: skip
ARRAYS = st.builds(
    lambda kind, shape, seed: np.frombuffer(
        random.Random(seed).getrandbits(8 * 96).to_bytes(96, "little"), "uint8"
    )[: math.prod(shape) * np.dtype(kind).itemsize].view(kind).reshape(shape)
    if kind != "bool"
    else np.ones(shape, dtype="bool"),
    st.sampled_from(NUMBERS),
    st.sampled_from([(), (0,), (1,), (3, 0, 2), (2, 3), (1, 1, 5)]),
    st.integers(0, 2**32),
)  # fmt: skip
KEYS = st.text(st.one_of(st.characters(), st.sampled_from("@/.0"))).filter(lambda key: key != "@")
STATES = st.recursive(
    st.one_of(PLAIN, ARRAYS),
    lambda each: st.one_of(st.lists(each, max_size=4), st.dictionaries(KEYS, each, max_size=4)),
    max_leaves=12,
)


@given(state=STATES)
def test_any_nested_state_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, state: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-state"
    assert same(there_and_back(path, state), state)


def test_names_of_arrays_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    state = {
        "a/b": np.ones(1), "a": {"b": np.zeros(2), "0": np.zeros(3)}, "a/0": np.ones(4),
        "": {"": np.ones(5)}, "/": np.ones(6), "@a": np.ones(7), "b": [np.ones(8)],
    }  # fmt: skip
    assert same(there_and_back(tmp_path / "file", state), state)


@pytest.mark.parametrize("kind", NUMBERS)
def test_tensors_and_numbers_of_numpy_come_back_as_what_json_has(tmp_path: Path, kind: str) -> None:
    number = there_and_back(tmp_path / "file", np.ones((), dtype=kind)[()])
    assert number == 1
    assert type(number) in (bool, int, float)
    if kind not in ("uint16", "uint32", "uint64", "int16"):  # OneFlow has no such tensors
        array = np.ones((2, 2), dtype=kind)
        assert same(there_and_back(tmp_path / "file", flow.tensor(array)), array)


def test_tuples_come_back_as_lists(tmp_path: Path) -> None:
    state = {"betas": (0.9, 0.999), "nested": ((), (1, (None,)))}
    expected = {"betas": [0.9, 0.999], "nested": [[], [1, [None]]]}
    assert same(there_and_back(tmp_path / "file", state), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_come_back_whatever_their_order_of_bytes_and_axes(
    tmp_path: Path, order: str
) -> None:
    array = np.arange(6, dtype=f"{order}f4").reshape(2, 3)
    for view in (array, array.T, array[:, ::-1], array[::2, 1:]):
        back = there_and_back(tmp_path / "file", view)
        assert back.tolist() == view.tolist()


def test_weights_metadata_and_state_are_told_apart(tmp_path: Path) -> None:
    weights = {"w": np.ones(2, dtype="float32"), "state": np.zeros(1), "blake2b": np.zeros(1)}
    metadata = {"epoch": 3, "note": '"blake2b":"' + "0" * 64 + '"', "format": "x", "blake2b": "y"}
    checkpoint = read(write(tmp_path / "file", weights, {"w": np.ones(3)}, metadata))
    assert same(dict(sorted(checkpoint.weights.items())), dict(sorted(weights.items())))
    assert checkpoint.metadata["epoch"] == "3"
    assert checkpoint.metadata["note"] == metadata["note"]
    assert checkpoint.state is not None
    assert same(checkpoint.state, {"w": np.ones(3)})


def test_a_file_of_weights_has_no_state(tmp_path: Path) -> None:
    assert read(save_weights(nn.Linear(1, 1), tmp_path / "file")).state is None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ({"a": {"b": object()}}, ("a/b", "a object", "cannot keep")),
        ({"a": [1, {2}]}, ("a/1", "a set")),
        ({"a": b"bytes"}, ("a", "a bytes")),
        ({"a": 1j}, ("a", "a complex")),
        ({"a": np.array([None])}, ("a", "array of object", "numbers only")),
        ({"a": np.array(["x"])}, ("a", "array of <U1")),
        ({"a": np.ones(2, dtype="complex64")}, ("a", "array of complex64")),
        ({"a": np.ones(2, dtype=np.longdouble)}, ("a", "array of")),
        ({"a": {1: 2}}, ("a", "the key 1", "keys in a checkpoint are texts")),
        ({"a": {None: 2}}, ("a", "the key None")),
        ({"a": {"@": 2}}, ("a", "the key '@'")),
        ({3: 2}, ("the key 3",)),
        ({"a": lambda: None}, ("a", "a function")),
        ({"a": nn.Linear(1, 1)}, ("a", "a Linear")),
    ],
)
def test_what_no_checkpoint_can_keep_is_said_in_a_sentence_and_nothing_is_written(
    tmp_path: Path, state: Any, parts: Any
) -> None:
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "file", {}, state)
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == 1
    assert text == text.strip()
    assert list(tmp_path.iterdir()) == []


def test_parameter_names_that_would_be_taken_for_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'@w' begins with '@': rename it"):
        write(tmp_path / "file", {"w": np.ones(1), "@w": np.ones(1)})


def test_metadata_that_would_be_taken_for_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'state'"):
        save_weights(nn.Linear(1, 1), tmp_path / "file", {"state": "final"})


# ---------------------------------------------------------------------- damaged files


SMALL = encode(
    {"w": np.ones(2, dtype="float32")},
    {"n": 1, "a": np.arange(2, dtype="int16"), "text": "größer"},
    {"epoch": 1},
)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read(path)
    text = str(error.value)
    assert str(path) in text
    return text


def test_every_single_bit_of_a_small_checkpoint_matters(tmp_path: Path) -> None:
    whole = SMALL
    assert len(whole) < 1000
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            refused(tmp_path / "file", bytes(flipped))


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_a_checkpoint_of_a_run_matters(tmp_path: Path, step: int) -> None:
    whole = (FILES / "checkpoint_v2.safetensors").read_bytes()
    assert len(whole) > 10_000
    bits = np.random.RandomState(0).randint(0, 8, len(whole))
    for place, bit in list(enumerate(bits.tolist()))[::step]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        refused(tmp_path / "file", bytes(flipped))


def test_a_checkpoint_cut_off_at_any_length_or_longer_than_it_was_is_refused(
    tmp_path: Path,
) -> None:
    whole = SMALL
    for length in range(len(whole)):
        refused(tmp_path / "file", whole[:length])
    for more in (b"\0", b" ", whole):
        refused(tmp_path / "file", whole + more)


@settings(max_examples=500)
@given(data=st.data())
def test_pieces_that_are_lost_doubled_zeroed_or_moved_are_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = SMALL
    places = st.integers(0, len(whole))
    first, second, third = sorted(data.draw(st.tuples(places, places, places)))
    a, b, c, d = whole[:first], whole[first:second], whole[second:third], whole[third:]
    other = data.draw(
        st.sampled_from([a + c + d, a + b + b + c + d, a + b"\0" * len(b) + c + d, a + c + b + d])
    )
    if other != whole:
        refused(tmp_path_factory.getbasetemp() / "pieces", other)


@settings(max_examples=500)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_file_without_checksum_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    foreign = bytearray(save({"w": np.ones(2, dtype="float32")}, {"made": "elsewhere"}))
    foreign[place % len(foreign)] = byte
    path = tmp_path_factory.getbasetemp() / "foreign"
    path.write_bytes(foreign)
    try:
        assert isinstance(read(path), Checkpoint)
    except CheckpointError as error:
        assert str(path) in str(error)


def with_metadata(**changes: str) -> bytes:
    """The small checkpoint with other texts in its header."""
    whole = SMALL
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def test_a_newer_format_asks_for_a_newer_ofengine(tmp_path: Path) -> None:
    text = refused(tmp_path / "file", with_metadata(format_version="3", ofengine="7.8.9"))
    assert "ofengine 7.8.9 in format 3" in text
    assert "upgrade ofengine" in text


@pytest.mark.parametrize("version", ["", "0", "-1", "1", "2.0", "²", "two"])
def test_a_format_version_that_never_was_is_damage(tmp_path: Path, version: str) -> None:
    assert "damaged" in refused(tmp_path / "file", with_metadata(format_version=version))


class Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_without_being_opened(tmp_path: Path) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        text = refused(tmp_path / "file", pickle.dumps(Runs(tmp_path / "ran"), protocol))
        assert "could run any code" in text
        with pytest.raises(CheckpointError, match=r"torch\.save of PyTorch 1\.6 or later"):
            load_weights(nn.Linear(2, 2), tmp_path / "file")
    assert not (tmp_path / "ran").exists()


def test_a_zip_of_pickles_is_refused_without_being_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Runs(tmp_path / "ran")))
    assert "could run any code" in refused(tmp_path / "file", (tmp_path / "zip").read_bytes())
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_oneflow_save_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    saved, loaded = nn.Linear(2, 1), nn.Linear(2, 1)
    flow.save(saved.state_dict(), str(tmp_path / "folder"))
    with pytest.raises(CheckpointError, match=r"is a folder.*load_weights\(module, oneflow.load"):
        read(tmp_path / "folder")
    load_weights(loaded, flow.load(str(tmp_path / "folder")))
    assert_same_weights(loaded, saved)
