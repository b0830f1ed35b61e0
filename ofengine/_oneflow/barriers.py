"""Told of what is read of modules while a trace runs, and of what is written into them later.

OneFlow's classes take other methods at run time; these are put in while somebody listens, and
taken out again with the last listener.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.framework.graph_build_util import lazy_mode
from oneflow.optim.optimizer import ParamGroup

from ofengine._oneflow.watched_options import Mark

_requires_grad_ = flow.Tensor.requires_grad_
_requires_grad = flow.Tensor.__dict__["requires_grad"]
_data = flow.Tensor.__dict__["data"]
_register_hook = flow.Tensor.register_hook
_grad = flow.Tensor.__dict__["grad"]
_backwards = flow.Tensor.backward, flow.autograd.backward
_set_option = ParamGroup.__setitem__
_marks = Mark.note, Mark.note_all

put_gradient = _grad.__set__
"""``put_gradient(parameter, gradient)`` sets a ``.grad`` and tells nobody: the engine's own."""

STRUCTURE = "_modules"
"""By this name a module's layers, parameters, buffers and hooks are watched as a whole."""
_DICTS = (nn.ModuleDict, nn.ParameterDict)
_CHANGES: Tuple[Tuple[Any, str], ...] = (
    *((nn.Module, f"register_{what}") for what in ("buffer", "parameter")),
    *((nn.Module, f"register_{what}") for what in ("forward_hook", "forward_pre_hook")),
    (nn.Module, "add_module"), (nn.ModuleList, "insert"),
    *((cls, name) for name in ("__delitem__", "clear") for cls in _DICTS),
)  # fmt: skip
"""The methods that change what a module holds without setting an attribute."""


class Barrier:
    """Notes writes, while it is on: to attributes and tensors that are watched, and to groups."""

    def __init__(self) -> None:
        self.watched: Dict[int, Set[str]] = {}
        """The names of attributes that matter, by the ``id`` of their module."""
        self.written: Set[Tuple[int, str]] = set()
        """Those that were written since somebody looked."""
        self.tensors: Dict[int, str] = {}
        """What of a tensor was written, "requires_grad", "data" or "hook", by its ``id``."""
        self.hit = False
        """True where anything was written since somebody looked."""

    def turn_on(self, model: nn.Module) -> None:
        """Listen from now on, to ``model``'s tensors and to modules of its classes."""
        self._listen_to(model)
        if not _barriers:
            _put_in()
        _barriers.append(self)

    def watch(self, module: nn.Module, names: Set[str]) -> None:
        """Let writes to these attributes of ``module`` count."""
        _put_into_class(type(module))
        self.watched.setdefault(id(module), set()).update(names)

    def _listen_to(self, model: nn.Module) -> None:
        self.listen_to((*model.parameters(), *model.buffers()))

    def listen_to(self, tensors: Iterable[Any]) -> None:
        """Let what is written into the attributes of these tensors count."""
        _tensors.update(map(id, tensors))

    def turn_off(self) -> None:
        """Listen no more."""
        if self in _barriers:
            _barriers.remove(self)
            if not _barriers:
                _take_out()

    def take(self) -> Tuple[Set[Tuple[int, str]], Dict[int, str]]:
        """(attributes, tensors) that were written; begin anew."""
        found = self.written, self.tensors
        self.written, self.tensors, self.hit = set(), {}, False
        return found


_barriers: List[Barrier] = []
_tensors: Set[int] = set()
"""The ``id`` of each tensor that is listened to: oneflow.ones and its like write into theirs."""
_methods: List[Tuple[Any, str, Any]] = []
"""The methods that tell of what they change, and what was there before: (class, name, method)."""
_classes: Dict[type, Tuple[Any, Any]] = {}
"""The classes that tell of writes, and what they had of their own before."""


def _put_into_class(cls: Any) -> None:
    """Let instances of ``cls`` tell of writes; OneFlow makes modules for many an operation."""
    if cls in _classes:
        return
    own = cls.__dict__.get("__setattr__"), cls.__dict__.get("__delattr__")

    def set_attribute(module: Any, name: str, value: Any) -> None:
        (own[0] or _inherited(cls, "__setattr__"))(module, name, value)
        _note(module, name)
        if isinstance(value, (nn.Module, nn.Parameter)):
            _note(module, STRUCTURE)

    def delete_attribute(module: Any, name: str) -> None:
        (own[1] or _inherited(cls, "__delattr__"))(module, name)
        _note(module, name)

    _classes[cls] = own
    cls.__setattr__, cls.__delattr__ = set_attribute, delete_attribute


def _inherited(cls: Any, name: str) -> Any:
    return next(vars(each)[name] for each in cls.__mro__[1:] if name in vars(each))


def _note(module: nn.Module, name: str) -> None:
    for barrier in _barriers:
        names = barrier.watched.get(id(module))
        if names is not None and name in names:
            barrier.written.add((id(module), name))
            barrier.hit = True


def _note_tensor(tensor: Any, what: str) -> None:
    for barrier in _barriers:
        barrier.tensors[id(tensor)] = what
        barrier.hit = True


def _put_in() -> None:
    def requires_grad_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if id(tensor) in _tensors:
            _note_tensor(tensor, "requires_grad")
        return _requires_grad_(tensor, *args, **kwargs)

    def set_requires_grad(tensor: Any, value: bool) -> None:
        if id(tensor) in _tensors:
            _note_tensor(tensor, "requires_grad")
        _requires_grad.__set__(tensor, value)

    def set_data(tensor: Any, value: Any) -> None:
        if id(tensor) in _tensors:
            _note_tensor(tensor, "data")
        _data.__set__(tensor, value)

    def register_hook(tensor: Any, hook: Any) -> Any:
        if id(tensor) in _tensors and not lazy_mode.is_enabled():
            _note_tensor(tensor, "hook")
        return _register_hook(tensor, hook)

    def hit(*_: Any) -> None:
        for barrier in _barriers:
            barrier.hit = True

    def set_option(group: Any, key: str, value: Any) -> None:
        _set_option(group, key, value)
        hit()

    def set_gradient(tensor: Any, value: Any) -> None:
        _grad.__set__(tensor, value)
        hit()

    flow.Tensor.grad = property(_grad.__get__, set_gradient)
    flow.Tensor.backward, flow.autograd.backward = (_then(each, hit) for each in _backwards)
    flow.Tensor.requires_grad_ = requires_grad_
    flow.Tensor.requires_grad = property(_requires_grad.__get__, set_requires_grad)
    flow.Tensor.data = property(_data.__get__, set_data)
    flow.Tensor.register_hook = register_hook
    ParamGroup.__setitem__ = set_option
    Mark.note, Mark.note_all = _then(Mark.note, hit), _then(Mark.note_all, hit)  # type: ignore
    for cls, name in _CHANGES:
        _methods.append((cls, name, vars(cls).get(name)))
        setattr(cls, name, _telling(getattr(cls, name)))


def _telling(method: Any) -> Any:
    """A method of a module that changes what the module holds, and tells so."""

    @functools.wraps(method)
    def told(module: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(module, *args, **kwargs)
        _note(module, STRUCTURE)
        return result

    return told


def _take_out() -> None:
    for cls, own in _classes.items():
        for name, method in zip(("__setattr__", "__delattr__"), own):
            if method is None:
                delattr(cls, name)
            else:
                setattr(cls, name, method)
    for cls, name, method in _methods:
        if method is None:
            delattr(cls, name)
        else:
            setattr(cls, name, method)
    _methods.clear()
    _classes.clear()
    _tensors.clear()
    flow.Tensor.requires_grad_ = _requires_grad_
    flow.Tensor.requires_grad = _requires_grad
    flow.Tensor.data = _data
    flow.Tensor.register_hook = _register_hook
    flow.Tensor.grad = _grad
    flow.Tensor.backward, flow.autograd.backward = _backwards
    ParamGroup.__setitem__ = _set_option
    Mark.note, Mark.note_all = _marks  # type: ignore


def _then(method: Callable[..., None], hit: Callable[[], None]) -> Callable[..., None]:
    def told(*args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        hit()

    return told


@contextlib.contextmanager
def telling_reads(tell: Callable[[Any, str], None]) -> Iterator[None]:
    """In the block, call ``tell(module, name)`` for each attribute that is read of a module."""

    def get_attribute(module: Any, name: str) -> Any:
        tell(module, name)
        return object.__getattribute__(module, name)

    before = nn.Module.__dict__.get("__getattribute__")
    nn.Module.__getattribute__ = get_attribute
    try:
        yield
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = before
