"""A file that an enemy made is refused in bounded time and memory; what is written can be read."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
from helpers import run_python
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save

from ofengine import CheckpointError
from ofengine.checkpoint import encode, header, metadata_of, read, write


def file(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + data


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert metadata_of(path) is not None
    assert time.monotonic() - begun < 30
    text = str(error.value)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 600
    return text


DEEP = 100_000
BOMBS: Dict[str, Callable[[], bytes]] = {
    "lists": lambda: file(b"[" * DEEP + b"]" * DEEP),
    "objects": lambda: file(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "not closed": lambda: file(b'{"a":' + b"[" * DEEP),
    "deeper than the limit": lambda: file(b'{"a":' + b"[" * 101 + b"]" * 101 + b"}"),
    "behind a text of brackets": lambda: file(
        b'{"a":"]]]\\"]]]\\\\","b":' + b"[" * DEEP + b"]" * DEEP + b"}"
    ),
    "5,000 digits": lambda: file(b'{"a":' + b"9" * 5_000 + b"}"),
    "-5,000 digits": lambda: file(b'{"a":-' + b"9" * 5_000 + b"}"),
    "a real of 5,000 digits": lambda: file(b'{"a":0.' + b"9" * 5_000 + b"}"),
    "an exponent of 5,000 digits": lambda: file(b'{"a":1e' + b"9" * 5_000 + b"}"),
    "UTF-16": lambda: file(('{"a":' + "[" * DEEP).encode("utf-16-le")),
    "no UTF-8": lambda: file(b'{"a":"\xff"}'),
    "a surrogate": lambda: file(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "a length that overflows": lambda: struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length beyond the file": lambda: struct.pack("<Q", 1_000) + b"{}",
    "no object": lambda: file(b"[]"),
    "an empty object": lambda: file(b"{}"),
    "metadata only": lambda: file(b'{"__metadata__":[1]}'),
    "a tensor that is none": lambda: file(b'{"a":1}'),
    "offsets that are none": lambda: file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":{}}}'),
    "offsets that are texts": lambda: file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', b"\0" * 4
    ),
    "offsets that run backwards": lambda: file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'
    ),
    "offsets of many digits": lambda: file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4_000 + b"]}}"
    ),
    "a name of a control character": lambda: file(b'{"\\u001b[31m":1}'),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_sentence(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "bomb", BOMBS[name]())


STATES = {
    "lists": "[" * 50_000 + "]" * 50_000,
    "objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "digits": '{"a":' + "9" * 5_000 + "}",
    "a list": "[1]",
    "a number": "1",
    "no JSON": "{",
    "an array that is not there": '{"a":{"@":"@b"}}',
    "an array whose name is a list": '{"a":{"@":[1]}}',
    "an array whose name is an object": '{"a":{"@":{}}}',
    "a control character": '{"\x1b[31m',
}


@pytest.mark.parametrize("name", STATES)
def test_a_bomb_within_a_state_with_its_checksum_right_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # What checks what is written is put out of the way, as an enemy would.
    with monkeypatch.context() as patch:
        patch.setattr("ofengine.checkpoint.file._check_bounds", lambda _: None)
        patch.setattr("ofengine.checkpoint.file.json.dumps", lambda _: STATES[name])
        content = encode({}, {})
    refused(tmp_path / "bomb", content)


MEASURED = """
import sys, time
from ofengine import CheckpointError
from ofengine.checkpoint import read

def most():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

open("/proc/self/clear_refs", "w").write("5")
before, begun = most(), time.monotonic()
try:
    read(sys.argv[1])
except CheckpointError as error:
    print(time.monotonic() - begun, (most() - before) / 1024, len(str(error)))
"""


def many_keys(count: int) -> bytes:
    return b"{" + b",".join(b'"%x":1' % number for number in range(count)) + b"}"


WORST: Dict[str, Callable[[], bytes]] = {
    "10,000,000 keys": lambda: file(many_keys(10_000_000)),
    "the most keys": lambda: file(many_keys(header.MOST_VALUES - 10)),
    "the most objects": lambda: file(
        b'{"a":[' + b",".join([b'{"b":1}'] * (header.MOST_VALUES // 2 - 10)) + b"]}"
    ),
    "the largest text": lambda: file(
        b'{"a":"' + "😀".encode() + b"x" * (header.MOST_BYTES - 100) + b'"}'
    ),
    "quotes": lambda: file(b'{"a":' + b'"' * (header.MOST_BYTES - 100) + b"}"),
    "backslashes": lambda: file(b'{"a":"' + b"\\" * (header.MOST_BYTES - 100) + b'"}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORST)
def test_the_worst_headers_stay_within_the_bounds_that_are_stated(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "bomb").write_bytes(WORST[name]())
    ended = run_python("-c", MEASURED, tmp_path / "bomb")
    seconds, megabytes, length = map(float, ended.stdout.split())
    assert seconds < 30
    assert megabytes < 600
    assert length < 600


def test_a_large_empty_file_is_not_read(tmp_path: Path) -> None:
    entry = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for begin in (b"", file(entry)):
        with open(tmp_path / "sparse", "wb") as sparse:
            sparse.write(begin)
            sparse.truncate(2**31)
        ended = run_python("-c", MEASURED, tmp_path / "sparse")
        seconds, megabytes, _ = map(float, ended.stdout.split())
        assert seconds < 5
        assert megabytes < 50


def test_a_file_takes_twice_its_size_in_memory(tmp_path: Path) -> None:
    size = 100
    write(tmp_path / "large", {"w": np.zeros((size, 1024, 256), dtype="float32")}, {"n": 1})
    measured = MEASURED.replace("    read(sys.argv[1])", "    a = read(sys.argv[1]); raise "
                                'CheckpointError("x")')  # fmt: skip
    ended = run_python("-c", measured, tmp_path / "large")
    assert float(ended.stdout.split()[1]) < 2.2 * size


# ---------------------------------------------------------------------- no regular files


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # to open it would wait for a writer
    for name, target in (("zero", "/dev/zero"), ("null", "/dev/null"), ("pipe", "fifo")):
        (tmp_path / name).symlink_to(target)
    for name in ("fifo", "zero", "null", "pipe"):
        with pytest.raises(CheckpointError, match=f"{name} could not be read: it is no regular"):
            read(tmp_path / name)
        assert metadata_of(tmp_path / name) == {}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop could not be read: Too many levels"):
        read(tmp_path / "loop")


def test_a_link_to_a_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write(tmp_path / "file", {}, {"n": 1}))
    assert read(tmp_path / "link").state == {"n": 1}


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file", {"w": np.ones(100_000)}, {"n": 1})
    whole = path.read_bytes()
    said = header.Header.file_size

    def size(given: header.Header) -> Any:
        path.write_bytes(b"\1" * len(whole))
        return said(given)

    monkeypatch.setattr(header.Header, "file_size", size)
    with pytest.raises(CheckpointError, match=r"was changed while it was read|checksum"):
        read(path)


# ---------------------------------------------------------------------- what is written is read

TEXTS = st.text(st.one_of(st.characters(), st.sampled_from('[]{}"\\,: \n')), max_size=12)
NESTED = st.recursive(
    st.one_of(TEXTS, st.integers(), st.none()),
    lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(TEXTS, each, max_size=3)),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@settings(max_examples=300)
@given(value=NESTED, ascii_only=st.booleans(), chunk=st.sampled_from([1, 2, 3, 7, 1 << 20]))
def test_levels_are_counted_as_json_nests_them(value: Any, ascii_only: bool, chunk: int) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header, "_CHUNK", chunk)
        assert header._levels(data) == depth_of(value)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_what_is_nested_deep_is_refused_when_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "file", {}, {"a": nested(80)})
    assert read(tmp_path / "file").state == {"a": nested(80)}
    itself: Dict[str, Any] = {}
    itself["itself"] = itself
    for value in (nested(200), nested(100_000), itself):
        with pytest.raises(CheckpointError, match=r"^a/.*is nested too deep for a checkpoint") as e:
            write(tmp_path / "other", {}, {"a": value})
        assert len(str(e.value)) < 200
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_of_many_digits_are_refused_when_they_are_written(
    tmp_path: Path, sign: int
) -> None:
    write(tmp_path / "file", {}, {"n": sign * 10**4_200})
    assert (read(tmp_path / "file").state or {})["n"] == sign * 10**4_200
    with pytest.raises(CheckpointError, match="a/n is a number of more than 4,300 digits"):
        write(tmp_path / "other", {}, {"a": {"n": sign * 10**4_999}})


def test_too_much_is_refused_when_it_is_written(tmp_path: Path) -> None:
    for state in ({"a": [0] * 2_100_000}, {"a": "x" * 33_000_000}):
        with pytest.raises(CheckpointError, match=r"too much for the header.*is the most\. Keep"):
            write(tmp_path / "file", {}, state)
    write(tmp_path / "file", {}, {"a": np.zeros(3_000_000, dtype="int8")})
    names = {f"{number:0100d}": np.zeros(0, dtype="int8") for number in range(250_000)}
    with pytest.raises(CheckpointError, match="too much for the header"):
        write(tmp_path / "many", names)


def test_numbers_that_are_none_still_come_back(tmp_path: Path) -> None:
    state = {"a": [math.inf, -math.inf, math.nan, -0.0, 1e308]}
    back = (read(write(tmp_path / "file", {}, state)).state or {})["a"]
    assert repr(back) == repr(state["a"])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_headers_of_any_kind_are_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    odd = st.one_of(
        NESTED, st.integers(-(2**70), 2**70), st.sampled_from([math.nan, math.inf, True, 2**63])
    )
    entry = st.fixed_dictionaries(
        {
            "dtype": st.one_of(
                st.sampled_from(["F32", "I64", "BOOL", "BF16", "F8_E4M3", "U8", "F64", "C64"]), odd
            ),
            "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), odd, st.lists(odd)),
            "data_offsets": st.one_of(
                st.tuples(st.integers(0, 16), st.integers(0, 16)), st.lists(odd, max_size=3), odd
            ),
        }
    )
    entries: Dict[str, Any] = data.draw(st.dictionaries(TEXTS, st.one_of(entry, odd), max_size=3))
    metadata = data.draw(st.one_of(st.dictionaries(TEXTS, TEXTS, max_size=3), odd))
    content = json.dumps({"__metadata__": metadata, **entries}).encode()
    path = tmp_path_factory.getbasetemp() / "odd"
    path.write_bytes(file(content, data.draw(st.binary(max_size=16))))
    try:
        read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert str(error).isprintable()


def test_a_foreign_file_of_many_dimensions_is_read_or_refused(tmp_path: Path) -> None:
    whole = save({"w": np.ones((1,) * 32, dtype="float32")})
    (tmp_path / "file").write_bytes(whole)
    assert read(tmp_path / "file").weights["w"].ndim == 32
    entry = {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}
    refused(tmp_path / "more", file(json.dumps({"w": entry}).encode(), b"\0" * 4))
