"""Where the class indices of a compiled step's losses come from: which input, and by which way."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import attrs
import numpy as np
from oneflow import nn

_LOSSES = {"nll": "target", "sparse_softmax_cross_entropy": "label"}
"""OneFlow's operators that take class indices, and what they call them."""

Change = Callable[[np.ndarray], np.ndarray]


@attrs.frozen
class Source:
    """An input of a graph, and what the step does to it before a loss takes it."""

    index: int
    changes: Sequence[Change]

    def indices(self, inputs: Sequence[Any]) -> np.ndarray:
        """The class indices among these inputs, eager tensors; waits for the device."""
        array = inputs[self.index].numpy()
        for change in self.changes:
            array = change(array)
        return array


def sources_of_labels(graph: nn.Graph, inputs: int) -> List[Optional[Source]]:
    """For each loss over class indices in ``graph``, in order, where these come from.

    None for those that the step computes in another way than by reshaping, cutting, casting or
    shifting one of its ``inputs``, of which there are so many.
    """
    operators = list(graph._forward_job_proto.net.op)
    fed = [each.name for each in operators if each.WhichOneof("op_type") == "input_conf"]
    if len(fed) != inputs:
        return []
    users = [each for each in operators if each.WhichOneof("op_type") == "user_conf"]
    made_by: Dict[str, Any] = {}
    for each in users:
        for outputs in each.user_conf.output.values():
            made_by.update((name, each.user_conf) for name in outputs.s)
    numbers = {f"{name}/out": number for number, name in enumerate(fed)}
    return [
        _source(each.user_conf.input[_LOSSES[kind]].s[0], made_by, numbers)
        for each in users
        for kind in [each.user_conf.op_type_name]
        if kind in _LOSSES
    ]


def _source(name: str, made_by: Dict[str, Any], numbers: Dict[str, int]) -> Optional[Source]:
    changes: List[Change] = []
    while name not in numbers:
        if name not in made_by:
            return None
        operator = made_by[name]
        change = _change(operator.op_type_name, operator.attr)
        if change is None:
            return None
        changes.append(change)
        ((name,),) = [each.s for each in operator.input.values()]
    return Source(numbers[name], changes[::-1])


def _change(kind: str, options: Any) -> Optional[Change]:
    """What an operator does, by numpy; None where it is not known here."""
    if kind in ("cast", "copy", "identity"):
        return _same
    if kind == "reshape":
        return partial(np.reshape, newshape=tuple(options["shape"].at_shape.dim))
    if kind == "transpose":
        return partial(np.transpose, axes=tuple(options["perm"].at_list_int32.val))
    if kind == "squeeze":
        return partial(np.squeeze, axis=tuple(options["axes"].at_list_int32.val))
    if kind == "expand_dims":
        return partial(np.expand_dims, axis=options["axis"].at_int32)
    if kind == "scalar_add" and options["has_int_operand"].at_bool:
        return partial(np.add, options["int_operand"].at_int64)
    if kind == "slice":
        bounds = [options[key].at_list_int64.val for key in ("start", "stop", "step")]
        return partial(_cut, where=tuple(slice(*each) for each in zip(*bounds)))
    if kind == "narrow":
        start, length = options["start"].at_int64, options["length"].at_int64
        before = (slice(None),) * options["dim"].at_int64
        return partial(_cut, where=(*before, slice(start, start + length)))
    return None


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _cut(array: np.ndarray, where: Tuple[slice, ...]) -> np.ndarray:
    return array[where]
