"""Weights into a module and out of it, all of them or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.session import synchronize
from ofengine.checkpoint.file import array_of, read, write
from ofengine.errors import CheckpointError, quoted, warn


def arrays_of(module: nn.Module) -> Dict[str, np.ndarray]:
    """A copy of all parameters and buffers of ``module``, by name."""
    synchronize()
    return {name: array_of(tensor) for name, tensor in module.state_dict().items()}


def save_weights(
    task: nn.Module,
    path: Union[str, Path],
    metadata: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write all parameters and buffers of ``task`` to ``path``; return the path.

    See :func:`write` for how, and for what is raised. ``metadata`` is kept as texts.
    """
    return write(path, arrays_of(task), None, metadata)


def load_weights(
    task: nn.Module, source: Union[str, Path, Mapping[str, Any]], prefix: str = ""
) -> Dict[str, str]:
    """Read weights into ``task``, all of them or nothing; return the file's metadata.

    ::

        load_weights(task, "last.safetensors")                       # a checkpoint into a task
        load_weights(mobilenet_v2(), "last.safetensors", "model.")   # into a plain model
        load_weights(task.model, mobilenet_v2().state_dict())        # and the other way round

    Args:
        task: a task or any module.
        source: a checkpoint, any safetensors file, or a dict of tensors or arrays by name.
        prefix: use only the tensors whose names begin so, without it.

    Raises :class:`CheckpointError` where the file is missing, damaged or of another model.
    """
    if isinstance(source, Mapping):
        arrays = {
            name: array_of(value) if isinstance(value, flow.Tensor) else np.asarray(value)
            for name, value in source.items()
        }
        where, metadata = "the dict of weights", {}
    else:
        checkpoint = read(source)
        arrays, metadata, where = checkpoint.weights, checkpoint.metadata, str(checkpoint.path)
    if prefix:
        begin = len(prefix)
        arrays = {n[begin:]: a for n, a in arrays.items() if n.startswith(prefix)}
        where = f"{where} (below {prefix!r})"
    check_weights(task, arrays, where)
    copy_weights(task, arrays)
    return metadata


def check_weights(task: nn.Module, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raise :class:`CheckpointError` where ``arrays`` are not exactly the tensors of ``task``."""
    own = task.state_dict()
    missing, extra = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{where} belongs to another model: it lacks {quoted(missing)} of "
            f"{type(task).__name__}, and has {quoted(extra)} beside it."
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != arrays[name].shape:
            raise CheckpointError(
                f"{where} belongs to another model: {name!r} has the shape {arrays[name].shape} "
                f"there and {tuple(tensor.shape)} in {type(task).__name__}."
            )
        kept = tensor.numpy().dtype
        if kept != arrays[name].dtype:
            raise CheckpointError(
                f"{where} belongs to another model: {name!r} holds {arrays[name].dtype} numbers "
                f"there and {kept} in {type(task).__name__}."
            )


def copy_weights(task: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``arrays``, checked, into the tensors of ``task``, which stay the same objects.

    Where one tensor has two names, that of ``named_parameters`` counts; a warning tells where
    ``arrays`` have other numbers under the other.
    """
    written: Dict[int, str] = {}
    with flow.no_grad():
        for name, tensor in task.state_dict(keep_vars=True).items():
            first = written.setdefault(id(tensor), name)
            if first == name:
                tensor.copy_(flow.tensor(arrays[name], dtype=tensor.dtype).to(tensor.device))
            elif arrays[name].tobytes() != arrays[first].tobytes():
                warn(
                    f"{first!r} and {name!r} are one tensor of {type(task).__name__}, and what is "
                    f"loaded has other numbers for each: those of {first!r} count."
                )
    synchronize()
