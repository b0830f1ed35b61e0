"""Reads event files by the documents alone: TFRecord framing, CRC-32C, protobuf's wire format."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

_TABLE: List[int] = []
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = (_value >> 1) ^ (0x82F63B78 if _value & 1 else 0)  # Castagnoli's, reflected
    _TABLE.append(_value)


class Value(NamedTuple):
    """One entry of a summary."""

    step: int
    tag: str
    fields: Dict[int, List[Any]]
    """Of ``Summary.Value``: 2 simple_value, 4 image, 5 histogram, 8 tensor, 9 metadata."""


def _masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _records(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        content = data[at + 12 : at + 12 + length]
        sums = struct.unpack_from("<I", data, at + 8) + struct.unpack_from(
            "<I", data, at + 12 + length
        )
        assert sums == (_masked_crc32c(data[at : at + 8]), _masked_crc32c(content))
        yield content
        at += 16 + length


def _varint(data: bytes, at: int) -> Tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


def fields(message: bytes) -> Dict[int, List[Any]]:
    """The fields of a message by number: whole numbers, or the bytes of what is longer."""
    found: Dict[int, List[Any]] = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, value = key & 7, b""
        if kind == 0:
            number, at = _varint(message, at)
            found.setdefault(key >> 3, []).append(number)
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            assert kind == 2
            length, at = _varint(message, at)
        value, at = message[at : at + length], at + length
        found.setdefault(key >> 3, []).append(value)
    return found


def values_in(path: Path) -> List[Value]:
    """All that the event file ``path`` shows, in its order."""
    events = [fields(record) for record in _records(path.read_bytes())]
    assert events[0][3] == [b"brain.Event:2"]
    assert all(struct.unpack("<d", event[1][0])[0] > 1.7e9 for event in events)
    found = []
    for event in events[1:]:
        for summary in event.get(5, []):
            for value in fields(summary)[1]:
                inside = fields(value)
                found.append(Value(event.get(2, [0])[0], inside[1][0].decode(), inside))
    return found


def scalars_in(path: Path) -> Dict[str, List[Tuple[int, float]]]:
    """(step, value) of each curve."""
    curves: Dict[str, List[Tuple[int, float]]] = {}
    for step, tag, inside in values_in(path):
        if 2 in inside:
            curves.setdefault(tag, []).append((step, struct.unpack("<f", inside[2][0])[0]))
    return curves
