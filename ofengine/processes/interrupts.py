"""Ctrl-C and SIGTERM: finish the step, tell the callbacks, end with the right exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type

from ofengine._oneflow.session import restore_exit_code


class InterruptGuard:
    """While it is entered, the first signal only sets a flag that :meth:`check` raises on.

    SIGINT becomes ``KeyboardInterrupt`` (exit code 130), SIGTERM ``SystemExit(143)``. A second
    signal raises at once. Outside the main thread, where Python allows no handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        """The signal that came, which :meth:`check` raises on."""
        self.hurried = False
        """True once a second signal came: nothing that takes time should be begun."""
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        restore_exit_code()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler in C, OneFlow's; it answers Ctrl-C with a segmentation fault.
            ours = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, ours if handler is None else handler)
        self._before.clear()

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is None:
            self.received = number
        else:
            self.hurried = True
            self._raise(number)

    def check(self) -> None:
        """Raise where a signal came since the guard was entered."""
        if self.received is not None:
            self._raise(self.received)

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
