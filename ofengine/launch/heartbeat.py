"""What a rank tells its launcher: that it is at work, what in, and of what it ends.

In a process that was not started by :func:`~ofengine.launch.start_ranks` all of this does nothing,
at next to no cost. There is one thing that ranks of any launcher do: one that ends with an
exception ends at once after its traceback, for at OneFlow's exit it would wait for the others,
who wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import itertools
import mmap
import os
import signal
import sys
import time
import traceback
from types import TracebackType
from typing import Callable, Optional, Type

from ofengine.launch import slot

DUMP = signal.SIGRTMAX - 1
"""The signal at which a rank writes the stacks of its threads into its slot."""
_KILLED_WITHIN = 20.0
"""Seconds in which the launcher kills a rank that has failed; it ends by itself after that."""


class _Told:
    """The rank's side of its slot."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.process = os.getpid()
        self.numbers = memoryview(mmap.mmap(file, slot.PAGE)).cast("Q")
        self.depth = 0

    def write(self, text: str) -> None:
        """Put ``text`` where the launcher finds it."""
        with contextlib.suppress(OSError):
            os.write(self.file, text.encode("utf-8", "replace"))


def _connect() -> Optional[_Told]:
    file, colon, launcher = os.environ.get(slot.VARIABLE, "").partition(":")
    if not colon or launcher != str(os.getppid()):
        return None  # the processes that a rank starts have the variable too
    try:
        told = _Told(int(file))
        os.set_inheritable(told.file, False)
    except (OSError, ValueError):
        return None
    told.numbers[slot.CONNECTED] = 1
    return told


_told = _connect()

connected = _told is not None
"""True in a rank that :func:`~ofengine.launch.start_ranks` has started."""


def _beating() -> Callable[[], None]:
    if _told is None:
        return itertools.repeat(None).__next__
    # No frame of Python's: it is called in every step.
    write = map(_told.numbers.__setitem__, itertools.repeat(slot.BEATS), itertools.count(1))
    return write.__next__


beat: Callable[[], None] = _beating()
"""Show that this rank is at work: called at every step of every loop."""


class _Verb:
    def __enter__(self) -> None:
        if _told is None:
            return
        _told.depth += 1
        if _told.depth == 1:
            _tell_of_the_end()
            numbers = _told.numbers
            numbers[slot.LEAVING] = numbers[slot.EXIT] = 0
            numbers[slot.ENDED] = numbers[slot.BEGUN]
            numbers[slot.BEGUN] += 1

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if _told is None:
            return
        _told.depth -= 1
        if _told.depth > 0:
            return
        numbers = _told.numbers
        if error is None:
            numbers[slot.ENDED] = numbers[slot.BEGUN]
            return
        if isinstance(error, SystemExit):
            _told.write("".join(traceback.format_exception(kind, error, trace)))
            code = error.code
            numbers[slot.EXIT] = code if isinstance(code, int) and 0 <= code <= 255 else 1
        numbers[slot.LEAVING] = 2


verb = _Verb()
"""``with verb:`` around what all ranks do together: the launcher watches over this rank in there.

Where an exception ends it, :func:`leaving` tells of that before the last hooks.
"""


def leaving() -> None:
    """Tell that an exception makes this rank leave the verb; its last hooks are still to run."""
    if _told is not None and _told.depth == 1:
        _told.numbers[slot.LEAVING] = 1


class _Exchange:
    def __enter__(self) -> None:
        beat()
        if _told is not None:
            _told.numbers[slot.WAITING] = 1

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if _told is not None:
            _told.numbers[slot.WAITING] = 0
        beat()


exchange = _Exchange()
"""``with exchange:`` around what waits for the other ranks tells who is the one that hangs."""


def ask_for_restarts(number: int) -> None:
    """Have the launcher start all ranks again after a crash, up to ``number`` times in all."""
    if _told is not None:
        _told.numbers[slot.RESTARTS] = number


# ------------------------------------------------------------------ how a rank ends


def _tell_of_the_end() -> None:
    # Those who come last are called first: this must come before OneFlow's, which waits.
    atexit.unregister(_over)
    atexit.register(_over)


def _over() -> None:
    if _told is not None and _told.process == os.getpid():  # not in one that it has forked
        _told.numbers[slot.OVER] = 1


def _end_of_an_exception(
    before: Callable[..., None],
    kind: Type[BaseException],
    error: BaseException,
    trace: Optional[TracebackType],
) -> None:
    interrupted = issubclass(kind, KeyboardInterrupt)
    if interrupted and _told is not None:
        return  # the launcher says so, once for all
    if _told is None or _told.process != os.getpid():
        before(kind, error, trace)
        _flush()
        if not interrupted:
            os._exit(1)
        return
    failed_at = time.monotonic_ns()
    text = _shown_by(before, kind, error, trace)
    _told.write(text)
    _flush()
    _told.numbers[slot.FAILED_AT] = failed_at
    _told.numbers[slot.OVER] = 1
    # Others may be about to end as well, which OneFlow keeps them from once this process is gone.
    time.sleep(_KILLED_WITHIN)
    os._exit(1)


def _shown_by(
    hook: Callable[..., None],
    kind: Type[BaseException],
    error: BaseException,
    trace: Optional[TracebackType],
) -> str:
    """What the excepthook ``hook`` writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as written, contextlib.suppress(Exception):
        hook(kind, error, trace)
    return written.getvalue() or "".join(traceback.format_exception(kind, error, trace))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _mind_the_others() -> None:
    """Have this rank end so that no other waits for it."""
    before = sys.excepthook

    def hook(
        kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]
    ) -> None:
        _end_of_an_exception(before, kind, error, trace)

    sys.excepthook = hook
    if _told is not None:
        _tell_of_the_end()
        faulthandler.register(DUMP, file=_told.file, all_threads=True)


if connected or os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
    _mind_the_others()
