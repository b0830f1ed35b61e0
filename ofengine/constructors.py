"""Constructors of ofengine's own classes tell an argument that they have not, and what to write.

Python's own ``TypeError`` says no more than that the argument is unexpected.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from types import FunctionType
from typing import Any, Dict, FrozenSet, Type, TypeVar

from ofengine.errors import UnknownArgumentError, quoted
from ofengine.lightning_classes import CLASS_ARGUMENTS

T = TypeVar("T")


def ships(cls: Type[Any]) -> bool:
    """True for a class of ofengine's own."""
    return cls.__module__.startswith("ofengine.")


def tells_unknown_arguments(cls: Type[T]) -> Type[T]:
    """Have ``cls`` raise :class:`UnknownArgumentError` for a keyword that its constructor lacks.

    What subclasses of the user's own take is theirs. Signature, type hints and source stay those
    of the class's own ``__init__``; the globals too, in which type hints are looked up.
    """
    init: Any = vars(cls).get("__init__")
    if not isinstance(init, FunctionType):
        return cls
    parameters = list(inspect.signature(init).parameters.values())[1:]
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return cls
    known, refuse = frozenset(each.name for each in parameters), _refuse

    def told(self: Any, /, *given: Any, **named: Any) -> None:
        if not known.issuperset(named):
            refuse(type(self), named, known)
        init(self, *given, **named)

    same = FunctionType(told.__code__, init.__globals__, "__init__", None, told.__closure__)
    cls.__init__ = functools.update_wrapper(same, init)  # type: ignore[method-assign]
    return cls


def _refuse(cls: Type[Any], named: Dict[str, Any], known: FrozenSet[str]) -> None:
    classes = [each for each in cls.__mro__ if ships(each)]
    unknown = next(name for name in named if name not in known)
    mends = [CLASS_ARGUMENTS.get(each.__name__, {}) for each in classes]
    mend = next((table[unknown] + "." for table in mends if unknown in table), "")
    close = difflib.get_close_matches(unknown, known, n=1)
    if not mend:
        has = f"it has {quoted(sorted(known), most=20)}." if known else "it takes none."
        mend = f"did you mean {close[0]!r}?" if close else has
    raise UnknownArgumentError(f"{classes[0].__name__} has no argument {unknown!r}: {mend}")
