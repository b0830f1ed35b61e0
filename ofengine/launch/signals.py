"""The signals that come to the launcher, collected while it waits for other things too."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any, Dict, Iterable, List, Optional, Type

from ofengine.processes.supervisor import PASSED_ON

_TAKEN = (*PASSED_ON, signal.SIGTSTP, signal.SIGCHLD)


class Signals:
    """While it is entered, signals do nothing but end the wait and be listed in ``received``.

    Those that are ignored, as SIGHUP in nohup, go on being so. Main thread only.
    """

    def __init__(self) -> None:
        self.received: List[int] = []
        """Those that have come, all but SIGCHLD, until somebody takes them out."""
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _TAKEN:
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read)
        os.close(self._write)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        if number != signal.SIGCHLD:
            self.received.append(number)

    def wait(self, seconds: float, files: Iterable[int]) -> None:
        """Until a signal comes, one of ``files`` can be read, or for ``seconds``."""
        if not self.received:
            select.select([self._read, *files], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 512):
                pass
