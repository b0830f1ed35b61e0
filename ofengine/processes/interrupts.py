"""Ctrl-C, SIGTERM, a closed terminal: finish the step, tell the callbacks, the right exit code."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from time import monotonic, sleep
from types import FrameType, TracebackType
from typing import Any, Dict, List, Optional, Type

from ofengine._oneflow.loaders import end_workers, forgive_workers
from ofengine._oneflow.session import restore_exit_code
from ofengine.launch import heartbeat
from ofengine.processes.signals import ENDING, keep_ignored, leave_closed_terminal

_ONE = 1.0
"""Seconds within which signals are one: a supervisor passes on what the group had already, a
service manager sends SIGHUP behind SIGTERM, a shell repeats what the kernel said."""
_ONE_IN_A_RANK = 3.0
"""The same where a launcher of ranks passes them on: whoever stops a service often sends one to
each of its processes."""
_PATIENCE = 2.0
"""Seconds that the batch which is waited for may still take."""


class InterruptGuard:
    """While it is entered, the first signal only sets a flag that :meth:`check` raises on.

    SIGINT becomes ``KeyboardInterrupt`` (exit code 130), SIGTERM ``SystemExit(143)``, and SIGHUP,
    where nothing was set up for it, ``SystemExit(129)``. A second signal raises at once, unless it
    comes within a second of the first. Where the run waits for a batch that does not come, it is
    raised there after two seconds. Signals that are ignored stay so. Outside the main thread,
    where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        """The signal that came, which :meth:`check` raises on."""
        self.hurried = False
        """True once a second signal came: nothing that takes time should be begun."""
        self.waiting = False
        """True while the run waits for a batch, between two moments that it can be saved at."""
        self.ended_waiting = False
        """True where what ended the run came while it waited for a batch."""
        self._before: Dict[int, Any] = {}
        self._answered_at = 0.0
        self._reminded = False

    def __enter__(self) -> InterruptGuard:
        restore_exit_code()
        if threading.current_thread() is threading.main_thread():
            _guards.append(self)
            keep_ignored()
            for number in ENDING:
                before = signal.getsignal(number)
                if before == signal.SIG_IGN:  # as in nohup, and for jobs in the background
                    continue
                if number == signal.SIGHUP and before != signal.SIG_DFL:
                    continue  # it means something else to this program, as to many a daemon
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._restore()
        if self in _guards:
            _guards.remove(self)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: a handler in C, OneFlow's; it answers Ctrl-C with a segmentation fault.
            ours = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, ours if handler is None else handler)
        self._before.clear()

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is None:
            self.received, self._answered_at = number, monotonic()
            forgive_workers()  # they may have had the same signal
            if number == signal.SIGHUP:
                leave_closed_terminal()
            _thread.start_new_thread(self._remind, (number,))
        elif self._reminded:
            self._reminded, self._answered_at = False, monotonic()
            if self.waiting:
                self._raise(self.received)
        elif monotonic() - self._answered_at >= (_ONE_IN_A_RANK if heartbeat.connected else _ONE):
            self.hurried = True
            self._raise(number)

    def _remind(self, number: int) -> None:
        """In a thread: wake the main thread where it waits for a batch, end workers that hang."""
        sleep(_PATIENCE)
        while self._before:
            if self.waiting:
                self._reminded = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            end_workers()
            sleep(_ONE)

    def check(self) -> None:
        """Raise where a signal came since the guard was entered."""
        if self.received is not None:
            self._raise(self.received)

    def reason(self, error: BaseException) -> BaseException:
        """What ends the run where ``error`` was raised: a signal, where a wait for a batch failed.

        Workers may have had the same signal. Nothing that :attr:`waiting` allows is raised then.
        """
        self.ended_waiting, self.waiting = self.waiting, False
        if self.ended_waiting and isinstance(error, Exception):
            try:
                self.check()
            except (KeyboardInterrupt, SystemExit) as interrupt:
                interrupt.__cause__ = error
                return interrupt
        return error

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


# A process that is forked while a guard is entered, by a dataset perhaps, is none of the run's:
# signals do to it what they did before. They are held back meanwhile, for Python forgets in a
# forked process those that came already.
_guards: List[InterruptGuard] = []
_fork = threading.local()


def _before_fork() -> None:
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING if _guards else ())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _begin_forked() -> None:
    while _guards:
        _guards.pop()._restore()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_begin_forked)
