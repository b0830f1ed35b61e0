"""An optimizer whose state is elsewhere, and which asks for it where somebody wants to see it."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict

from oneflow.optim import Optimizer

_METHODS = (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__"),
    *("__reduce_ex__", "__repr__", "__setitem__", "clear", "copy", "get", "items", "keys", "pop"),
    *("popitem", "setdefault", "update", "values"),
)


class _Lent(Dict[Any, Any]):
    """Stands where an optimizer's state was; ``ask`` puts that back before the first use."""

    def __init__(self, optimizer: Optimizer, ask: Callable[[], None]) -> None:
        super().__init__()
        self.kept = optimizer._state
        self.optimizer, self.ask = optimizer, ask


def _asking(name: str) -> Callable[..., Any]:
    def method(lent: _Lent, *args: Any) -> Any:
        if lent.optimizer._state is lent:
            lent.ask()
        return getattr(lent.optimizer._state, name)(*args)

    return method


for _name in _METHODS:
    setattr(_Lent, _name, _asking(_name))


def lend_state(optimizer: Optimizer, ask: Callable[[], None]) -> None:
    """Call ``ask``, which calls :func:`take_state_back`, before ``optimizer`` uses its state."""
    if isinstance(optimizer._state, _Lent):
        return
    optimizer._state = _Lent(optimizer, ask)
    load: Any = functools.partial(_load, optimizer)
    optimizer.load_state_dict = load


def take_state_back(optimizer: Optimizer) -> None:
    """Let ``optimizer`` have the state again that it had when it was lent."""
    if isinstance(optimizer._state, _Lent):
        optimizer._state = optimizer._state.kept
        vars(optimizer).pop("load_state_dict", None)


def _load(optimizer: Optimizer, state: Dict[str, Any]) -> None:
    len(optimizer._state)  # asks for it
    type(optimizer).load_state_dict(optimizer, state)
