"""One thread that writes files while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Optional


class BackgroundWriter:
    """Does one thing at a time in a thread of its own; an error of it is raised at the next call.

    What it is given must not change meanwhile: a copy of the weights, not the weights.
    """

    def __init__(self) -> None:
        self._pool: Optional[ThreadPoolExecutor] = None
        self._running: Optional[Future[None]] = None

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for what is being done; raise its error, or begin ``work``."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ofengine-checkpoint")
        self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Wait until all is done; raise the error of what could not be done."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
