"""The header of a checkpoint file, read as if an enemy had written it.

Before anything of it is parsed its size is known to be at most ``MOST_BYTES``, and the JSON in it
to have at most ``MOST_VALUES`` values in at most ``MOST_LEVELS`` levels; no number in it has more
than ``MOST_DIGITS`` digits. So a header takes at most some seconds and 600 MB, whatever is in it. A
file of a run of millions of steps has some ten thousand bytes and a thousand values.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Dict, NoReturn, Optional, Union

import attrs
import numpy as np

from ofengine.disk import open_regular

MOST_BYTES = 32_000_000
MOST_VALUES = 2_000_000
MOST_LEVELS = 100
MOST_DIGITS = 4_300

_CHUNK = 1 << 20
_QUOTE = ord('"')
_LEVELS = np.zeros(256, dtype=np.int8)
_LEVELS[[ord("["), ord("{")]] = 1
_LEVELS[[ord("]"), ord("}")]] = -1


class BadHeader(Exception):
    """A header cannot be used; the message says why, as the end of a sentence."""


@attrs.frozen
class Header:
    """What a file says of itself.

    Attributes:
        raw: its bytes, those of its length before them included.
        entries: the tensors by name, not checked; ``__metadata__`` taken out.
        metadata: the texts; empty where there are none.
    """

    raw: bytes
    entries: Dict[str, Any]
    metadata: Dict[str, Any]

    def file_size(self) -> Optional[int]:
        """The size in bytes of the whole file by its header; None where that cannot be told."""
        ends = [0]
        for entry in self.entries.values():
            try:
                end = entry["data_offsets"][1]
            except (TypeError, KeyError, IndexError):
                return None
            if not isinstance(end, int):
                return None
            ends.append(end)
        return len(self.raw) + max(ends)


def read_header(file: BinaryIO) -> Header:
    """The header of an open file, which is then read up to it.

    Raises :class:`BadHeader` where there is none, or one beyond the bounds of this module.
    """
    size = os.fstat(file.fileno()).st_size
    begin = file.read(8)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > size - 8:
        raise BadHeader("its header cannot be read")
    if length > MOST_BYTES:
        raise BadHeader(f"its header has {length:,} bytes, and {MOST_BYTES:,} is the most")
    raw = begin + file.read(length)
    header = parse(raw[8:])
    if len(raw) < 8 + length or not isinstance(header, dict) or not header:
        raise BadHeader("its header cannot be read")
    metadata = header.pop("__metadata__", None)
    return Header(raw, header, metadata if isinstance(metadata, dict) else {})


def metadata_of(path: Union[str, Path]) -> Dict[str, Any]:
    """The texts in the header of the file ``path``, not verified; empty where there are none."""
    try:
        with open_regular(path) as file:
            return read_header(file).metadata
    except (OSError, ValueError, BadHeader):
        return {}


# ---------------------------------------------------------------------- JSON within bounds


def parse(data: bytes) -> Any:
    """The value that ``data``, JSON in UTF-8, stands for.

    Raises :class:`BadHeader` where it is no JSON, or beyond the bounds of this module.
    """
    check_bounds(data)
    try:
        return json.loads(data.decode("utf-8"), parse_int=_whole, parse_float=_real)
    except (ValueError, RecursionError) as error:
        raise BadHeader(f"what should be JSON cannot be read ({shown(str(error))})") from None


def check_bounds(data: bytes) -> None:
    """Raise :class:`BadHeader` where :func:`parse` would refuse ``data`` for its size or depth."""
    if len(data) > MOST_BYTES:
        raise BadHeader(f"it has {len(data):,} bytes of JSON, and {MOST_BYTES:,} is the most")
    values = 1 + sum(map(data.count, (b",", b"[", b"{")))
    if values > MOST_VALUES:
        raise BadHeader(f"it has {values:,} values, and {MOST_VALUES:,} is the most")
    if _levels(data) > MOST_LEVELS:
        raise BadHeader(f"it is nested deeper than {MOST_LEVELS} levels")


def _levels(data: bytes) -> int:
    """How deep the lists and objects in ``data`` are nested; brackets in texts do not count."""
    # Backslashes are in texts only. A pair stands for one; what is left of them escapes a quote.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = level = deepest = 0
    for start in range(0, len(bare), _CHUNK):
        part = np.frombuffer(bare, np.uint8, min(_CHUNK, len(bare) - start), start)
        counted = np.cumsum(part == _QUOTE, dtype=np.int64) + quotes
        levels = np.cumsum(np.where(counted & 1, 0, _LEVELS[part]), dtype=np.int64) + level
        quotes, level = int(counted[-1]), int(levels[-1])
        deepest = max(deepest, int(levels.max()))
    return deepest


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= MOST_DIGITS else _too_long(digits)


def _real(digits: str) -> float:
    return float(digits) if len(digits) <= MOST_DIGITS else _too_long(digits)


def _too_long(digits: str) -> NoReturn:
    raise ValueError(f"a number has {len(digits):,} digits, and {MOST_DIGITS:,} is the most")


# ---------------------------------------------------------------------- for people


def shown(text: str, most: int = 200) -> str:
    r"""``text`` as a terminal may be given it: on one line, without control characters, not long.

    A character that cannot be printed becomes its escape: ``\x1b``, ``\u202e``.
    """
    if len(text) > most:
        text = text[:most] + "..."
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
