"""One file a checkpoint, in the safetensors format: nothing in it is executed when it is read.

Format version 2. Tensors: the weights and buffers under their names in the task, everything else
under names that begin with "@". The header's ``__metadata__`` holds texts: ``format``
("ofengine-checkpoint"), ``format_version``, ``ofengine`` (its version), ``epoch`` and
``global_step``, ``state`` (JSON: all that is no weight, with ``{"@": name}`` where a tensor
stands), and ``blake2b``: the checksum of the whole file, taken with its own digits set to "0".

Every later ofengine reads the files of every earlier one. Version 1 ("ofengine-weights") holds
weights only and has no checksum.

A file is read as if an enemy had written it. Only a regular file is opened. Its header is looked at
within the bounds of :mod:`.header`, at most 32 MB and 2 million values, which take some seconds and
600 MB; a file that has not the size that its header says is not read any further. To read one that
has takes time in proportion to its size, and twice its size in memory. What is written is within
the same bounds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import attrs
import numpy as np
import oneflow as flow
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ofengine import __version__
from ofengine.checkpoint.header import (
    MOST_DIGITS,
    MOST_LEVELS,
    BadHeader,
    check_bounds,
    parse,
    read_header,
    shown,
)
from ofengine.disk import give_name, open_regular, sync_folder, temporary_file, why_no_path
from ofengine.errors import CheckpointError

FORMAT = "ofengine-checkpoint"
FORMAT_VERSION = 2
EXTENSION = ".safetensors"

_APART = "@"
_DIGITS = 64
_NO_CHECKSUM = "0" * _DIGITS
_CHECKSUM = re.compile(rb'"blake2b":"([0-9a-f]{%d})"' % _DIGITS)
_MOST_BITS = int(MOST_DIGITS * 3.3219)


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
    """Write a checkpoint file to ``path``; return its path.

    ``weights`` are parameters and buffers by name, ``state`` is all the rest, nested dicts and
    lists, and ``metadata`` is kept as texts beside them. The file appears under its name only when
    it is complete, on the disk, and was read back and found good; until then the file that was
    there before stays.

    Raises :class:`CheckpointError` where it cannot be written, or ``state`` holds what cannot.
    """
    content = encode(weights, state, metadata)
    return put(path, content)


def encode(
    weights: Mapping[str, np.ndarray],
    state: Optional[Mapping[str, Any]] = None,
    metadata: Optional[Mapping[str, Any]] = None,
) -> bytes:
    """The bytes of a checkpoint file of ``weights``, ``state`` and ``metadata``: see :func:`write`.

    Its checksum is among them. Raises :class:`CheckpointError` where they hold what cannot be kept.
    """
    odd = [name for name in weights if name.startswith(_APART)]
    if odd:
        raise CheckpointError(f"the parameter {odd[0]!r} begins with {_APART!r}: rename it.")
    arrays = dict(weights)
    texts = {key: str(value) for key, value in (metadata or {}).items()}
    if "state" in texts:
        raise CheckpointError("metadata has the key 'state', which is the format's own: rename it.")
    if state is not None:
        texts["state"] = json.dumps(_pack(state, [], arrays))
        _check_bounds(texts["state"].encode())
    texts.update(
        format=FORMAT,
        format_version=str(FORMAT_VERSION),
        ofengine=__version__,
        blake2b=_NO_CHECKSUM,
    )
    content = bytearray(save(arrays, texts))
    _check_bounds(bytes(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    place = _place_of_checksum(content)
    assert place is not None
    content[place] = hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest().encode()
    return bytes(content)


def _check_bounds(header: bytes) -> None:
    """Raise where what is to be written could not be read."""
    try:
        check_bounds(header)
    except BadHeader as error:
        raise CheckpointError(
            f"what is to be saved is too much for the header of a file: {error}. Keep long lists "
            "of numbers as one array or tensor each."
        ) from None


def put(path: Union[str, Path], content: bytes) -> Path:
    """Write ``content``, the bytes of :func:`encode`, to ``path``, see :func:`write`."""
    return put_first([Path(path)], content, lambda _: True)


def put_first(paths: Iterable[Path], content: bytes, may_replace: Callable[[Path], bool]) -> Path:
    """Write ``content``, of :func:`encode`, to the first of ``paths`` that is free; return it.

    A path is free where nothing is there, at the very moment when the file is put there, or where
    ``may_replace`` says so of what is there. All are in one folder.

    Raises :class:`CheckpointError` where it cannot be written.
    """
    waiting = iter(paths)
    path = next(waiting)
    problem = why_no_path(path)
    if problem is not None:
        raise CheckpointError(f"{shown(str(path))} could not be written: the path {problem}.")
    try:
        with temporary_file(path.parent) as (file, temporary):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if temporary.read_bytes() != content:
                raise CheckpointError(
                    f"{path} could not be written: reading it back gave other bytes. Is the disk "
                    "well?"
                )
            while not _take(temporary, path, may_replace):
                path = next(waiting)
            sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}.") from error
    return path


def _take(temporary: Path, path: Path, may_replace: Callable[[Path], bool]) -> bool:
    """Give a complete file its name; False where another has it."""
    if may_replace(path):
        os.replace(temporary, path)
        return True
    try:
        give_name(temporary, path)
    except FileExistsError:
        return False
    return True


def as_read(state: Mapping[str, Any]) -> Any:
    """``state`` as a file gives it back: with arrays for tensors, and lists for tuples.

    Raises :class:`CheckpointError` where it holds what no checkpoint can keep.
    """
    arrays: Dict[str, np.ndarray] = {}
    return _unpack(_pack(state, [], arrays), arrays)


def _pack(value: Any, place: List[str], arrays: Dict[str, np.ndarray]) -> Any:
    """``value`` as JSON can hold it; its tensors and arrays go to ``arrays``."""
    if isinstance(value, flow.Tensor):
        value = array_of(value)
    if isinstance(value, np.generic):
        value = value.item()
    where = "/".join(place) or "the state"
    if len(place) > MOST_LEVELS - 10:
        raise CheckpointError(f"{where[:40]}... is nested too deep for a checkpoint.")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise CheckpointError(f"{where} is a number of more than {MOST_DIGITS:,} digits.")
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
    """Read and verify the checkpoint file ``path``, or any safetensors file of weights.

    What it may take of time and memory is said at the top of this module.

    Raises :class:`CheckpointError` where it is missing, damaged, no regular file, no safetensors
    file, beyond those bounds, or of a newer format.
    """
    path = Path(path)
    problem = why_no_path(path)
    if problem is not None:
        raise CheckpointError(f"{shown(str(path))} could not be read: the path {problem}.")
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a file: give the path of a saved checkpoint. (oneflow.save "
            "writes folders of pickles, which can run code when they are opened; if you trust it: "
            "ofengine.load_weights(module, oneflow.load(path)).)"
        )
    try:
        with open_regular(path) as file:
            metadata, arrays = _verified(path, file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there: give the path of a saved checkpoint."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}.") from error
    weights = {name: array for name, array in arrays.items() if not name.startswith(_APART)}
    state = None
    if metadata.get("format") == FORMAT and "state" in metadata:
        state = _state_of(path, metadata.pop("state"), arrays)
    return Checkpoint(path, weights, state, metadata)


def _state_of(path: Path, text: str, arrays: Mapping[str, np.ndarray]) -> Dict[str, Any]:
    try:
        state = _unpack(parse(text.encode("utf-8", "surrogatepass")), arrays)
    except (BadHeader, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: its state cannot be read: {shown(str(error))}."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: its state is no dict.")
    return state


def _verified(path: Path, file: BinaryIO) -> Tuple[Dict[str, str], Dict[str, np.ndarray]]:
    """The metadata and the tensors in an open file, the checksum compared."""
    try:
        header = read_header(file)
    except BadHeader as error:
        file.seek(0)
        begin, reason = file.read(4), f"{error}."
        if begin == b"PK\x03\x04":
            reason = (
                "it looks like a pickle, which is not opened, because it could run any code; of a "
                ".pth file, load_weights(module, path) takes the weights without running it."
            )
        elif begin[:1] == b"\x80":
            reason = (
                "it looks like a bare pickle, or a .pth file from before PyTorch 1.6, which is not "
                "opened, because it could run any code: write the state_dict() anew with "
                "torch.save of PyTorch 1.6 or later, whose zip files load_weights takes."
            )
        raise CheckpointError(f"{path} is damaged or no safetensors file: {reason}") from None
    version = str(header.metadata.get("format_version", ""))
    is_ours = b"ofengine" in header.raw or b"blake2b" in header.raw
    if is_ours:
        _check_format(path, header.metadata, version)
    size, said = os.fstat(file.fileno()).st_size, header.file_size()
    if said is not None and said != size:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, and should have {shown(f'{said:,}')}."
        )
    file.seek(0)
    content = file.read(size)
    if not content.startswith(header.raw):
        raise CheckpointError(f"{path} was changed while it was read: read it again.")
    if is_ours and version != "1":
        _check_checksum(path, content)
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {shown(str(error))}."
        ) from error
    return header.metadata, arrays


def _check_format(path: Path, metadata: Mapping[str, Any], version: str) -> None:
    known = {"1": "ofengine-weights", str(FORMAT_VERSION): FORMAT}
    if metadata.get("format") == FORMAT and version.isdecimal() and int(version) > FORMAT_VERSION:
        writer = shown(str(metadata.get("ofengine", "?")))
        raise CheckpointError(
            f"{path} was written by ofengine {writer} in format {shown(version)}, and this is "
            f"ofengine {__version__}, which reads formats up to {FORMAT_VERSION}: upgrade ofengine."
        )
    if known.get(version) != metadata.get("format"):
        raise CheckpointError(f"{path} is damaged: its format cannot be told.")


def _check_checksum(path: Path, content: bytes) -> None:
    place, found = _place_of_checksum(content), hashlib.blake2b(digest_size=_DIGITS // 2)
    if place is not None:
        whole = memoryview(content)  # no copy: it may be large
        for part in (whole[: place.start], _NO_CHECKSUM.encode(), whole[place.stop :]):
            found.update(part)
    if place is None or content[place] != found.hexdigest().encode():
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
