"""Operators in place in a trace: what they write into, and who reads what is no longer so.

In eager mode all tensors over one memory see what is written into one of them. In a static graph
each view is a tensor of its own: a write changes the one tensor of Python that it is called with.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, Sequence, Set, Tuple

import attrs
import oneflow as flow
from oneflow.framework import graph_build_util

from ofengine._oneflow.lazy_names import name_of, rename
from ofengine._oneflow.operators import functions_by_name
from ofengine._oneflow.traced_operations import TracedOperations, operations_so_far
from ofengine._oneflow.tracing import outside_the_trace
from ofengine.lines import line_being_run

_NOT_WRITING = ("contiguous_", "requires_grad_")
_METHODS = (
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *(n for n in dir(flow.Tensor) if n.endswith("_") and n[0] != "_" and n not in _NOT_WRITING),
)
_FUNCTIONS = (
    *(n for n in dir(flow._C) if n.endswith("_") and n[0] != "_" and n not in _NOT_WRITING),
    *("add", "sub", "mul", "pow", "fmod", "floor_divide", "trunc_divide", "bernoulli", "scatter"),
    *("scatter_add", "relu", "celu", "leaky_relu", "hardshrink", "softshrink", "threshold"),
)
"""OneFlow's functions that write in place, or do with ``inplace=True``."""
_OF_ONE_MEMORY = (
    *("detach", "to", "type", "type_as", "contiguous", "cpu", "cuda"),
    *("float", "double", "half", "int", "long"),
)
"""Methods that give another tensor of Python over the same memory, where nothing is to be done."""
_VIEWS = (
    *("as_strided", "diagonal", "expand", "expand_dims", "narrow", "reshape", "slice", "squeeze"),
    *("transpose", "unfold_tensor"),
)
"""Operators whose outputs are views in eager mode."""
_KEEP_THEIRS = ("broadcast_mul",)
"""Operators whose gradient is right in eager mode, though it needs what they write over."""


@attrs.frozen
class Write:
    """One operator in place: the names of its tensor before and after, and the user's line."""

    before: str
    after: str
    line: str


class WritesInPlace:
    """Notes the operators in place of one trace.

    Args:
        twins: gives the tensors of the trace and outside that stand for the same parameter or
            buffer as one of them, itself included, where it is one.
    """

    def __init__(self, twins: Callable[[Any], Sequence[Any]]) -> None:
        self.noted: List[Write] = []
        self.outside: Dict[int, Any] = {}
        """The tensors that the trace did not make and that were written into, by ``id``."""
        self.backward: Tuple[int, int] = (0, 0)
        """Where the operations of the backward pass begin and end."""
        self._twins = twins
        self._of_one_memory: Dict[int, List[Any]] = {}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Trace a step in the block."""
        with contextlib.ExitStack() as stack:
            changes: List[Tuple[Any, str, Any]] = [
                (holder, name, self._told(function))
                for name in _FUNCTIONS
                for holder, function in functions_by_name(name)
            ]
            changes += [
                (h, "clone", _cloned(function)) for h, function in functions_by_name("clone")
            ]
            cls: Any = flow.Tensor
            own = {"copy_": self._copy, "zero_": _zero}
            methods = {name: own.get(name, getattr(cls, name)) for name in _METHODS}
            changes += [(cls, name, self._told(method)) for name, method in methods.items()]
            changes += [(cls, name, self._joined(getattr(cls, name))) for name in _OF_ONE_MEMORY]
            data = property(self._joined(cls.data.__get__), self._told(cls.data.__set__))
            for change in (*changes, (cls, "clone", _cloned(cls.clone)), (cls, "data", data)):
                _put(stack, *change)
            yield

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """The backward pass is in the block."""
        begin = operations_so_far()
        self.backward = begin, begin
        yield
        self.backward = (begin, operations_so_far() if self.noted else begin)

    def _told(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def told(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(tensor, flow.Tensor) or not graph_build_util.lazy_mode.is_enabled():
                return function(tensor, *args, **kwargs)
            twins = self._twins(tensor)
            if not name_of(tensor):  # nothing has read it yet
                flow._C.identity(tensor)
            before = name_of(tensor)
            result = function(tensor, *args, **kwargs)
            after = name_of(tensor)
            if after != before:
                self.noted.append(Write(before, after, line_being_run()))
                if not tensor.is_lazy:
                    self.outside[id(tensor)] = tensor
                for each in (*twins, *self._of_one_memory.get(id(tensor), ())):
                    for other in (each, *self._of_one_memory.get(id(each), ())):
                        rename(other, like=tensor)
            return result

        return told

    def _joined(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def joined(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(tensor, *args, **kwargs)
            outside = not tensor.is_lazy and not result.is_lazy
            if result is not tensor and (outside or name_of(result) == name_of(tensor)):
                if outside and name_of(tensor):
                    rename(result, like=tensor)
                group = self._of_one_memory.setdefault(id(tensor), [tensor])
                group.append(result)
                self._of_one_memory[id(result)] = group
            return result

        return joined

    def _copy(self, tensor: Any, other: Any) -> None:
        """``copy_``, of which OneFlow's graphs say neither when it happens nor who sees it."""
        if not isinstance(other, flow.Tensor):
            with outside_the_trace():
                other = flow.tensor(other)
        other = other.detach().to(device=tensor.device, dtype=tensor.dtype)
        value = flow._C.identity(flow._C.broadcast_like(other, tensor))
        self._of_one_memory[id(value)] = [value]  # its name goes with it
        rename(tensor, like=value)


def _zero(tensor: Any) -> Any:
    return tensor.fill_(0)


def _cloned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A clone of a lazy tensor has its name, as if it were the same memory."""

    @functools.wraps(function)
    def cloned(tensor: Any) -> Any:
        return flow._C.identity(tensor) if tensor.is_lazy else function(tensor)

    return cloned


def _put(stack: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
    own = vars(holder).get(name)
    setattr(holder, name, value)
    if own is None:
        stack.callback(delattr, holder, name)
    else:
        stack.callback(setattr, holder, name, own)


# ---------------------------------------------------------------------- views


@attrs.frozen
class Alias:
    """A write, and what it would have changed in eager mode and does not in a graph."""

    write: Write
    memory: Set[str]
    """The names of all tensors over the memory that is written into."""
    read: bool
    """True where one of them is read by a later operation of the step."""
    read_by_backward: bool


def aliases(writes: WritesInPlace) -> List[Alias]:
    """What the step that is being traced does with memory that it wrote into."""
    if not writes.noted:
        return []
    step = TracedOperations()
    views = _Views(step)
    made_at = {name: at for at, each in enumerate(step.all) for name in each.outputs}
    begin, end = writes.backward
    found = []
    for write in writes.noted:
        at = made_at.get(write.after, len(step.all))
        memory = views.memory(write.before, at)
        readers = sorted(step.readers(memory, at))
        if readers and views.put_back(write.after, readers[0]):
            continue  # x[:, 0] += 1 is x[:, 0].__iadd__(1), and then x[:, 0] = what it returns
        in_backward = [n for n in readers if begin <= n < end]
        keeps = at < len(step.all) and step.all[at].kind in _KEEP_THEIRS
        found.append(
            Alias(write, memory, len(readers) > len(in_backward), bool(in_backward) and not keeps)
        )
    return found


class _Views:
    """Which tensors of a step are views of one another.

    Args:
        step: its operations.
    """

    def __init__(self, step: TracedOperations) -> None:
        self._step = step
        self._views = [
            (at, {*each.inputs, *each.outputs})
            for at, each in enumerate(step.all)
            if each.kind in _VIEWS
        ]
        self._viewed = {name for _, names in self._views for name in names}

    def memory(self, name: str, until: int) -> Set[str]:
        """The names of all tensors that are views of one another by then, ``name`` among them."""
        memory, size = {name}, 0
        if name not in self._viewed:
            return memory
        views = [names for at, names in self._views if at < until]
        while len(memory) > size:
            size = len(memory)
            for names in views:
                if memory & names:
                    memory |= names
        return memory

    def put_back(self, name: str, at: int) -> bool:
        """True where the operation puts ``name`` back into what it is a view of."""
        operation = self._step.all[at]
        if operation.kind != "slice_update":
            return False
        return bool(self.memory(name, at) & {*operation.inputs})
