"""Global tensors: what a graph of several ranks works on in the place of a task's local ones.

A graph over local tensors is silently wrong in a process that is one of several ranks. One over
global tensors is not, and its compiler makes the ranks exchange what has to be exchanged.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Sequence

import oneflow as flow
from oneflow import nn
from oneflow.framework.graph_build_util import lazy_mode
from oneflow.optim import Optimizer

_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
"""OneFlow's functions that make a tensor of numbers alone."""
_NEW = ("new_empty", "new_full", "new_ones", "new_zeros")
"""A tensor's methods that make another one of numbers alone."""
_answering: List[Ranks] = []
"""Where steps are traced over global tensors now; empty elsewhere."""


def computes_on(x: Any) -> str:
    """The kind of device of ``x``; "" for a global tensor in no step of :func:`answering_as_local`.

    Where a user's own graph says how each tensor lies, nothing else is to be made of one.
    """
    return str(x.device.type) if x.is_local or _answering else ""


class Ranks:
    """Where the global tensors of all ranks lie.

    Args:
        device: this rank's.
        size: how many ranks there are.
    """

    def __init__(self, device: flow.device, size: int) -> None:
        self.device = device
        self.placement = flow.placement(device.type, list(range(size)))
        self.first = flow.placement(device.type, [0])
        """Rank 0 alone, where OneFlow has a graph's count of steps."""

    def whole(self, tensor: Any) -> Any:
        """A tensor that all ranks have whole; rank 0's where it is local. In a trace too."""
        return tensor.to_global(self.placement, flow.sbp.broadcast)

    def rows(self, tensor: Any) -> Any:
        """A tensor of which each rank has some rows, in the order of ranks. In a trace too."""
        return tensor.to_global(self.placement, flow.sbp.split(0))

    def count(self, number: int) -> Any:
        """What a graph may have for its count of steps."""
        tensor = flow.tensor([number], dtype=flow.int64, device=self.device)
        return tensor.to_global(self.first, flow.sbp.broadcast)


def local(tensor: Any) -> Any:
    """What this rank has of a global tensor, in the same memory; a local one itself."""
    return tensor.to_local() if tensor.is_global else tensor


class Twins:
    """For each local parameter and buffer a global tensor in the same memory.

    They stand in the places of the local ones while a graph is made, and only then: whoever else
    looks finds the local ones, with what the graph makes of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._twin_of: Dict[int, Any] = {}
        self._local_of: Dict[int, Any] = {}

    def add(self, tensor: Any) -> None:
        """Make a twin, where ``tensor`` has none; all ranks at once. Rank 0's values are kept."""
        if id(tensor) in self._twin_of:
            return
        twin = self._ranks.whole(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
        tensor.data = local(twin.detach())  # rank 0's has the memory already
        self._twin_of[id(tensor)] = twin
        self._local_of[id(twin)] = tensor

    def forget(self, tensor: Any) -> None:
        """``tensor`` has other memory now."""
        twin = self._twin_of.pop(id(tensor), None)
        self._local_of.pop(id(twin), None)

    def of(self, tensor: Any) -> Any:
        """The twin of a local tensor."""
        return self._twin_of[id(tensor)]

    def local_of(self, tensor: Any) -> Any:
        """The local tensor whose twin ``tensor`` is; any other one itself."""
        return self._local_of.get(id(tensor), tensor)

    @contextlib.contextmanager
    def in_place(self, task: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """In the block, let the modules of ``task`` and the parameter groups have the twins."""
        held = [d for module in task.modules() for d in (module._parameters, module._buffers)]
        places = [(d, name, each) for d in held for name, each in d.items() if each is not None]
        groups = [(g, g._parameters) for each in optimizers for g in each.param_groups]
        for states, name, tensor in places:
            twin = states[name] = self.of(tensor)
            if twin.requires_grad != tensor.requires_grad:
                twin.requires_grad_(tensor.requires_grad)
        for group, parameters in groups:
            group._parameters = [self._twin_of.get(id(each), each) for each in parameters]
        try:
            yield
        finally:
            for states, name, tensor in places:
                states[name] = tensor
            for group, parameters in groups:
                group._parameters = parameters


@contextlib.contextmanager
def answering_as_local(ranks: Ranks) -> Iterator[None]:
    """While tracing over global tensors, let what a step does with local ones go on working.

    What it makes of numbers alone is global too, and all ranks have it whole: OneFlow's own layers
    would split it as the batch is. ``tensor.device`` is this rank's device, and
    ``tensor.to(device)`` leaves a tensor on it where it is. A batch norm may have neither a
    weight nor running statistics, which OneFlow would end the process over.
    """
    own_device, own_to = flow.Tensor.device, flow.Tensor.to
    own_normalization = flow._C.normalization
    made = [(flow, name, getattr(flow, name)) for name in _FACTORIES]
    made += [(flow.Tensor, name, getattr(flow.Tensor, name)) for name in _NEW]
    whole = {"placement": ranks.placement, "sbp": flow.sbp.broadcast}

    def device(tensor: Any) -> Any:
        return ranks.device if tensor.is_global else own_device.__get__(tensor)

    def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_global:
            return own_to(tensor, *args, **kwargs)
        if "device" in kwargs and _is_device(kwargs["device"], ranks.device):
            kwargs = {key: each for key, each in kwargs.items() if key != "device"}
        args = tuple(each for each in args if not _is_device(each, ranks.device))
        args = tuple(each.dtype if isinstance(each, flow.Tensor) else each for each in args)
        return own_to(tensor, *args, **kwargs) if args or kwargs else tensor

    def make(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not lazy_mode.is_enabled() or kwargs.get("placement") not in (None, ranks.placement):
            return original(*args, **kwargs)
        kwargs.pop("device", None)
        return original(*args, **{**kwargs, **whole})

    def made_whole(original: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: make(original, *args, **kwargs)  # a tensor's method, too

    def normalization(
        x: Any,
        mean: Any,
        variance: Any,
        weight: Any,
        bias: Any,
        axis: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if x.is_global:
            zeros, ones = (each(x.shape[axis], **whole) for each in (x.new_zeros, x.new_ones))
            mean, variance = (zeros, ones) if mean is None else (mean, variance)
            weight, bias = (ones, zeros) if weight is None else (weight, bias)
        return own_normalization(x, mean, variance, weight, bias, axis, *args, **kwargs)

    _answering.append(ranks)
    flow.Tensor.device, flow.Tensor.to = property(device), to
    flow._C.normalization = normalization
    for owner, name, original in made:
        setattr(owner, name, made_whole(original))
    try:
        yield
    finally:
        _answering.remove(ranks)
        flow.Tensor.device, flow.Tensor.to = own_device, own_to
        flow._C.normalization = own_normalization
        for owner, name, original in made:
            setattr(owner, name, original)


def _is_device(value: Any, own: flow.device) -> bool:
    """True for a name of this rank's kind of device."""
    if isinstance(value, flow.device):
        return bool(value.type == own.type)
    return isinstance(value, str) and value.partition(":")[0] == own.type


def let_go(graph: nn.Graph) -> None:
    """Delete what OneFlow has made of ``graph``; all ranks at once, who wait for each other."""
    if vars(graph).get("_c_nn_graph") is not None:
        flow._oneflow_internal.eager.Sync()
        vars(graph)["_c_nn_graph"] = None
