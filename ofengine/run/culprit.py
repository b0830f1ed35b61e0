"""Whose code an exception comes from, in a word."""

from __future__ import annotations

import os
import traceback
from typing import Optional

from ofengine.callback import Callback
from ofengine.loggers.base import Logger
from ofengine.task import TaskModule

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
