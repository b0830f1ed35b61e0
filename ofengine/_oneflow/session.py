"""OneFlow's session: waiting for it, starting it, ending with the right exit code."""

from __future__ import annotations

import sys

import oneflow as flow
from oneflow.framework import session_context

from ofengine._oneflow.quiet import quietly


def synchronize() -> None:
    """Wait until everything that was handed to OneFlow has been computed."""
    flow._oneflow_internal.eager.Sync()


_session_started = False


def start_session() -> None:
    """Start what the first graph would start, without the line it prints where there is no GPU."""
    global _session_started
    if _session_started:
        return
    _session_started = True
    with quietly():
        session_context.GetDefaultSession().TryInit()


def restore_exit_code() -> None:
    """Undo OneFlow's excepthook, with which an exception after a compilation ends in SIGABRT."""
    if getattr(sys.excepthook, "__module__", "") == "oneflow":
        owner = getattr(sys.excepthook, "__closure__", None)
        original = getattr(owner[0].cell_contents, "_orig_excepthook", None) if owner else None
        sys.excepthook = original or sys.__excepthook__
