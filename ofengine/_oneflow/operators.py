"""Single operators: the shortest way to some of them, and who draws random numbers."""

from __future__ import annotations

from typing import Any, List, Tuple

import oneflow as flow
from oneflow import nn

from ofengine.errors import ConfigurationError

_TensorTuple = flow._oneflow_internal.TensorTuple
_backward = flow._oneflow_internal.autograd.backward
_assign = flow._C.assign_local_tensor
_OF_ONE = _TensorTuple()
"""No gradient to begin with: that of a single element is 1."""


def backward_of(loss: Any) -> None:
    """``loss.backward()`` of an eager loss of one element, without the calls on the way to it.

    Raises :class:`ConfigurationError` where a part of it has had its backward already.
    """
    try:
        _backward(_TensorTuple([loss]), _OF_ONE, False, False)
    except Exception as error:
        if "has been released" not in str(error):
            raise
        raise ConfigurationError(
            "the loss leads through what backward was called for already: the Trainer calls "
            "backward, so leave loss.backward() out of training_step, and detach() what is kept "
            "from one batch for the next."
        ) from error


def write_into(tensor: Any, other: Any) -> None:
    """``tensor.copy_(other)`` of eager ones of one shape, dtype and device, with no check."""
    _assign(tensor, other)


def functions_by_name(name: str) -> List[Tuple[Any, Any]]:
    """Where OneFlow's function ``name`` is looked up when it is called: (holder, function)."""
    holders = (flow, flow._C, nn.functional)
    return [(each, getattr(each, name)) for each in holders if hasattr(each, name)]


_RANDOM = ("bernoulli", "exponential", "normal", "randperm", "uniform", "uniform_int")


def random_operations(graph: nn.Graph) -> List[str]:
    """The kinds of operations in ``graph``, which is compiled, that draw random numbers."""
    kinds = {each.user_conf.op_type_name for each in graph._full_job_proto.net.op}
    return sorted(
        kind
        for kind in kinds
        if kind in _RANDOM or kind.endswith("dropout") or kind.startswith("multinomial")
    )
