"""Whose code an exception comes from, and at which batch, in a sentence."""

from __future__ import annotations

import logging
import re
import traceback
from inspect import CO_VARARGS
from types import CodeType, FrameType, FunctionType
from typing import Any, Dict, Iterator, Optional

import attrs

from ofengine.callback import Callback
from ofengine.data.batches import Batches
from ofengine.data.structure import describe_shapes
from ofengine.errors import OFEngineError, take_colours_off
from ofengine.lines import is_users_own, user_line
from ofengine.loggers.base import Logger
from ofengine.modes.explain import error_in_property
from ofengine.run.progress import Point, Progress
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_LOOPS = "ofengine.run.loops"
_CALLED = {"validation": "validation", "test": "testing", "predict": "prediction"}
_MEMORY = re.compile(
    r"out of memory|allocate failed|bad_alloc|cannot allocate|cudaErrorMemoryAllocation", re.I
)
"""What OneFlow, CUDA and the system say of memory that is not there."""


@attrs.define
class _Place:
    """Where the traceback of an error leads through.

    Attributes:
        culprit: ``Class.method`` of the outermost callback, logger or task; "" for none.
        loader: what a batch was being fetched from; None where none was.
        loop: the innermost frame of a loop over batches.
        stage: that of the evaluation that was going on; "" where none was.
    """

    culprit: str = ""
    loader: Optional[Batches] = None
    loop: Optional[FrameType] = None
    stage: str = ""

    @classmethod
    def of(cls, error: BaseException) -> _Place:
        place, spare = cls(), ""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            code = frame.f_code
            owner = _first_argument(frame)
            if isinstance(owner, (Callback, Logger, TaskModule)):
                method, kind = _method_of(owner, code), type(owner).__name__
                place.culprit = place.culprit or (f"{kind}.{method}" if method else "")
                if is_users_own(code.co_filename):
                    spare = spare or f"{kind}.{code.co_name}"
            elif isinstance(owner, Batches) and code.co_name != "__init__":
                place.loader = owner
            elif frame.f_globals.get("__name__") == _LOOPS:
                place.loop = frame if "batch_idx" in frame.f_locals else place.loop
                stage = frame.f_locals.get("stage")  # a name in an evaluation alone
                place.stage = stage if isinstance(stage, str) else place.stage
        place.culprit = place.culprit or spare
        return place

    def in_words(self, at: Progress) -> str:
        """At which batch that was."""
        local: Dict[str, Any] = self.loop.f_locals if self.loop is not None else {}
        stage = local.get("stage")  # a name in an evaluation alone
        evaluates = isinstance(stage, str)
        step = f"(after step {at.global_step})"
        if self.loader is not None:
            number = self.loader.number_to_come
            samples = self.loader.order.samples(number)
            text = f"batch {number} of {self.loader.what}{f' ({samples})' * bool(samples)}"
        elif evaluates:
            text = f"batch {local['batch_idx']} of {local['loader'].what}"
        elif at.point is Point.BEGIN:
            return f"in {_CALLED[self.stage]}" if self.stage else "before the first batch"
        elif self.loop is None or at.batch_idx < 0:
            return f"in epoch {at.epoch} {step}" if at.point is not Point.OVER else step[1:-1]
        else:
            return f"in epoch {at.epoch}, batch {at.batch_idx} {step}"
        in_fit = not evaluates or (stage == "validation" and at.batches_seen)
        return f"in {text}" + (f", in epoch {at.epoch} {step}" if in_fit else "")

    def shapes(self) -> str:
        """What the batch at hand is made of; "" where none is."""
        batch = None if self.loop is None else self.loop.f_locals.get("batch")
        return "" if batch is None or self.loader is not None else describe_shapes(batch)


def tell_culprit(error: BaseException, at: Progress) -> None:
    """Log whose code raised ``error``, and where in the run; take OneFlow's colours off it."""
    for each in _chain(error):
        take_colours_off(each)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return  # they speak for themselves
    place = _Place.of(error)
    if any(isinstance(each, MemoryError) or _MEMORY.search(str(each)) for each in _chain(error)):
        of = f": the batch holds {place.shapes()}" if place.shapes() else ""
        log.error(
            "memory ran out %s%s. Take smaller batches, with accumulate_grad_batches to average "
            "over as many samples as before.", place.in_words(at), of,
        )  # fmt: skip
    if isinstance(error, OFEngineError):
        return
    culprit = place.culprit or ("" if place.loader is None else "the dataloader")
    if culprit:
        line = user_line(error.__traceback__)
        where = f", at {line}" if line else ""
        log.error("%s raised %s %s%s.", culprit, type(error).__name__, place.in_words(at), where)
    within = error_in_property(error)
    if within is not None:
        line = user_line(within.__traceback__)
        log.error("The %s comes from a property, at %s: %s.", type(error).__name__, line, within)


def _first_argument(frame: FrameType) -> Any:
    """That of a function, of one that takes ``*args`` too; None where it has none."""
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if not code.co_flags & CO_VARARGS:
        return None
    rest = frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount])
    return rest[0] if isinstance(rest, tuple) and rest else None


def _method_of(owner: Any, code: CodeType) -> str:
    """As what ``owner`` has ``code``; "" for a function that is only given ``owner``.

    A decorator may have given it another name, and may have wrapped other methods too.
    """
    every = (vars(owner), *map(vars, type(owner).__mro__))
    names = {name for each in every for name, own in each.items() if code in _codes_of(own)}
    if len(names) == 1:
        return names.pop()
    named = is_users_own(code.co_filename) and hasattr(type(owner), code.co_name)
    return code.co_name if named else ""


def _codes_of(own: Any) -> Iterator[CodeType]:
    """Of an attribute of a class or object: that of its function, and of what this wraps."""
    own = own.fget if isinstance(own, property) else getattr(own, "__func__", own)
    while isinstance(own, FunctionType):
        yield own.__code__
        own = getattr(own, "__wrapped__", None)


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
