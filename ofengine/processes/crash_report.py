"""What a user sees where the process dies in native code: a traceback, and what to do now.

Python's :mod:`faulthandler` writes the traceback from inside the signal's handler, where no
Python can run and hardly anything else. The sentence after it comes from a small ``sh`` process
through which the traceback goes: once there was one and the process is gone, it says its
sentence. It says nothing where the process ends in any other way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import subprocess
from types import TracebackType
from typing import Optional, Type

from ofengine.processes.supervisor import PLACE_SIZE, new_place_file, place_file, tries

ADVICE = (
    "ofengine: the process died in native code, OneFlow's most likely, while Python was where the "
    'traceback above says; fit(..., ckpt_path="last") goes on from the last checkpoint, and '
    "Trainer(restart_on_crash=3) does so by itself."
)

# `read` comes back with a line only where a traceback begins; `cat` passes on the rest.
_SCRIPT = """
if IFS= read -r line; then
    printf '%s\\n' "$line"
    cat
    place=$(tail -c +9 "$2" | tr -d '\\000')
    if [ -n "$place" ]; then
        printf '\\nofengine: Python had come to batch %s %s\\n' $(od -An -td8 -N8 "$2") "$place"
    fi
    printf '\\n%s\\n' "$1"
fi
"""


class Place:
    """At which batch a run is, in memory that outlives the process where it is a file's.

    Args:
        file: the descriptor of a file of :data:`PLACE_SIZE` bytes, which may be closed then; None
            for memory that nobody else reads.

    Attributes:
        batch: its one item is the number of the batch; written at every step.
    """

    def __init__(self, file: Optional[int] = None) -> None:
        self._memory = mmap.mmap(-1 if file is None else file, PLACE_SIZE)
        self.batch = memoryview(self._memory)[:8].cast("q")
        self._largest = 0, ""

    def note(self, of: str, shapes: str, size: int) -> None:
        """Note a batch that has other ``shapes``, and another ``size``, than the one before.

        ``of`` is what follows its number in a sentence.
        """
        text = f"{of}: {shapes}; the device may be behind"
        if self._largest[0] > size:
            text += f", and the largest before was batch {self._largest[1]}"
        else:
            self._largest = size, f"{self.batch[0]} {of}: {shapes}"
        room = PLACE_SIZE - 8
        self._memory[8:] = text.encode("utf-8", "replace")[:room].ljust(room, b"\0")

    def close(self) -> None:
        """Let go of the memory."""
        self.batch.release()
        self._memory.close()


class CrashReport:
    """While it is entered, a crash leaves a traceback of all threads and ``advice`` on stderr.

    A :mod:`faulthandler` that somebody else has switched on is left as it is. Under a supervisor
    (:mod:`.supervisor`) only the traceback is written: the supervisor says the rest.

    Args:
        advice: the sentence after the traceback.

    Attributes:
        place: what is noted there is said too.
    """

    def __init__(self, advice: str = ADVICE) -> None:
        self._advice = advice
        self.place = Place()
        self._pipe: Optional[int] = None
        self._reader: Optional[subprocess.Popen[bytes]] = None
        self._enabled = False

    def __enter__(self) -> CrashReport:
        if faulthandler.is_enabled():
            return self
        if tries() is None:
            self._start_reader()
        else:
            self._tell_supervisor()
        # Descriptor 2, whatever sys.stderr is: a notebook's or pytest's has none.
        target = 2 if self._pipe is None else self._pipe
        with contextlib.suppress(OSError, ValueError):
            os.fstat(target)
            faulthandler.enable(file=target, all_threads=True)
            self._enabled = True
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._enabled:
            faulthandler.disable()
            self._enabled = False
        if self._reader is not None:
            # It would speak up now where a forked process left a traceback in the pipe.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._reader.pid, signal.SIGKILL)
            self._reader.wait()
            self._reader = None
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        self.place.close()

    def _tell_supervisor(self) -> None:
        """What is noted, a supervisor says."""
        file = place_file()
        if file is not None:
            with contextlib.suppress(OSError, ValueError):
                self.place = Place(file)

    def _start_reader(self) -> None:
        """Start the process that passes on a traceback and adds the advice, where that works."""
        out: Optional[int] = None
        read: Optional[int] = None
        write: Optional[int] = None
        noted: Optional[int] = None
        try:
            out = os.dup(2)  # fails where descriptor 2 is closed
            read, write = os.pipe()
            noted = new_place_file()
            self._reader = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "sh", self._advice, f"/dev/fd/{noted}"],
                stdin=read,
                stdout=out,
                stderr=subprocess.DEVNULL,
                env={"LC_ALL": "C", "PATH": os.defpath},
                pass_fds=(noted,),
                start_new_session=True,  # a Ctrl-C meant for Python must not end it
            )
        except OSError:
            if write is not None:
                os.close(write)
        else:
            self._pipe = write
            self.place = Place(noted)
        finally:
            for each in (out, read, noted):
                if each is not None:
                    os.close(each)
