"""Arguments of classes: their type hints as people say them, which are missing, which are meant."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import typing
from pathlib import Path, PurePath
from typing import Any, Container, Iterable, List, Type, Union

_WORDS = {
    int: ("a whole number", "INT"),
    float: ("a number", "FLOAT"),
    bool: ("true or false", "BOOL"),
    str: ("a text", "TEXT"),
    type(None): ("null", "null"),
    Path: ("a path", "PATH"),
    list: ("a list", "LIST"),
    tuple: ("a list", "LIST"),
    set: ("a list", "LIST"),
    dict: ("names and values", "DICT"),
}


def hint_of(cls: Type[Any], argument: str) -> Any:
    """The type hint of an argument of ``cls``, which may be one that a base takes; else ``Any``.

    ``options.lr`` is the argument ``lr`` of the class that the argument ``options`` is of.
    """
    argument, _, rest = argument.partition(".")
    for owner in cls.__mro__:
        method = owner.__dict__.get("__init__")
        parameter = inspect.signature(method).parameters.get(argument) if method else None
        if method is None or parameter is None or parameter.annotation is parameter.empty:
            continue
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = typing.get_type_hints(_Alone(argument, hint), method.__globals__)[argument]
            except Exception:  # a name that only a type checker knows
                return Any
        return hint_of(hint, rest) if rest and isinstance(hint, type) else hint
    return Any


def incomparable_of(cls: Type[Any]) -> List[str]:
    """The arguments of ``cls``, or of what it hands them to, whose defaults are tensors or arrays.

    These cannot be compared with anything, as jsonargparse does.
    """
    found = []
    for owner in cls.__mro__:
        method = owner.__dict__.get("__init__")
        for name, parameter in inspect.signature(method).parameters.items() if method else ():
            try:
                bool(parameter.default == parameter.empty)
            except Exception:
                found.append(name)
    return found


class _Alone:
    """Something with a single annotation, which others that cannot be resolved do not disturb."""

    def __init__(self, name: str, annotation: str) -> None:
        self.__annotations__ = {name: annotation}


def default_of(cls: Type[Any], argument: str) -> Any:
    """The default of an argument of ``cls``, which may be one that a base takes."""
    for owner in cls.__mro__:
        method = owner.__dict__.get("__init__")
        parameter = inspect.signature(method).parameters.get(argument) if method else None
        if parameter is not None:
            return parameter.default
    return inspect.Parameter.empty


def can_be_written(value: Any) -> bool:
    """True for what a config file can hold: plain values, and what jsonargparse makes of such."""
    if isinstance(value, dict):
        return all(can_be_written(each) for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple, set)):
        return all(can_be_written(each) for each in value)
    plain = type(value) in (bool, int, float, str, type(None))
    return plain or isinstance(value, (enum.Enum, PurePath)) or dataclasses.is_dataclass(value)


def missing_of(cls: Type[Any], given: Container[str]) -> List[str]:
    """The arguments of ``cls`` that have no default and are not ``given``."""
    return [
        name
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
    ]


def nearest(name: str, known: Iterable[str], section: str = "") -> str:
    """What ``name`` may have been meant to be, as the end of a sentence."""
    names = {each: f"{section}.{each}" if section else each for each in known}
    within = [each for each in names if each.rpartition(".")[2] == name]
    close = within or difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {names[close[0]]}?"
    if not names:
        return "it takes none."
    return "see --help." if len(names) > 12 else f"use one of {', '.join(names.values())}."


def in_words(hint: Any) -> str:
    """What a value of this type is: "a whole number or null"."""
    return " or ".join(dict.fromkeys(_each(hint, 0))) or "a value"


def in_a_word(hint: Any) -> str:
    """The same as a placeholder in a help text: "INT or null"."""
    return "|".join(dict.fromkeys(_each(hint, 1))) or "VALUE"


def _each(hint: Any, short: int) -> List[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union:
        return [word for each in arguments for word in _each(each, short)]
    if origin is typing.Literal:
        return [str(each) if short else repr(each) for each in arguments]
    if hint in _WORDS:
        return [_WORDS[hint][short]]
    if not isinstance(origin or hint, type):
        return []
    kind = origin or hint
    if issubclass(kind, enum.Enum):
        return [member.name if short else repr(member.name) for member in kind]
    if issubclass(kind, dict) or kind.__name__ == "Mapping":
        inside = in_words(arguments[1]) if arguments else "a value"
        return ["DICT" if short else f"a dict such as {{a: 1}} of which each value is {inside}"]
    if issubclass(kind, tuple) and arguments and Ellipsis not in arguments:
        inside = ", ".join(in_words(each) for each in arguments)
        return ["LIST" if short else f"a list of {len(arguments)}: {inside}"]
    if issubclass(kind, (list, tuple, set)) or kind.__name__ in ("Sequence", "Iterable"):
        inside = in_words(arguments[0]) if arguments else "a value"
        return ["LIST" if short else f"a list of which each is {inside}"]
    if kind.__module__ in ("builtins", "datetime", "decimal", "uuid"):
        return [kind.__name__.upper() if short else f"a {kind.__name__}"]
    return [kind.__name__.upper() if short else f"class_path and init_args of a {kind.__name__}"]
