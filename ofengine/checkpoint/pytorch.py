"""PyTorch's ``.pth`` files: read without running what is in them, and written.

Such a file is a zip archive: ``data.pkl``, a pickle that says how tensors are made of storages, and
a file of plain numbers for each storage. A pickle can name any function of any module and have it
called. Here :mod:`.pickled` follows it, calls nothing, and knows only what tensors need; any other
name is refused.

A file is read as if an enemy had written it. What it holds is stored, not packed, so that nothing
in it is larger than the file; a tensor is a view of its storage, checked to stay within it, and
becomes no larger by a shape that somebody made up. To read a file takes up to twice its size in
memory.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import numpy as np

from ofengine.checkpoint.header import MOST_BYTES, shown
from ofengine.checkpoint.pickled import BadPickle, Storage, Tensor, unpickled
from ofengine.errors import CheckpointError

EXTENSIONS = (".pth", ".pt")
SIGNATURE = b"PK\x03\x04"
"""What a zip archive begins with."""

_MOST_ENTRIES = 200_000
_MOST_VALUES, _MOST_LEVELS = 500_000, 30
_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1",
    "BoolStorage": "?",
}  # fmt: skip
_STORAGES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_HEADER = 46
"""Bytes that the list at the end of an archive has of each file, its name apart."""


def weights_in(path: Path, content: bytes) -> Dict[str, np.ndarray]:
    """All tensors in the bytes of a ``.pth`` file, by name; read-only.

    Where tensors are in dicts within dicts, as in ``{"state_dict": {...}}``, a name has all keys
    that lead to it, with dots between. What is no tensor is left out.

    Raises :class:`CheckpointError` where the file is damaged, or asks for what no tensor needs.
    """
    try:
        archive = _Archive(content)
        found = unpickled(archive.read(archive.folder + "data.pkl", MOST_BYTES))
        return {name: archive.array(tensor, name) for name, tensor in _named(found)}
    except BadPickle as error:
        raise CheckpointError(f"{path} was not loaded: {shown(str(error), 400)}.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError,
            LookupError, EOFError, OverflowError, struct.error) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is damaged or no file of PyTorch's: {shown(str(error))}."
        ) from None


class _Archive:
    """The files in a zip archive, each bounded by the size of the whole."""

    def __init__(self, content: bytes) -> None:
        if content.count(b"PK\x01\x02") > _MOST_ENTRIES:
            raise BadPickle(f"it has more than {_MOST_ENTRIES:,} files inside")
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        self._entries: Dict[str, zipfile.ZipInfo] = {}
        total = 0
        for entry in self._zip.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise BadPickle(f"{entry.filename!r} in it is packed, which torch.save never does")
            if entry.filename in self._entries:
                raise BadPickle(f"{entry.filename!r} is in it twice")
            self._entries[entry.filename] = entry
            total += entry.file_size
        if total > len(content):
            raise BadPickle("what is in it is said to be larger than the file")
        heads = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(heads) != 1:
            raise BadPickle("it has no weights of torch.save: save torch's state_dict()")
        self.folder = heads[0][: -len("data.pkl")]
        order = self.folder + "byteorder"
        if order in self._entries and self.read(order, 100).strip() != b"little":
            raise BadPickle("it was written by a machine that has the high byte first")
        self._storages: Dict[Tuple[str, str], np.ndarray] = {}

    def read(self, name: str, most: int) -> bytes:
        """The bytes of one file."""
        entry = self._entries.get(name)
        if entry is None:
            raise BadPickle(f"{name!r} is missing in it")
        if entry.file_size > most:
            raise BadPickle(
                f"{name!r} in it has {entry.file_size:,} bytes, and {most:,} is the most"
            )
        return self._zip.read(entry)

    def array(self, tensor: Tensor, name: str) -> np.ndarray:
        """The numbers of ``tensor``: a view of its storage, which it is checked to stay within."""
        numbers = self._storage(tensor.storage, name)
        rank = len(tensor.shape)
        if rank != len(tensor.strides) or rank > 32 or math.prod(tensor.shape) > 1 << 48:
            raise BadPickle(f"{name!r} has a shape that cannot be")
        if 0 in tensor.shape:
            return np.empty(tensor.shape, numbers.dtype)
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))
        if last >= len(numbers):
            raise BadPickle(
                f"{name!r} reaches to number {last:,} of a storage that has {len(numbers):,}"
            )
        size = numbers.itemsize
        return np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, [s * size for s in tensor.strides],
            writeable=False,
        )  # fmt: skip

    def _storage(self, storage: Storage, name: str) -> np.ndarray:
        known = self._storages.get((storage.kind, storage.key))
        if known is None:
            dtype = _DTYPES.get(storage.kind)
            if dtype is None:
                kind = storage.kind.replace("Storage", "").lower()
                raise BadPickle(
                    f"{name!r} holds {kind} numbers, which neither numpy nor a safetensors file "
                    "read by it can: save the weights as float32, with model.float()"
                )
            entry = self.folder + "data/" + storage.key
            content = self.read(entry, 1 << 62)
            if len(content) != storage.count * np.dtype(dtype).itemsize:
                raise BadPickle(
                    f"{entry!r} in it has {len(content):,} bytes, and should hold "
                    f"{storage.count:,} numbers for {name!r}"
                )
            known = np.frombuffer(content, np.uint8 if dtype == "?" else dtype)
            known = known != 0 if dtype == "?" else known
            self._storages[storage.kind, storage.key] = known
        return known


def _named(found: Any) -> Iterator[Tuple[str, Tensor]]:
    """The tensors in dicts and lists, by all keys that lead to them."""
    if not isinstance(found, dict):
        raise BadPickle("it holds no dict of weights: save torch's state_dict()")
    seen: Dict[str, Tensor] = {}
    visited = 0
    waiting: List[Tuple[str, Any, int]] = [("", found, 0)]
    while waiting:
        name, value, level = waiting.pop()
        visited += 1
        if visited > _MOST_VALUES or level > _MOST_LEVELS or len(name) > 10_000:
            raise BadPickle("it has too many values, or they are nested too deep")
        if isinstance(value, Tensor):
            if name in seen:
                raise BadPickle(f"it has two tensors called {name!r}")
            seen[name] = value
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            before = name + "." if name else ""
            inside = [(f"{before}{k}", v, level + 1) for k, v in pairs]
            waiting.extend(reversed(inside))
            visited += len(inside)
    yield from seen.items()


# ---------------------------------------------------------------------- writing


def encode_pth(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a ``.pth`` file, as ``torch.save(state_dict, path)`` writes one.

    Raises :class:`CheckpointError` for numbers of a kind that PyTorch has not.
    """
    pickle = [b"\x80\x02", _ORDERED_DICT, b"("]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, array) in enumerate(arrays.items()):
            kind = _STORAGES.get(array.dtype.newbyteorder("<"))
            if kind is None:
                raise CheckpointError(
                    f"{name!r} holds {array.dtype} numbers, which a .pth file does not keep."
                )
            plain = np.ascontiguousarray(array).reshape(array.shape)
            storage = [_text("storage"), _global("torch", kind), _text(str(key)), _text("cpu")]
            pickle += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), b"("]
            pickle += [b"(", *storage, _whole(plain.size), b"tQ", _whole(0), _sizes(plain.shape)]
            strides = [stride // plain.itemsize for stride in plain.strides]
            pickle += [_sizes(_usual_strides(plain.shape) if not plain.size else strides)]
            pickle += [b"\x89", _ORDERED_DICT, b"tR"]
            _put(archive, f"data/{key}", plain.tobytes())
        _put(archive, "data.pkl", b"".join([*pickle, b"u."]))
        _put(archive, "byteorder", b"little")
        _put(archive, "version", b"3\n")
    return content.getvalue()


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo("archive/" + name), content)  # of 1980: the same each time


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _whole(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _sizes(numbers: Any) -> bytes:
    return b"".join([b"(", *map(_whole, numbers), b"t"])


def _usual_strides(shape: Tuple[int, ...]) -> List[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides[: len(shape)]


_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
