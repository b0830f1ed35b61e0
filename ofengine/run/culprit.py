"""Whose code an exception comes from, in a word."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Optional

from ofengine.callback import Callback
from ofengine.errors import OFEngineError
from ofengine.lines import user_line
from ofengine.loggers.base import Logger
from ofengine.modes.explain import error_in_property
from ofengine.run.progress import Progress
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_LOADING = os.path.join("ofengine", "data", "")


def culprit_of(error: BaseException) -> Optional[str]:
    """``Class.method`` of the outermost callback, logger or task in the traceback of ``error``.

    "the dataloader" where the exception came while a batch was fetched; None where neither.
    """
    loading = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, (Callback, Logger, TaskModule)):
            return f"{type(owner).__name__}.{code.co_name}"
        loading = loading or _LOADING in code.co_filename
    return "the dataloader" if loading else None


def tell_culprit(error: BaseException, at: Progress) -> None:
    """Log whose code raised ``error``, and where in the run."""
    if isinstance(error, (OFEngineError, KeyboardInterrupt, SystemExit)):
        return  # they speak for themselves
    culprit = culprit_of(error)
    if culprit is not None:
        log.error(
            "%s raised %s in epoch %d, batch %d (after step %d).",
            culprit, type(error).__name__, at.epoch, at.batch_idx, at.global_step,
        )  # fmt: skip
    within = error_in_property(error)
    if within is not None:
        line = user_line(within.__traceback__)
        log.error("The %s comes from a property, at %s: %s.", type(error).__name__, line, within)
