"""A module's ``forward`` as an ONNX model, by oneflow-onnx, compared with onnxruntime."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Tuple, Union

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.tracing import calling_any_module
from ofengine.checkpoint.file import put
from ofengine.data.structure import describe
from ofengine.errors import ConfigurationError, said_by

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""How far an output of onnxruntime's may be from that of ``forward``."""
_OLD_NAMES = {"bool": bool, "int": int, "float": float, "object": object}
"""Names that numpy had up to 1.23, and oneflow-onnx 0.6.2 asks for."""


def write_onnx(module: nn.Module, path: Union[str, Path], input_sample: Any = None) -> Path:
    """Write ``module.forward``, in eval mode, as an ONNX model to ``path``; return the path.

    The model takes inputs of the sample's shapes alone. Before it is written, onnxruntime runs it
    on the sample, and its outputs have to be those of ``forward`` (to 1e-3 of them, or 1e-5).

    Needs the extra ``onnx``: oneflow-onnx 0.6.2, onnx and onnxruntime. Compiles a graph.

    Args:
        module: a task or any module.
        path: the file. It appears when it is complete.
        input_sample: a tensor, or a tuple of tensors for several arguments of ``forward``. Default:
            the task's ``example_input_array``.

    Raises:
        ConfigurationError: there is no sample, a package is missing, oneflow-onnx cannot convert
            an operation, or the outputs differ.
        CheckpointError: the file cannot be written.
    """
    if input_sample is None:
        input_sample = getattr(module, "example_input_array", None)
    sample = (input_sample,) if isinstance(input_sample, flow.Tensor) else input_sample
    if not isinstance(sample, (tuple, list)) or not all(
        isinstance(each, flow.Tensor) for each in sample
    ):
        given = "none" if input_sample is None else describe(input_sample)
        raise ConfigurationError(
            f"to_onnx needs an input to trace forward with, and has {given}: give input_sample, a "
            "tensor or a tuple of tensors, or set the task's example_input_array."
        )
    inputs = tuple(sample)
    with _old_numpy():
        convert, runtime = _packages()
        with _in_eval_mode(module), flow.no_grad():
            expected = [each.numpy() for each in _tensors_of(module(*inputs))]
            content = _converted(module, inputs, convert)
    _compare(runtime, content, inputs, expected)
    return put(path, content)


def _packages() -> Tuple[Any, Any]:
    """What converts a graph, and onnxruntime."""
    try:
        convert = importlib.import_module("oneflow_onnx.oneflow2onnx.util").export_onnx_model
        return convert, importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ConfigurationError(
            f"to_onnx needs the package oneflow-onnx, which cannot be imported ({error}): "
            'pip install "ofengine[onnx]".'
        ) from error


def _converted(module: nn.Module, inputs: Tuple[Any, ...], convert: Any) -> bytes:
    """The bytes of the model."""

    class Forward(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def build(self, *given: Any) -> Any:
            return _tensors_of(self.module(*given))

    graph = Forward()
    with calling_any_module():
        graph(*inputs)
    with tempfile.TemporaryDirectory(prefix="ofengine-onnx-") as folder:
        weights, model = Path(folder) / "weights", Path(folder) / "model.onnx"
        flow.save(graph.state_dict(), str(weights))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert(graph, flow_weight_dir=str(weights), onnx_model_path=str(model))
            return model.read_bytes()
        except Exception as error:  # it raises whatever its handlers of operations do
            raise _cannot(said_by(error)) from error


def _cannot(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"oneflow-onnx cannot convert {what}, so nothing was written: write that in other "
        "operations, or give the weights alone to the other library (save_weights)."
    )


def _compare(runtime: Any, content: bytes, inputs: Tuple[Any, ...], expected: List[Any]) -> None:
    """Raise where onnxruntime computes something else than ``forward``."""
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, dict(zip(names, (each.numpy() for each in inputs))))
    except Exception as error:  # it has its own, and they have no base
        missing = re.search(r"No Op registered for (\w+)", str(error))
        what = f"the operation {missing.group(1)!r}" if missing else said_by(error)
        raise _cannot(what) from error
    same = len(names) == len(inputs) and len(found) == len(expected)
    for ours, theirs in zip(expected, found) if same else ():
        same = same and ours.shape == theirs.shape
        same = same and np.allclose(theirs, ours, rtol=RELATIVE, atol=ABSOLUTE)
    if not same:
        raise ConfigurationError(
            "oneflow-onnx made a model whose outputs in onnxruntime are not those of forward, so "
            "it was not written: look for an operation that it converts wrongly."
        )


def _tensors_of(outputs: Any) -> List[Any]:
    """The tensors that ``forward`` returned, in order."""
    if isinstance(outputs, flow.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for each in outputs for tensor in _tensors_of(each)]


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@contextlib.contextmanager
def _old_numpy() -> Iterator[None]:
    """In the block, numpy has the names that oneflow-onnx asks it for."""
    added = {name: value for name, value in _OLD_NAMES.items() if name not in vars(np)}
    vars(np).update(added)
    try:
        yield
    finally:
        for name in added:
            del vars(np)[name]
