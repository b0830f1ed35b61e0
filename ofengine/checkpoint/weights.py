"""Weights into a module and out of it, all of them or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.session import synchronize
from ofengine.checkpoint import pytorch
from ofengine.checkpoint.file import array_of, put, read, write
from ofengine.disk import open_regular, why_no_path
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

    A path that ends in ``.pth`` or ``.pt`` becomes a file as ``torch.save`` writes one of a
    ``state_dict()``; any other a safetensors file, which ``safetensors.torch.load_file`` reads as
    well. See :func:`write` for how. ``metadata`` is kept as texts, in a safetensors file only.

    Raises :class:`CheckpointError` where the file cannot be written, or cannot keep ``metadata``.
    """
    if Path(path).suffix.lower() not in pytorch.EXTENSIONS:
        return write(path, arrays_of(task), None, metadata)
    if metadata:
        raise CheckpointError(
            f"{path} cannot keep metadata: leave it out, or give a path that ends in .safetensors."
        )
    return put(path, pytorch.encode_pth(arrays_of(task)))


def load_weights(
    task: nn.Module,
    source: Union[str, Path, Mapping[str, Any]],
    prefix: str = "",
    strict: bool = True,
) -> Dict[str, str]:
    """Read weights into ``task``, all of them or nothing; return the file's metadata.

    ::

        load_weights(task, "last.safetensors")                       # a checkpoint into a task
        load_weights(mobilenet_v2(), "last.safetensors", "model.")   # into a plain model
        load_weights(task.model, mobilenet_v2().state_dict())        # and the other way round
        load_weights(task.model, "mobilenet_v2.pth")                 # PyTorch's, of the same model

    Args:
        task: a task or any module.
        source: a checkpoint, any safetensors file, a ``.pth`` file of PyTorch (1.6 or newer; what
            is in it is not executed), or a dict of tensors or arrays by name.
        prefix: use only the tensors whose names begin so, without it. In a ``.pth`` file with
            dicts in dicts, the keys that lead to a tensor are joined by dots: "state_dict.".
        strict: False loads the tensors whose names both have, and warns in one sentence of those
            that one of the two has alone.

    Raises :class:`CheckpointError` where the file is missing, damaged or of another model.
    """
    arrays, metadata, where = _read_weights(source)
    if prefix:
        begin = len(prefix)
        arrays = {n[begin:]: a for n, a in arrays.items() if n.startswith(prefix)}
        where = f"{where} (below {prefix!r})"
    if strict:
        check_weights(task, arrays, where)
    else:
        arrays = _those_of_both(task, arrays, where)
    copy_weights(task, arrays)
    return metadata


def _read_weights(
    source: Union[str, Path, Mapping[str, Any]],
) -> Tuple[Dict[str, np.ndarray], Dict[str, str], str]:
    """The weights and metadata in a file or dict, and what it is called."""
    if isinstance(source, Mapping):
        arrays = {
            name: array_of(value) if isinstance(value, flow.Tensor) else np.asarray(value)
            for name, value in source.items()
        }
        return arrays, {}, "the dict of weights"
    of_pytorch = pytorch_weights(source)
    if of_pytorch is not None:
        return of_pytorch, {}, str(source)
    checkpoint = read(source)
    return checkpoint.weights, checkpoint.metadata, str(checkpoint.path)


def pytorch_weights(source: Union[str, Path]) -> Optional[Dict[str, np.ndarray]]:
    """What is in a ``.pth`` file of PyTorch; None where ``source`` is none, or no file."""
    path = Path(source)
    if why_no_path(path) is None:
        try:
            with open_regular(path) as file:
                if file.read(len(pytorch.SIGNATURE)) == pytorch.SIGNATURE:
                    file.seek(0)
                    return pytorch.weights_in(path, file.read())
        except OSError:
            pass  # said by who reads it otherwise
    return None


def _those_of_both(
    task: nn.Module, arrays: Mapping[str, np.ndarray], where: str
) -> Dict[str, np.ndarray]:
    """The ``arrays`` that ``task`` has a place for, checked; a warning tells of the others."""
    own = task.state_dict()
    common = {name: array for name, array in arrays.items() if name in own}
    if not common:
        raise CheckpointError(
            f"{where} has no name of {type(task).__name__}: it has {quoted(sorted(arrays))}, and "
            f"{type(task).__name__} has {quoted(sorted(own))}{_hint(own, arrays)}."
        )
    _check_each({name: own[name] for name in common}, common, where, task)
    missing, extra = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    if missing or extra:
        warn(
            f"{where}: {quoted(missing, most=20)} of {type(task).__name__} stayed as before, and "
            f"{quoted(extra, most=20)} of what was read was not used (strict=False)."
        )
    return common


def _hint(own: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """What to write where the names are those of a part of what was read, as a clause."""
    first = next(iter(own), "")
    prefixes = {name[: -len(first)] for name in arrays if first and name.endswith("." + first)}
    for prefix in sorted(prefixes):
        if all(prefix + name in arrays for name in own):
            return f"; give prefix={prefix!r}"
    return ""


def check_weights(task: nn.Module, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raise :class:`CheckpointError` where ``arrays`` are not exactly the tensors of ``task``."""
    own = task.state_dict()
    missing, extra = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{where} belongs to another model: it lacks {quoted(missing)} of "
            f"{type(task).__name__}, and has {quoted(extra)} beside it{_hint(own, arrays)}."
        )
    _check_each(own, arrays, where, task)


def _check_each(
    own: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str, task: nn.Module
) -> None:
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
            if name not in arrays:
                continue  # not strict
            first = written.setdefault(id(tensor), name)
            if first == name:
                array = np.array(arrays[name], order="C")
                tensor.copy_(flow.tensor(array, dtype=tensor.dtype).to(tensor.device))
            elif arrays[name].tobytes() != arrays[first].tobytes():
                warn(
                    f"{first!r} and {name!r} are one tensor of {type(task).__name__}, and what is "
                    f"loaded has other numbers for each: those of {first!r} count."
                )
    synchronize()
