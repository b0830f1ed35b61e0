"""What one run of a task over an example tells: the shapes and the work of each module."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

import attrs
import oneflow as flow
from oneflow import nn

from ofengine.data.structure import leaves, to_device
from ofengine.errors import said_by, warn
from ofengine.task import TaskModule

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@attrs.define
class Seen:
    """What a module was given and gave, the last time, and its work in all calls."""

    inputs: str = "-"
    outputs: str = "-"
    flops: int = 0
    """Multiplications and additions of linear layers and convolutions, those inside too."""


def run_example(task: TaskModule, device: Any) -> Dict[int, Seen]:
    """One ``forward`` over ``task.example_input_array``, in eval mode; by ``id`` of the module.

    Empty, and told, where that fails.
    """
    seen: Dict[int, Seen] = {}
    modules = list(task.modules())
    training = [each for each in modules if each.training]
    own = {id(each): vars(each).get("forward") for each in modules}
    example = to_device(task.example_input_array, device)
    task.eval()
    try:
        for each in modules:
            vars(each)["forward"] = _noting(each, seen)
        with flow.no_grad():
            if isinstance(example, dict):
                task(**example)
            else:
                task(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:
        warn(
            f"{type(task).__name__}.forward(example_input_array) raised {said_by(error)}: the "
            "summary has no shapes. Give what forward takes, a tuple or dict of several."
        )
        return {}
    finally:
        for each in modules:
            vars(each).pop("forward", None)
            if own[id(each)] is not None:
                vars(each)["forward"] = own[id(each)]
        for each in training:
            each.training = True
    for each in modules:
        inside = [seen[id(child)].flops for child in each.modules() if id(child) in seen]
        if id(each) in seen and list(each.children()):
            seen[id(each)].flops = sum(inside)
    return seen


def _noting(module: nn.Module, seen: Dict[int, Seen]) -> Any:
    forward = module.forward

    def noted(*inputs: Any, **named: Any) -> Any:
        outputs = forward(*inputs, **named)
        at = seen.setdefault(id(module), Seen())
        given = [*inputs, *named.values()]
        at.inputs, at.outputs = _shapes(given), _shapes([outputs])
        at.flops += _flops(module, given, outputs)
        return outputs

    return noted


def _shapes(values: List[Any]) -> str:
    """The shapes of the tensors and arrays in ``values``, as "8x3x32x32, 8"."""
    shapes = ["x".join(map(str, shape)) or "1" for _, shape, _ in leaves(values)]
    return ", ".join(shapes[:2]) + (", ..." if shapes[2:] else "") or "-"


def _flops(module: nn.Module, inputs: List[Any], outputs: Any) -> int:
    if isinstance(module, nn.Linear):
        return 2 * int(outputs.numel()) * int(module.in_features)
    if isinstance(module, _CONVOLUTIONS):
        return 2 * int(outputs.numel()) * math.prod(_each_output(module))
    if isinstance(module, _TRANSPOSED):
        shape = tuple(module.weight.shape)
        return 2 * int(inputs[0].numel()) * math.prod(shape[1:])
    return 0


def _each_output(module: Any) -> Tuple[int, ...]:
    """What is multiplied for each number of a convolution's output."""
    return tuple(module.weight.shape)[1:]
