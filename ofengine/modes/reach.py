"""The user's own code that a step can come to, and what that code reads and sets by name.

It is found by walking: from the methods of the task and of its layers to what these name, to the
classes of the objects that they hold, and on. A hook that no step names is not among it.
"""

from __future__ import annotations

import dis
import functools
import gc
import types
from typing import Any, Dict, FrozenSet, Iterator, List, Set, Tuple

from oneflow import nn

from ofengine.modes.photo import Film
from ofengine.modes.users import is_users

Place = Tuple[str, Any, str, Any]
"""What the user calls it; who holds it, a dict, class, cell or function; its name; its value."""
_MOST_FUNCTIONS = 2_000
_IMPLIED = frozenset({"forward", "backward"})
"""Methods that OneFlow calls."""


class Names:
    """What the code of a function names, that of functions within it too."""

    def __init__(self, code: types.CodeType) -> None:
        inside = [each for each in code.co_consts if isinstance(each, types.CodeType)]
        self.attributes: Set[str] = set(code.co_names)
        self.globals: Set[str] = set()
        self.set_globals: Set[str] = set()
        self.set_free: Set[str] = set()
        self.set_attributes: Set[str] = set()
        for each in dis.get_instructions(code):
            name, operation = each.argval, each.opname
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.globals.add(name)
            elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self.set_globals.add(name)
            elif operation in ("STORE_DEREF", "DELETE_DEREF"):
                self.set_free.add(name)
            elif operation in ("STORE_ATTR", "DELETE_ATTR"):
                self.set_attributes.add(name)
        for other in map(names_of, inside):
            for mine, its in zip(vars(self).values(), vars(other).values()):
                mine |= its


@functools.lru_cache(maxsize=4_096)
def names_of(code: types.CodeType) -> Names:
    """The :class:`Names` of ``code``."""
    return Names(code)


def reached(film: Film, names: FrozenSet[str] = _IMPLIED) -> Iterator[Place]:
    """Places that the user's code reads by a global's name, in a closure, or off a class or module.

    Args:
        film: of what the task holds. Functions, classes and modules are looked up as they are met;
            whoever takes a photograph of each value into it, sends the walk on to what that holds.
        names: attributes that are asked for anyway.
    """
    walk = _Walk(film, {*names, *_IMPLIED})
    while walk.goes_on():
        yield from walk.of_functions()
        yield from walk.of_holders()


class _Walk:
    def __init__(self, film: Film, names: Set[str]) -> None:
        self._film, self._names = film, names
        self._functions: Dict[int, Any] = {}
        self._seen: Set[Tuple[int, str]] = set()
        self._before: Tuple[int, ...] = ()

    def goes_on(self) -> bool:
        film = self._film
        now = len(film.functions), len(film.classes), len(film.modules), len(self._names)
        before, self._before = self._before, now
        return now != before and len(self._functions) < _MOST_FUNCTIONS

    def _is_new(self, holder: Any, name: str) -> bool:
        place = id(holder), name
        new = place not in self._seen
        self._seen.add(place)
        return new

    def of_functions(self) -> Iterator[Place]:
        for function in list(self._film.functions):
            if id(function) in self._functions:
                continue
            self._functions[id(function)] = function
            named = names_of(function.__code__)
            self._names |= named.attributes
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
                value = value_at(cell, name)
                if name != "__class__" and self._is_new(cell, "") and self._asks(value):
                    yield name, cell, name, value
            for name in ("__defaults__", "__kwdefaults__"):
                if getattr(function, name):
                    yield f"{function.__name__}.{name}", function, name, getattr(function, name)
            space = function.__globals__
            for name in named.globals:
                if name in space and self._is_new(space, name) and self._asks(space[name]):
                    yield name, space, name, space[name]

    def _asks(self, value: Any) -> bool:
        """False for what is not set anew as a rule: a module, a class, a function of others."""
        if isinstance(value, (types.ModuleType, type)):
            self._film.meet(value)
            return False
        if isinstance(value, types.FunctionType):
            return is_users(value)
        of_object = not isinstance(getattr(value, "__self__", None), (types.ModuleType, type(None)))
        return of_object or not isinstance(value, types.BuiltinFunctionType)

    def of_holders(self) -> Iterator[Place]:
        for holder in (*self._film.classes.values(), *self._film.modules.values()):
            for name in self._named_in(holder):
                if self._is_new(holder, name):
                    yield from self._off(holder, name)
        for function in list(self._functions.values()):
            own = vars(function)
            for name in self._names & own.keys():
                if self._is_new(own, name):
                    yield f"{function.__name__}.{name}", own, name, own[name]

    def _named_in(self, holder: Any) -> Set[str]:
        if isinstance(holder, types.ModuleType):
            return self._names & vars(holder).keys()
        found: Set[str] = set()
        for cls in own_classes(holder):
            found |= self._names & vars(cls).keys()
            if not issubclass(holder, nn.Module):
                found |= {each for each in vars(cls) if each.startswith("__")}
        return found

    def _off(self, holder: Any, name: str) -> Iterator[Place]:
        """The value ``name`` of a class or a module, where it is one; its functions are noted."""
        is_class = isinstance(holder, type)
        values = [vars(each)[name] for each in own_classes(holder) if name in vars(each)]
        for value in values if is_class else [vars(holder)[name]]:
            functions = functions_in(value)
            self._film.functions += [each for each in functions if is_users(each)]
            if functions or name.startswith("__") or hasattr(type(value), "__get__"):
                continue
            if self._asks(value):
                space = holder if is_class else vars(holder)
                called = getattr(holder, "__qualname__", holder.__name__).rpartition("<locals>.")[2]
                yield f"{called}.{name}", space, name, value
            return


def own_classes(cls: Any) -> List[type]:
    """``cls`` and its bases, where they are the user's."""
    mro = cls.__mro__ if isinstance(cls, type) else ()
    return [each for each in mro if is_users(each)]


def functions_in(value: Any) -> List[Any]:
    """The function in a method, in a property, in what a decorator of Python's returns."""
    for _ in range(8):
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, (functools.cached_property, functools.partialmethod)):
            value = value.func
        elif type(value).__name__ == "_lru_cache_wrapper":
            value = value.__wrapped__
    return [value] if isinstance(value, types.FunctionType) else []


def space_of(cls: type) -> Dict[str, Any]:
    """The dict itself in which ``cls`` keeps its attributes."""
    (space,) = gc.get_referents(vars(cls))
    found: Dict[str, Any] = space
    return found


def value_at(holder: Any, name: str, missing: Any = None) -> Any:
    """What is at a place now."""
    if isinstance(holder, dict):
        return holder.get(name, missing)
    if isinstance(holder, types.CellType):
        try:
            return holder.cell_contents
        except ValueError:
            return missing
    if isinstance(holder, type):
        spaces = (vars(each) for each in holder.__mro__)
        return next((space[name] for space in spaces if name in space), missing)
    return getattr(holder, name, missing)
