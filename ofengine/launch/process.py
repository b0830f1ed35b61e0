"""One rank as its launcher has it: the process, its slot, and what it writes."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
from typing import Callable, Deque, Dict, List, Optional, Sequence

from ofengine.launch import heartbeat, slot, verdict
from ofengine.launch.environment import World
from ofengine.processes import supervisor

_LINES_KEPT = 60
"""Of what a rank other than 0 writes, to be shown where it is the first to fail."""
_LONGEST_LINE = 4_000


class RankProcess:
    """A rank that has been started.

    Args:
        command: what it runs.
        environment: its variables, but for those of this class.
        world: which rank it is. What rank 0 writes goes where the launcher's own output goes;
            what others write is kept, and shown if need be.
        prepare: what it does before the command.
        show_all: others' lines are shown as they come, with the rank before them.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Dict[str, str],
        world: World,
        prepare: Callable[[], None],
        show_all: bool = False,
    ) -> None:
        self.rank = world.rank
        self.slot = slot.Slot(world.rank)
        self.code: Optional[int] = None
        """Its exit code, below 0 for a signal; None while it lives."""
        self._show_all = show_all
        self._lines: Deque[bytes] = collections.deque(maxlen=_LINES_KEPT)
        self._rest = b""
        self._silent = self._waits = self._gone = 0.0
        self._shown: List[int] = []
        apart = world.rank != 0
        self._place = supervisor.new_place_file()
        variables = {**environment, slot.VARIABLE: f"{self.slot.file}:{os.getpid()}"}
        variables[supervisor.PLACE] = str(self._place)
        if apart:
            variables["PYTHONUNBUFFERED"] = "1"  # what is in a buffer is lost when it is killed
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            list(command),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if apart else None,
            stderr=subprocess.STDOUT if apart else None,
            pass_fds=[self.slot.file, self._place],
            start_new_session=True,  # signals to the launcher's group come by the launcher, once
            preexec_fn=prepare,
        )
        self.output: Optional[int] = None
        """Where its output is read, until it is closed."""
        if self.process.stdout is not None:
            self.output = self.process.stdout.fileno()
            os.set_blocking(self.output, False)

    # ------------------------------------------------------------------ what it does

    def look(self, seconds: float) -> verdict.Seen:
        """What is seen of it, ``seconds`` after the last look."""
        if self.code is None:
            # Not reaped: until it is, neither its number nor that of its group is anyone else's.
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                ended = found.si_code == os.CLD_EXITED
                self.code = found.si_status if ended else -found.si_status
        shown = [self.slot[each] for each in range(slot.BEATS, slot.OVER + 1)]
        still = shown == self._shown
        self._shown = shown
        self._silent = self._silent + seconds if still else 0.0
        self._waits = self._waits + seconds if still and self.slot[slot.WAITING] else 0.0
        is_gone = self.code is not None or self.slot[slot.OVER]
        self._gone = self._gone + seconds if is_gone else 0.0
        waits = self._waits or (1e-9 if self.slot[slot.WAITING] else 0.0)
        return verdict.seen(self.rank, self.code, self.slot, self._silent, waits, self._gone)

    def read(self) -> None:
        """Take what it has written."""
        while self.output is not None:
            try:
                part = os.read(self.output, 1 << 16)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            if not part:
                self.output = None
            *lines, self._rest = (self._rest + part).split(b"\n")
            if self._rest and (not part or len(self._rest) > _LONGEST_LINE):
                lines, self._rest = [*lines, self._rest], b""
            self._take(lines)

    def _take(self, lines: List[bytes]) -> None:
        self._lines.extend(line[-_LONGEST_LINE:] for line in lines)
        if self._show_all and lines:
            with contextlib.suppress(OSError):
                os.write(2, b"".join(b"[rank %d] %s\n" % (self.rank, line) for line in lines))

    def last_words(self) -> str:
        """The error or stack that it has told, else the last lines that it has written."""
        told = self.slot.text()
        if told or self._show_all:
            return told
        lines = b"\n".join(self._lines).decode("utf-8", "replace").splitlines()
        return "".join(f"[rank {self.rank}] {line}\n" for line in lines)

    def place(self) -> str:
        """At which batch it was, as it noted; as the end of a sentence."""
        return supervisor.place_in(self._place)

    # ------------------------------------------------------------------ what is done to it

    def send(self, number: int) -> None:
        """Send it a signal, where it lives."""
        if self.code is None:
            os.kill(self.process.pid, number)

    def send_to_all_of_it(self, number: int) -> None:
        """Send a signal to it and to the processes that it has started, whether it lives or not."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def dump(self) -> None:
        """Have it write the stacks of its threads into its slot."""
        if self.slot[slot.CONNECTED]:
            self.send(heartbeat.DUMP)

    def finish(self) -> None:
        """Take what is left of it: its exit code, its output, its slot."""
        self.process.wait()
        self.code = self.process.returncode
        self.read()
        if self.process.stdout is not None:
            self.process.stdout.close()
            self.output = None
        self.slot.close()
        os.close(self._place)


def descendants() -> List[int]:
    """The processes whose parent is this one, those that were left by their parents among them."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    found.append(int(name))
    return found


def kill_all_but(known: Sequence[int]) -> None:
    """Kill the children of this process, and theirs, all but those ``known`` and theirs."""
    while True:
        strangers = [each for each in descendants() if each not in known]
        if not strangers:
            return
        for each in strangers:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
