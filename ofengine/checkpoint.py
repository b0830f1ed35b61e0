"""Weights in one file, in the safetensors format: nothing in it is executed when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import numpy as np
import oneflow as flow
from oneflow import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ofengine import __version__
from ofengine._oneflow import synchronize
from ofengine.errors import CheckpointError

FORMAT = "ofengine-weights"
FORMAT_VERSION = 1


def save_weights(
    task: nn.Module,
    path: Union[str, Path],
    metadata: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write all parameters and buffers of ``task`` to ``path``; return the path.

    The file appears under its name only when it is complete (temporary file, fsync, rename),
    so that a crash leaves the file that was there before. Raises :class:`CheckpointError`
    where it cannot be written.
    """
    synchronize()
    path = Path(path)
    arrays = {name: np.asarray(t.numpy(), order="C") for name, t in task.state_dict().items()}
    texts = {key: str(value) for key, value in (metadata or {}).items()}
    texts.update(format=FORMAT, format_version=str(FORMAT_VERSION), ofengine=__version__)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save(arrays, texts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if temporary.exists():  # after an error, or Ctrl-C
            temporary.unlink()
    return path


def load_weights(task: nn.Module, path: Union[str, Path]) -> Dict[str, str]:
    """Read ``path`` into ``task``, all of it or nothing; return the file's metadata.

    Raises :class:`CheckpointError` where the file is missing, damaged or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a saved checkpoint.")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}.") from error
    own = task.state_dict()
    missing, extra = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{path} belongs to another model: it lacks {missing[:3]} ({len(missing)} tensors) and "
            f"has {extra[:3]} ({len(extra)} tensors) that {type(task).__name__} has not."
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != arrays[name].shape:
            raise CheckpointError(
                f"{path} belongs to another model: {name!r} has the shape {arrays[name].shape} "
                f"there and {tuple(tensor.shape)} in {type(task).__name__}."
            )
        kept = tensor.numpy().dtype
        if kept != arrays[name].dtype:
            raise CheckpointError(
                f"{path} belongs to another model: {name!r} holds {arrays[name].dtype} numbers "
                f"there and {kept} in {type(task).__name__}."
            )
    with flow.no_grad():
        for name, tensor in own.items():
            tensor.copy_(flow.tensor(arrays[name], dtype=tensor.dtype).to(tensor.device))
    return metadata
