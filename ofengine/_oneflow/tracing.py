"""Modules inside a trace: proxies that answer as their modules do, lazy parameters, assignments."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, ContextManager, Dict, Iterator, List

import oneflow as flow
from oneflow import nn
from oneflow.framework import graph_build_util
from oneflow.nn.graph.proxy import Proxy, ProxyParameterList
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


class _LazyStates(Dict[str, Any]):
    """A module's own parameters or buffers, by name; in a trace their lazy tensors."""

    def __init__(self, states: Dict[str, Any], proxy: Any) -> None:
        super().__init__(states)
        self._proxy = proxy
        self.written: List[str] = []

    def __getitem__(self, name: str) -> Any:
        return None if super().__getitem__(name) is None else getattr(self._proxy, name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.written.append(name)


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


class _Answers:
    """What the proxy of a module answers as the module does; its parameters are lazy tensors."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_parameters(self, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_parameters(self, "", recurse))


def _lazy_parameters(proxy: Any, prefix: str, recurse: bool) -> Iterator[Any]:
    """``named_parameters`` of the module behind ``proxy``, each with its lazy tensor."""
    for name, _ in module_of(proxy).named_parameters(prefix="", recurse=recurse):
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
    """The attributes that were set on what :func:`instance_in_trace` returned."""
    origin = traced.__dict__["_origin"].__dict__
    apart = ("_origin", "_proxy", "_parameters", "_buffers", "_modules")
    changed = [
        name
        for name, value in traced.__dict__.items()
        if name not in apart and (name not in origin or origin[name] is not value)
    ]
    return [*changed, *traced._parameters.written, *traced._buffers.written]


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


def outside_the_trace() -> ContextManager[None]:
    """A block whose operations are eager, in the middle of a trace."""
    guard: ContextManager[None] = graph_build_util.lazy_mode.guard(False)
    return guard


def identity(tensor: Any) -> Any:
    """The same values as another tensor of the graph being traced."""
    return flow._C.identity(tensor)
