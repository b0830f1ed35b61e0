"""Objects that are described by class_path and init_args, where one of them is no description."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from typing import Any, Dict, Iterator, List, Optional, Type

import jsonargparse

from ofengine.cli.given import Given
from ofengine.cli.hints import hint_of, in_words, missing_of, nearest


def why_not_described(name: str, base: Type[Any], given: Given) -> Optional[str]:
    """What is wrong with the descriptions of objects of ``base`` that ``name`` was given.

    A sentence, or None where nothing is found.
    """
    return next((why for each in _items(name, given) for why in _why_not(each, base)), None)


def _items(name: str, given: Given) -> List[Any]:
    """The descriptions: those of the config file, then those of the options."""
    value = given.values[name].value if name in given.values else None
    items = list(value) if isinstance(value, list) else [] if value is None else [value]
    read = jsonargparse.get_loader("yaml")
    for option, text in given.options:
        if option.rstrip("+") == name:
            told = read(text)
            items = [
                *(items if option.endswith("+") else []),
                *(told if isinstance(told, list) else [told]),
            ]
        elif option.startswith(f"{name}.") and items:
            argument = option[len(name) + 1 :]
            if argument.startswith("init_args."):
                argument = argument[len("init_args.") :]
            last = items[-1] if isinstance(items[-1], dict) else {"class_path": items[-1]}
            arguments = {**(last.get("init_args") or {}), argument: read(text)}
            items[-1] = {**last, "init_args": arguments}
    return items


def _why_not(item: Any, base: Type[Any]) -> Iterator[str]:
    if isinstance(item, bool):
        return
    item = {"class_path": item} if isinstance(item, str) else item
    named = item.get("class_path") if isinstance(item, dict) else None
    if not isinstance(named, str):
        yield f"{item!r} describes no {base.__name__}: write its class_path and its init_args."
        return
    beside = sorted(str(key) for key in set(item) - {"class_path", "init_args"})
    if beside:
        yield f"{named} has {', '.join(beside)} beside init_args: put it into init_args."
    known = {each.__name__: each for each in _subclasses(base)}
    cls = known.get(named) or _imported(named)
    if cls is None:
        yield f"there is no {base.__name__} {named!r}: {nearest(named, known)}"
        return
    if not (isinstance(cls, type) and issubclass(cls, base)):
        yield f"{named} is no {base.__name__}."
        return
    arguments = item.get("init_args") or {}
    if not isinstance(arguments, dict):
        yield f"the init_args of {named} are {arguments!r}: write names and values, name: value."
        return
    yield from _why_no_arguments(named, cls, arguments)


def _why_no_arguments(named: str, cls: Type[Any], arguments: Dict[str, Any]) -> Iterator[str]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", fail_untyped=False)
    own = [each.dest[2:] for each in parser._actions if each.dest.startswith("x.")]
    for argument in arguments:
        if argument not in own:
            yield f"{named} has no argument {argument!r}: {nearest(argument, own)}"
    missing = missing_of(cls, arguments)
    if missing:
        yield f"{named} needs {', '.join(missing)} in its init_args."
    try:
        parser.parse_object({"x": arguments})
    except (argparse.ArgumentError, ValueError) as error:
        found = re.search(r'arser key "x\.(\w+)', str(error))
        if found is not None:
            argument = found.group(1)
            wanted = in_words(hint_of(cls, argument))
            yield f"{named}: {argument} is {arguments.get(argument)!r}: give {wanted}."


def _subclasses(base: Type[Any]) -> Iterator[Type[Any]]:
    for each in base.__subclasses__():
        if not each.__name__.startswith("_") and not inspect.isabstract(each):
            yield each
        yield from _subclasses(each)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None
