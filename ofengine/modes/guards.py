"""Guards: what a trace read is watched, so that no compiled step keeps a value of yesterday.

While a step is traced, each attribute that is read of a module is noted, with what it was; so are
the parameters, buffers and submodules that there are, the options of the groups that the step
updates with, and what the user's functions read by name: globals, closures, defaults, attributes of
classes and modules. Afterwards a write to one of these is told by a barrier in the classes
themselves, at no cost for a step; only what can change without a write to a module (a dict, a list,
an object or a class of the user's, a global) is looked at before each run.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import sys
import types
import weakref
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.barriers import STRUCTURE, Barrier, telling_reads
from ofengine._oneflow.tracing import stands_for
from ofengine.modes.photo import Film, Slots, difference, photo
from ofengine.modes.reach import own_classes, reached, space_of, value_at

_OWN_NAMES = frozenset({*vars(nn.Module()), "_trainer", "_origin", "_proxy"} - {"training"})
"""Names that nn.Module or the engine read all the time."""
_RATE_KEYS = ("lr", "initial_lr", "lr_scale", "lr_decay_scale", "name")
"""Options that the rate plan watches, or that no step reads."""
_VERSION_AT = 24
"""Where a dict of CPython 3.8 to 3.10 keeps the version that each change of it makes new (PEP 509):
behind the reference count, the type and the number of entries."""
_HAS_VERSIONS = sys.implementation.name == "cpython" and sys.version_info[:2] <= (3, 10)


class Watch:
    """What one trace read, and whether it still is so.

    Args:
        task: its modules' parameters, buffers and submodules are watched by themselves.
        reads: the attributes that the trace read, by module.
        groups: options of the parameter groups that the step updates with.
    """

    def __init__(
        self, task: nn.Module, reads: Dict[int, Tuple[Any, Set[str]]], groups: Sequence[Any]
    ) -> None:
        self._names = {id(module): name for name, module in task.named_modules()}
        self._groups = [group.options for group in groups]
        self._cells: List[Any] = []
        self._versions: List[int] = []
        self._slow: List[Tuple[Any, Any]] = []
        self._before: Dict[Tuple[int, str], Tuple[Any, str, Any]] = {}
        self._called_so: Dict[Tuple[int, str], str] = {}
        self._within: Dict[Tuple[int, str], List[Any]] = {}
        """What can change in place, by the place that it was found at."""
        self._structures: Dict[int, Tuple[Any, Dict[Any, int]]] = {}
        self._spaces: Dict[int, Tuple[Any, Set[Tuple[int, str]]]] = {}
        """The dicts of modules and classes and the cells that hold places, with these."""
        film = Film()
        self._modules = reads.values()
        for module in task.modules():
            inside = {*module._parameters, *module._buffers, *module._modules}
            reads.setdefault(id(module), (module, set()))[1].update(inside)
            film.meet(module)
        for module, names in reads.values():
            for name in names:
                self._note(module, name, film)
            self._structures[id(module)] = (module, _structure(module))
        asked = frozenset(name for _, names in reads.values() for name in names)
        for called, holder, name, _ in reached(film, asked):
            self._note(holder, name, film, called)
            is_class = isinstance(holder, type)
            spaces = map(space_of, own_classes(holder)) if is_class else [holder]
            for each in spaces:
                if not isinstance(each, types.FunctionType):
                    self._spaces.setdefault(id(each), (each, set()))[1].add((id(holder), name))
        self._option_photo = self._photo_of_groups()
        self._held = film.held
        self._keep()

    def _note(self, holder: Any, name: str, film: Film, called: str = "") -> None:
        place, start = (id(holder), name), len(film.changeable)
        self._before[place] = (holder, name, photo(value_at(holder, name), film))
        self._within[place] = film.changeable[start:]
        self._called_so[place] = called

    def modules(self) -> Iterator[Tuple[Any, Set[str]]]:
        """The modules, and the names of their attributes that matter."""
        return iter(self._modules)

    def tensors(self, task: nn.Module) -> List[Any]:
        """The tensors that the trace read and that are not the task's parameters or buffers.

        Their lazy gradients, which the trace has left, are let go.
        """
        own = {id(each) for each in (*task.parameters(), *task.buffers())}
        found = {id(t): t for t in self._held if isinstance(t, flow.Tensor) and id(t) not in own}
        eager = [each for each in found.values() if not each.is_lazy]
        for each in eager:
            if each.is_leaf and each.grad is not None and each.grad.is_lazy:
                each.grad = None
        return eager

    @property
    def looks(self) -> bool:
        """True where something is to be looked at before each run."""
        return bool(self._cells or self._slow)

    def may_differ(self) -> bool:
        """True where something was changed in place that cannot tell so."""
        versions = [cell.value for cell in self._cells]
        if versions != self._versions and not self._stands(versions):
            return True
        return any(_quick(each) != before for each, before in self._slow)

    def _stands(self, versions: List[int]) -> bool:
        """True where all that was written are other names of a module, or of a class."""
        places: Set[Tuple[int, str]] = set()
        for each, now, before in zip(self._dicts, versions, self._versions):
            if now != before:
                if id(each) not in self._spaces:
                    return False
                places |= self._spaces[id(each)][1]
        if self.changed(places) is not None:
            return False
        self._versions = [cell.value for cell in self._cells]
        return True

    def changed(self, places: Optional[Set[Tuple[int, str]]] = None) -> Optional[str]:
        """What differs from the trace, as a user would write it; None where nothing does.

        ``places``: only look at these attributes, and at the groups.
        """
        looked = self._before if places is None else [p for p in places if p in self._before]
        film = Film()
        for place in looked:
            holder, name, before = self._before[place]
            start = len(film.changeable)
            after = photo(value_at(holder, name), film)
            if after != before:
                return difference(self._called(holder, name), before, after)
            self._within[place] = film.changeable[start:]  # a list may be another equal one
        asked = self._structures if places is None else [i for i, n in places if n == STRUCTURE]
        for key in asked:
            module, held = self._structures.get(key, (None, {}))
            if module is not None and _structure(module) != held:
                (_, name), _ = min({*held.items()} ^ {*_structure(module).items()})
                return self._called(module, name)
        if self._photo_of_groups() != self._option_photo:
            return self._changed_option()
        if places is None or any(_key(each) not in self._known for each in film.changeable):
            self._keep()
        return None

    def _keep(self) -> None:
        """Look before each run at what can change in place, and at what holds places."""
        spaces = [space for space, _ in self._spaces.values()]
        within = [each for changeable in self._within.values() for each in changeable]
        self._known = {_key(each): each for each in (*spaces, *within)}
        self._note_versions()

    def _called(self, holder: Any, name: str) -> str:
        called = self._called_so.get((id(holder), name))
        if called:
            return called
        path = self._names.get(id(holder))
        if path is None:
            return name
        return ".".join(filter(None, ["self", path, name]))

    def _photo_of_groups(self) -> List[Any]:
        return [
            {key: photo(each, Film()) for key, each in options.items() if key not in _RATE_KEYS}
            for options in self._groups
        ]

    def _changed_option(self) -> str:
        for index, (before, after) in enumerate(zip(self._option_photo, self._photo_of_groups())):
            for key in {*before, *after}:
                if before.get(key) != after.get(key):
                    return f"optimizer.param_groups[{index}][{key!r}]"
        return "optimizer.param_groups"

    def _note_versions(self) -> None:
        kept = self._known.values()
        self._dicts = [each for each in kept if _HAS_VERSIONS and isinstance(each, dict)]
        self._cells = [ctypes.c_uint64.from_address(id(each) + _VERSION_AT) for each in self._dicts]
        self._versions = [cell.value for cell in self._cells]
        known = {id(each) for each in self._dicts}
        self._slow = [(each, _quick(each)) for each in kept if id(each) not in known]


class Guards:
    """The watches of one mode's compiled steps, over one barrier."""

    def __init__(self) -> None:
        self.barrier = Barrier()
        self._reads: Dict[int, Tuple[Any, Set[str]]] = {}
        self._is_property: Dict[Tuple[type, str], bool] = {}
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Note what is read of modules in the block, which traces one graph."""
        self._reads, self._is_property = {}, {}
        with telling_reads(self._tell):
            yield

    def has_read(self, module: nn.Module, name: str) -> bool:
        """True where the trace going on has read this attribute."""
        return name in self._reads.get(id(module), (module, ()))[1]

    def watch(self, task: nn.Module, groups: Sequence[Any] = ()) -> Watch:
        """Watch what the last block read."""
        watch = Watch(task, self._reads, groups)
        for module, names in watch.modules():
            self.barrier.watch(module, {*names, STRUCTURE})
        self.barrier.listen_to([*task.parameters(), *task.buffers(), *watch.tensors(task)])
        self._reads = {}
        self._watches.add(watch)
        return watch

    def what_was_written(self, task: nn.Module, tensors: Dict[int, str]) -> Tuple[List[str], str]:
        """What the written ``tensors`` make of compiled steps.

        Returns:
            the parameters and buffers that have other memory, and what is another, as a user would
            write it; nothing where the steps stand.
        """
        own = {id(each): name for name, each in (*task.named_parameters(), *task.named_buffers())}
        held = {id(each) for watch in self._watches for each in watch.tensors(task)}
        others = [i for i, what in tensors.items() if what == "data" and i in held]
        replaced = [own[i] for i, what in tensors.items() if what == "data" and i in own]
        names = [f"self.{name}.data" for name in replaced]
        names += [f"self.{own[i]}'s hook" for i, w in tensors.items() if w == "hook" and i in own]
        names += ["the data of a tensor beside the task"] if others else []
        return replaced, names[0] if names else ""

    def _tell(self, module: Any, name: str) -> None:
        if name in _OWN_NAMES or name.startswith("__"):
            return
        place = type(module), name
        if place not in self._is_property:
            found = inspect.getattr_static(*place, None)
            self._is_property[place] = isinstance(found, property)
        if self._is_property[place]:
            return  # what it reads is told by itself
        module = stands_for(module)
        self._reads.setdefault(id(module), (module, set()))[1].add(name)


def _key(changeable: Any) -> Tuple[Any, ...]:
    """Tells one thing that can change from another."""
    if isinstance(changeable, Slots):
        return "slots", id(changeable.of)
    return (id(changeable),)


def _structure(module: nn.Module) -> Dict[Any, int]:
    """Which layers, parameters, buffers and hooks a module holds."""
    own = vars(module)
    return {
        (kind, str(name)): id(value)
        for kind in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
        for name, value in own.get(kind, {}).items()
    }


def _quick(container: Any) -> Any:
    """What is cheap to compare of a container without a version."""
    if isinstance(container, np.ndarray):
        return container.tobytes() if container.size <= 1_000 else None
    if isinstance(container, types.CellType):
        return id(value_at(container, ""))
    if isinstance(container, (dict, Slots)):
        return [(key, id(each)) for key, each in container.items()]
    return len(container), [id(each) for each in itertools.islice(container, 1_000)]
