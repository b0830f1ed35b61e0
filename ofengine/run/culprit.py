"""Whose code an exception comes from, in a word."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Optional

from ofengine.callback import Callback
from ofengine.errors import OFEngineError
from ofengine.loggers.base import Logger
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
        owner = frame.f_locals.get("self")
        if isinstance(owner, (Callback, Logger, TaskModule)):
            return f"{type(owner).__name__}.{frame.f_code.co_name}"
        loading = loading or _LOADING in frame.f_code.co_filename
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
