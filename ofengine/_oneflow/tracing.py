"""Modules inside a trace: proxies that answer as their modules do, lazy parameters, assignments."""

from __future__ import annotations

import contextlib
import functools
import warnings
from types import ModuleType
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import attrs
import oneflow as flow
from oneflow import nn
from oneflow.framework import graph_build_util
from oneflow.nn.graph.graph_block import GraphTensor
from oneflow.nn.graph.proxy import Proxy, ProxyParameterList
from oneflow.nn.modules import module as module_file
from oneflow.utils import checkpoint


def module_of(proxy: Any) -> Any:
    """The module that stands behind ``proxy`` inside ``build`` (a module stands for itself)."""
    return proxy.to(nn.Module) if isinstance(proxy, Proxy) else proxy


def has_forward_hooks(module: nn.Module) -> bool:
    """True where somebody registered a hook of ``module``'s forward, which no graph calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def build_parameters(proxy: Any) -> List[Any]:
    """Put every parameter of a module's proxy into the graph being traced; the lazy tensors."""
    return [
        getattr(module, name) for module in proxy.modules() for name in list(module._parameters)
    ]


@attrs.define
class TracedState:
    """A parameter or buffer, and the lazy tensor that stands for it in the trace."""

    tensor: Any
    proxies: List[Any]
    """Its own, one for each place that it is held at."""
    places: List[Tuple[nn.Module, str]]
    """The modules that hold it, and under which name."""
    path: str
    """As in ``layer.weight``."""
    names: Set[str]
    """Those that it may have where a graph begins."""

    def built(self) -> Optional[Any]:
        """The lazy tensor, where the trace has read it."""
        return next((each.lazy_origin for each in self.proxies if each.build_finished), None)

    def lazy(self) -> Any:
        """The lazy tensor."""
        self.proxies[0].try_build()
        return self.proxies[0].lazy_origin


def states_of(proxy: Any) -> List[TracedState]:
    """The parameters and buffers of the module behind ``proxy``, each once."""
    paths = {id(module): path for path, module in module_of(proxy).named_modules()}
    found: Dict[int, TracedState] = {}
    for each in proxy.modules():
        module, proxies = module_of(each), {**each._parameters, **each._buffers}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            path = ".".join(filter(None, [paths[id(module)], name]))
            known = found.setdefault(id(tensor), TracedState(tensor, [], [], path, set()))
            known.places.append((module, name))
            if name in proxies:  # of two names for one tensor a module's proxy has the first
                block = proxies[name].to(GraphTensor)
                known.proxies.append(proxies[name])
                known.names.add(f"{block._name_prefix}{block._name}/out")
    return list(found.values())


def hold(proxy: Any, held: Iterable[Any]) -> None:
    """Let the graph being traced have no gradient of these parameters, as if they were frozen."""
    ids = {id(parameter) for parameter in held}
    for state in states_of(proxy) if ids else ():
        for each in state.proxies if id(state.tensor) in ids else ():
            each.try_build()
            each.lazy_origin.requires_grad_(False)


class _LazyStates(Dict[str, Any]):
    """A module's own parameters or buffers, by name; in a trace their lazy tensors."""

    def __init__(self, states: Dict[str, Any], proxy: Any) -> None:
        super().__init__(states)
        self._proxy = proxy
        self.written: List[str] = []

    def __getitem__(self, name: str) -> Any:
        own = super().__getitem__(name)
        if own is None or name in self.written:
            return own
        return getattr(self._proxy, _first_name(module_of(self._proxy), name))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.written.append(name)


def _first_name(module: nn.Module, name: str) -> str:
    """The name under which a proxy knows the parameter or buffer that is called ``name`` too."""
    for states in (module._parameters, module._buffers):
        tensor = states.get(name)
        if tensor is not None:
            return next(first for first, each in states.items() if each is tensor)
    return name


class _Traced:
    """What a module does differently while it stands in for its proxy."""

    _origin: nn.Module
    _proxy: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # type: ignore[attr-defined]

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_parameters(self._proxy, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_parameters(self._proxy, "", recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_buffers(self._proxy, prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_buffers(self._proxy, "", recurse))


class _Answers:
    """What the proxy of a module answers as the module does; its tensors are lazy."""

    def __getattr__(self, name: str) -> Any:
        proxys: Any = super()
        return proxys.__getattr__(_first_name(module_of(self), name))

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_parameters(self, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_parameters(self, "", recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_buffers(self, prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_buffers(self, "", recurse))


def _lazy_parameters(proxy: Any, prefix: str, recurse: bool) -> Iterator[Any]:
    """``named_parameters`` of the module behind ``proxy``, each with its lazy tensor."""
    return _lazily(proxy, prefix, module_of(proxy).named_parameters(prefix="", recurse=recurse))


def _lazy_buffers(proxy: Any, prefix: str, recurse: bool) -> Iterator[Any]:
    return _lazily(proxy, prefix, module_of(proxy).named_buffers(prefix="", recurse=recurse))


def _lazily(proxy: Any, prefix: str, named: Iterator[Any]) -> Iterator[Any]:
    for name, _ in named:
        lazy = functools.reduce(getattr, name.split("."), proxy)
        yield (f"{prefix}.{name}" if prefix else name), lazy


class _AnswersOfList(_Answers):
    """The same of a ``ParameterList``, which can be gone through."""

    def __iter__(self) -> Iterator[Any]:
        values: Any = self
        return (values[index] for index in range(len(values)))


def _always(value: Any) -> property:
    return property(lambda self: value)


_CLASS: Any = object.__dict__["__class__"]  # sets an object's class, whatever it calls its own


@contextlib.contextmanager
def answering_as_modules(proxy: Any) -> Iterator[None]:
    """While tracing, let the proxies within ``proxy`` pass for instances of their modules' classes.

    ``isinstance(self.layer, nn.Linear)`` would be False in a graph, without a word.
    """
    proxies = [(each, type(each)) for each in proxy.modules()]
    for each, kind in proxies:
        cls = type(module_of(each))
        answers = _AnswersOfList if isinstance(each, ProxyParameterList) else _Answers
        _CLASS.__set__(each, type(cls.__name__, (answers, kind), {"__class__": _always(cls)}))
    try:
        yield
    finally:
        for each, kind in proxies:
            _CLASS.__set__(each, kind)


def instance_in_trace(proxy: Any) -> Any:
    """An instance of the class of the module behind ``proxy``, to be used while tracing.

    Its submodules are proxies and its parameters and buffers lazy tensors, as the proxy's
    are; but being an instance, its methods may call ``super()``, which a proxy's cannot.
    """
    origin = module_of(proxy)
    cls = type(origin)
    traced: Any = object.__new__(type(cls.__name__, (_Traced, cls), {"__module__": cls.__module__}))
    traced.__dict__.update(origin.__dict__)
    traced.__dict__.update(
        _origin=origin,
        _proxy=proxy,
        _parameters=_LazyStates(origin._parameters, proxy),
        _buffers=_LazyStates(origin._buffers, proxy),
        _modules=dict(proxy._modules),
    )
    return traced


def stands_for(module: Any) -> Any:
    """The module that an :func:`instance_in_trace` stands for; any other one itself."""
    return vars(module)["_origin"] if isinstance(module, _Traced) else module


def assignments_in_trace(traced: Any) -> List[str]:
    """The attributes set on what :func:`instance_in_trace` returned that are not written back."""
    module = traced.__dict__["_origin"]
    origin = module.__dict__
    apart = ("_origin", "_proxy", "_parameters", "_buffers", "_modules")
    changed = [
        name
        for name, value in traced.__dict__.items()
        if name not in apart and (name not in origin or origin[name] is not value)
    ]
    buffers = dict.fromkeys(traced._buffers.written)
    changed += [n for n in buffers if not replaces_buffer(module, n, traced._buffers.get(n))]
    return [*changed, *traced._parameters.written]


def replaces_buffer(module: nn.Module, name: str, value: Any) -> bool:
    """True where ``value`` can be written into the buffer of ``module`` that it is set as."""
    buffer = module._buffers.get(name)
    if buffer is None or not isinstance(value, flow.Tensor):
        return False
    return bool(value.shape == buffer.shape and value.dtype == buffer.dtype)


@contextlib.contextmanager
def checkpointing_nothing() -> Iterator[None]:
    """In the block, let ``oneflow.utils.checkpoint`` call its function as it is.

    It saves memory by computing a part again in backward, which no graph can trace; the numbers
    are the same.
    """
    own = checkpoint._checkpoint_without_reentrant
    checkpoint._checkpoint_without_reentrant = lambda function, *args: function(*args)
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant = own


class _Warnings(ModuleType):
    """Python's ``warnings`` to OneFlow's file of ``nn.Module``, but for one message."""

    def warn(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Warn at the same line of that file as if it had called Python's own."""
        if not str(message).endswith(
            " is called in a nn.Graph, but not registered into a nn.Graph."
        ):
            kwargs.setdefault("stacklevel", 2)
            warnings.warn(message, *args, **kwargs)


@contextlib.contextmanager
def calling_any_module() -> Iterator[None]:
    """In the block, OneFlow does not warn that a module which is traced is no part of the graph.

    ``flow.ones``, ``flow.zeros`` and ``flow.full`` are such modules, and so is a loss that a step
    makes. Of what one with parameters has besides, whoever traces the step tells in its own words.
    The filters of ``warnings`` are the user's.
    """
    module_file.warnings = _Warnings("warnings")
    try:
        yield
    finally:
        module_file.warnings = warnings  # and not what was there, where threads trace at once


def outside_the_trace() -> ContextManager[None]:
    """A block whose operations are eager, in the middle of a trace."""
    guard: ContextManager[None] = graph_build_util.lazy_mode.guard(False)
    return guard


def identity(tensor: Any) -> Any:
    """The same values as another tensor of the graph being traced."""
    return flow._C.identity(tensor)
