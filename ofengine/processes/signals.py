"""Signals that ask a process to end: which, which of them stay ignored, a terminal that is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, ``kill``, a terminal that was closed."""


def keep_ignored() -> None:
    """Have those ignored that Python knows as ignored: OneFlow's import sets up SIGINT anew."""
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN)


def leave_closed_terminal() -> None:
    """Let what is written to a terminal that is closed go nowhere, where it would be an error."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(descriptor, 0)
            is_closed = any(event & select.POLLHUP for _, event in poll.poll(0))
            if is_closed and stat.S_ISCHR(os.fstat(descriptor).st_mode):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
