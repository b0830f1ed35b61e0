"""Told of what a traced step sets on the task and on the modules in it, where nobody keeps it."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator

from oneflow import nn
from oneflow.nn.graph.proxy import ProxyModule

from ofengine._oneflow.tracing import module_of, stands_for


@contextlib.contextmanager
def telling_assignments(tell: Callable[[Any, str, Any], None]) -> Iterator[None]:
    """In the block, call ``tell(module, name, value)`` for each attribute set in a trace.

    ``module`` is the real one. What is set on modules that the step itself makes is not told.
    """
    of_modules, of_proxies = nn.Module.__setattr__, ProxyModule.__setattr__

    def set_on_module(module: Any, name: str, value: Any) -> None:
        origin = stands_for(module)
        if origin is not module:
            tell(origin, name, value)
        of_modules(module, name, value)

    def set_on_proxy(proxy: Any, name: str, value: Any) -> None:
        tell(module_of(proxy), name, value)
        of_proxies(proxy, name, value)

    nn.Module.__setattr__, ProxyModule.__setattr__ = set_on_module, set_on_proxy
    try:
        yield
    finally:
        nn.Module.__setattr__, ProxyModule.__setattr__ = of_modules, of_proxies
