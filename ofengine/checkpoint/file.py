"""One file a checkpoint, in the safetensors format: nothing in it is executed when it is read.

Format version 2. Tensors: the weights and buffers under their names in the task, everything else
under names that begin with "@". The header's ``__metadata__`` holds texts: ``format``
("ofengine-checkpoint"), ``format_version``, ``ofengine`` (its version), ``epoch`` and
``global_step``, ``state`` (JSON: all that is no weight, with ``{"@": name}`` where a tensor
stands), and ``blake2b``: the checksum of the whole file, taken with its own digits set to "0".

Every later ofengine reads the files of every earlier one. Version 1 ("ofengine-weights") holds
weights only and has no checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import attrs
import numpy as np
import oneflow as flow
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ofengine import __version__
from ofengine.errors import CheckpointError

FORMAT = "ofengine-checkpoint"
FORMAT_VERSION = 2
EXTENSION = ".safetensors"

_APART = "@"
_DIGITS = 64
_NO_CHECKSUM = "0" * _DIGITS
_CHECKSUM = re.compile(rb'"blake2b":"([0-9a-f]{%d})"' % _DIGITS)


@attrs.frozen
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        weights: the parameters and buffers by their names in the task.
        state: all the rest, nested dicts and lists; None where the file holds weights only.
        metadata: the texts beside them: "epoch", "global_step", "ofengine", ...
    """

    path: Path
    weights: Dict[str, np.ndarray]
    state: Optional[Dict[str, Any]]
    metadata: Dict[str, str]


# ---------------------------------------------------------------------- writing


def array_of(tensor: Any) -> np.ndarray:
    """A copy of ``tensor`` in the memory of the process."""
    return np.array(tensor.numpy(), order="C")


def write(
    path: Union[str, Path],
    weights: Mapping[str, np.ndarray],
    state: Optional[Mapping[str, Any]] = None,
    metadata: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write a checkpoint file; return its path.

    The file appears under its name only when it is complete, on the disk, and was read back and
    found good; until then the file that was there before stays.

    Raises :class:`CheckpointError` where it cannot be written, or ``state`` holds what cannot.
    """
    content = encode(weights, state, metadata)
    return put(path, content)


def encode(
    weights: Mapping[str, np.ndarray],
    state: Optional[Mapping[str, Any]] = None,
    metadata: Optional[Mapping[str, Any]] = None,
) -> bytes:
    """The bytes of a checkpoint file, its checksum included."""
    odd = [name for name in weights if name.startswith(_APART)]
    if odd:
        raise CheckpointError(f"the parameter {odd[0]!r} begins with {_APART!r}: rename it.")
    arrays = dict(weights)
    texts = {key: str(value) for key, value in (metadata or {}).items()}
    if "state" in texts:
        raise CheckpointError("metadata has the key 'state', which is the format's own: rename it.")
    if state is not None:
        texts["state"] = json.dumps(_pack(state, [], arrays))
    texts.update(
        format=FORMAT,
        format_version=str(FORMAT_VERSION),
        ofengine=__version__,
        blake2b=_NO_CHECKSUM,
    )
    content = bytearray(save(arrays, texts))
    place = _place_of_checksum(content)
    assert place is not None
    content[place] = hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest().encode()
    return bytes(content)


def put(path: Union[str, Path], content: bytes) -> Path:
    """Write the bytes of :func:`encode` to ``path``, see :func:`write`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != content:
            raise CheckpointError(
                f"{path} could not be written: reading it back gave other bytes. Is the disk well?"
            )
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # after an error, or Ctrl-C
            temporary.unlink()
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are no more left half-written in ``folder``."""
    for each in folder.glob(f".*{EXTENSION}.*.tmp"):
        number = each.name.split(".")[-2]
        if number.isdigit() and not Path("/proc", number).exists():
            with contextlib.suppress(OSError):
                each.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(value: Any, place: List[str], arrays: Dict[str, np.ndarray]) -> Any:
    """``value`` as JSON can hold it; its tensors and arrays go to ``arrays``."""
    if isinstance(value, flow.Tensor):
        value = array_of(value)
    if isinstance(value, np.generic):
        value = value.item()
    where = "/".join(place) or "the state"
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise CheckpointError(
                f"{where} is an array of {value.dtype}: a checkpoint keeps numbers only, of at "
                "most 64 bits."
            )
        name = _APART + "/".join(place)
        while name in arrays:  # {"a/b": ...} beside {"a": {"b": ...}}
            name += "'"
        arrays[name] = np.array(value, order="C")
        return {_APART: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        packed = {}
        for key, each in value.items():
            if not isinstance(key, str) or key == _APART:
                raise CheckpointError(
                    f"{where} has the key {key!r}: keys in a checkpoint are texts"
                    f"{f', and not {_APART!r}' if key == _APART else ''}."
                )
            packed[key] = _pack(each, [*place, key], arrays)
        return packed
    if isinstance(value, (list, tuple)):
        return [_pack(each, [*place, str(index)], arrays) for index, each in enumerate(value)]
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot keep: give "
        "None, numbers, texts, tensors or arrays, in lists and dicts."
    )


# ---------------------------------------------------------------------- reading


def read(path: Union[str, Path]) -> Checkpoint:
    """Read and verify a checkpoint file, or any safetensors file of weights.

    Raises :class:`CheckpointError` where it is missing, damaged, no safetensors file, or of a
    newer format.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a file: give the path of a saved checkpoint. (oneflow.save "
            "writes folders of pickles, which can run code when they are opened; if you trust it: "
            "ofengine.load_weights(module, oneflow.load(path)).)"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there: give the path of a saved checkpoint."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}.") from error
    metadata, arrays = _verified(path, content)
    weights = {name: array for name, array in arrays.items() if not name.startswith(_APART)}
    state = None
    if metadata.get("format") == FORMAT and "state" in metadata:
        try:
            state = _unpack(json.loads(metadata.pop("state")), arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged: its state cannot be read: {error}."
            ) from None
    return Checkpoint(path, weights, state, metadata)


def _verified(path: Path, content: bytes) -> Tuple[Dict[str, str], Dict[str, np.ndarray]]:
    """The metadata and the tensors in ``content``, the checksum compared."""
    header = _header(content)
    if header is None:
        pickled = content[:1] == b"\x80" or content[:4] == b"PK\x03\x04"
        raise CheckpointError(
            f"{path} is damaged or no safetensors file"
            + (": it looks like a pickle, which is not opened, because it could run any code."
               if pickled else ": its header cannot be read.")
        )  # fmt: skip
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict):
        metadata = {}
    length = 8 + int.from_bytes(content[:8], "little")
    version = str(metadata.get("format_version", ""))
    if b"ofengine" in content[:length] or b"blake2b" in content[:length]:
        _check_format(path, metadata, version)
        if version != "1":
            _check_checksum(path, content)
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}.") from error
    return metadata, arrays


def metadata_of(path: Path) -> Dict[str, str]:
    """The texts in the header of a checkpoint file, not verified; empty where there are none."""
    try:
        with open(path, "rb") as file:
            length = file.read(8)
            header = _header(length + file.read(int.from_bytes(length, "little")))
    except (OSError, MemoryError, OverflowError):
        return {}
    metadata = (header or {}).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _header(content: bytes) -> Optional[Dict[str, Any]]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        return None
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return None
    return header if isinstance(header, dict) and header else None


def _check_format(path: Path, metadata: Mapping[str, Any], version: str) -> None:
    known = {"1": "ofengine-weights", str(FORMAT_VERSION): FORMAT}
    if metadata.get("format") == FORMAT and version.isdecimal() and int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by ofengine {metadata.get('ofengine', '?')} in format {version}, "
            f"and this is ofengine {__version__}, which reads formats up to {FORMAT_VERSION}: "
            "upgrade ofengine."
        )
    if known.get(version) != metadata.get("format"):
        raise CheckpointError(f"{path} is damaged: its format cannot be told.")


def _check_checksum(path: Path, content: bytes) -> None:
    place = _place_of_checksum(content)
    blank = bytearray(content)
    if place is not None:
        blank[place] = _NO_CHECKSUM.encode()
    digest = hashlib.blake2b(blank, digest_size=_DIGITS // 2).hexdigest().encode()
    if place is None or content[place] != digest:
        raise CheckpointError(
            f"{path} is damaged: its checksum is not that of its content. Use the one before."
        )


def _place_of_checksum(content: Union[bytes, bytearray]) -> Optional[slice]:
    header = 8 + int.from_bytes(content[:8], "little")
    found = _CHECKSUM.search(content, 8, header)
    return slice(*found.span(1)) if found else None


def _unpack(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_APART}:
            return arrays[value[_APART]]
        return {key: _unpack(each, arrays) for key, each in value.items()}
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    return value
