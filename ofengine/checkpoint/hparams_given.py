"""Which arguments a task is being made with: what ``save_hyperparameters`` keeps.

It may be called in the ``__init__`` of a base, which a subclass calls with other values than it was
given itself. An object can be made again with what it was made with: the arguments of its outermost
``__init__``, whose values count where both have a name. What bases alone were given follows from
these: ``self.hparams`` has it, and a checkpoint does not.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any, Collection, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

from ofengine.checkpoint.hparams import HyperParameters, own_copy
from ofengine.errors import ConfigurationError, quoted

_OF_BASES = "_hparams_of_bases"
"""The attribute of a task with what its bases alone were given, by name."""


class _Given(NamedTuple):
    """What one ``__init__`` was given, as it is by now."""

    named: Dict[str, Any]
    nameless: Tuple[Any, ...]
    """What it was given as ``*arguments``."""
    name_of_nameless: Optional[str]


def keep_arguments(
    task: Any,
    caller: Optional[FrameType],
    names: Sequence[str],
    ignore: Union[str, Collection[str], None],
) -> None:
    """Put the arguments of ``__init__`` into ``task.hparams``.

    ``caller`` is the frame that asks for it. See ``TaskModule.save_hyperparameters``.
    """
    if caller is None or caller.f_code.co_name != "__init__":
        raise ConfigurationError("call save_hyperparameters() in the task's __init__.")
    _refuse_values(type(task).__name__, names)
    left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
    inits = [_given_to(frame) for frame in _inits_of(task, caller)]
    outermost = inits[-1]
    arguments = {name: value for each in inits for name, value in each.named.items()}
    _refuse_nameless(inits, left_out, names)
    known = {*arguments, *(each.name_of_nameless for each in inits)}
    unknown = [name for name in (*names, *sorted(left_out)) if name not in known]
    if unknown:
        raise ConfigurationError(
            f"save_hyperparameters({unknown[0]!r}): __init__ has no such argument; it has "
            f"{quoted(sorted(arguments), most=20)}."
        )
    wanted = [n for n in arguments if n in (names or arguments) and n not in left_out]
    told = {name: own_copy(arguments[name]) for name in wanted}
    task.hparams = HyperParameters({**task.hparams, **told})
    of_bases = {**task.__dict__.get(_OF_BASES, {}), **told}
    passed_on = [n for n in of_bases if _is_among(arguments.get(n), outermost.nameless)]
    for name in (*outermost.named, *passed_on):
        of_bases.pop(name, None)
    if of_bases or _OF_BASES in task.__dict__:
        task.__dict__[_OF_BASES] = of_bases


def _refuse_values(cls: str, names: Sequence[Any]) -> None:
    """Raise where what is to be kept was given itself, in the place of a name."""
    for value in names:
        if not isinstance(value, str):
            spread = "**arguments" if isinstance(value, dict) else "**vars(arguments)"
            raise ConfigurationError(
                f"save_hyperparameters() was given a {type(value).__name__}, and keeps the "
                "arguments of __init__ by their names: write save_hyperparameters() alone, and let "
                f"__init__ take each value as an argument of its own, as in `{cls}({spread})`."
            )


def told_to_make(task: Any) -> Dict[str, Any]:
    """The hyper-parameters that ``task`` is made again with.

    Without what bases alone were given, unless it is another value by now.
    """
    of_bases = task.__dict__.get(_OF_BASES, {})
    return {
        name: value
        for name, value in task.hparams.items()
        if name not in of_bases or of_bases[name] is not value
    }


def _inits_of(task: Any, caller: FrameType) -> Iterator[FrameType]:
    """The frames of all ``__init__`` that are making ``task``, the innermost first."""
    yield caller
    frame = caller.f_back
    while frame is not None:
        code = frame.f_code
        is_init = code.co_name == "__init__" and code.co_argcount
        if is_init and frame.f_locals.get(code.co_varnames[0]) is task:
            yield frame
        frame = frame.f_back


def _given_to(init: FrameType) -> _Given:
    given, code = inspect.getargvalues(init), init.f_code
    # getargvalues leaves keyword-only arguments in the locals
    only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    of_own = (*given.args[1:], *only)
    named = {name: given.locals[name] for name in of_own if name in given.locals}
    named.update(given.locals.get(given.keywords, {}) if given.keywords else {})
    nameless = given.locals.get(given.varargs, ()) if given.varargs else ()
    return _Given(named, tuple(nameless), given.varargs)


def _refuse_nameless(
    inits: Sequence[_Given], left_out: Collection[str], names: Sequence[str]
) -> None:
    """Raise where the outermost was given ``*arguments`` that no base has a name for."""
    *bases, outermost = inits
    nameless = outermost.name_of_nameless
    if nameless is None or names or nameless in left_out:
        return
    with_a_name = [value for each in bases for value in each.named.values()]
    if not all(_is_among(value, with_a_name) for value in outermost.nameless):
        raise ConfigurationError(
            f"save_hyperparameters() cannot keep *{nameless}: take one argument with a list, "
            f"or leave it out with ignore=[{nameless!r}]."
        )


def _is_among(value: Any, others: Collection[Any]) -> bool:
    return any(value is each for each in others)
