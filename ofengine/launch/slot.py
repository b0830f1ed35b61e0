"""What a rank and its launcher share: some numbers in memory, and a text.

Each rank has a file in memory. Its first page holds numbers of 8 bytes, which the rank writes and
the launcher reads; the text of an error, or the stack of a rank that hangs, follows as in any file.
"""

from __future__ import annotations

import mmap
import os

VARIABLE = "OFENGINE_RANK"
"""Tells a rank the descriptor of its slot, and the launcher's process id."""

PAGE = mmap.PAGESIZE
_MOST_TEXT = 100_000

CONNECTED = 0
"""1 once the rank has opened its slot."""
BEATS = 1
"""How often it has shown that it is at work."""
BEGUN = 2
"""How many verbs (fit, validate, ...) it has begun, in which all ranks take part."""
ENDED = 3
"""The number of the last verb that it has ended without an exception."""
LEAVING = 4
"""1 while an exception makes it leave the verb, 2 once that has happened."""
WAITING = 5
"""1 while it waits for the other ranks."""
OVER = 6
"""1 once its script is at an end, one way or the other."""
FAILED_AT = 7
"""When its script ended with an exception, by the monotonic clock, in nanoseconds; or 0."""
RESTARTS = 8
"""How often all ranks may be started again after a crash."""

EXIT = 9
"""The exit code with which ``sys.exit`` makes it leave a verb."""


class Slot:
    """The launcher's side of a rank's slot."""

    def __init__(self, rank: int) -> None:
        self.file = os.memfd_create(f"ofengine-rank-{rank}")
        os.ftruncate(self.file, PAGE)
        os.lseek(self.file, PAGE, os.SEEK_SET)  # where the rank's text goes
        self._memory = mmap.mmap(self.file, PAGE)
        self._numbers = memoryview(self._memory).cast("Q")

    def __getitem__(self, which: int) -> int:
        return int(self._numbers[which])

    def text(self) -> str:
        """What the rank has written, the last part of it where it is long."""
        length = os.fstat(self.file).st_size - PAGE
        begin = max(0, length - _MOST_TEXT)
        return os.pread(self.file, length - begin, PAGE + begin).decode("utf-8", "replace")

    def close(self) -> None:
        """Let go of it."""
        self._numbers.release()
        self._memory.close()
        os.close(self.file)
