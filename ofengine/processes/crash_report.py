"""What a user sees where the process dies in native code: a traceback, and what to do now.

Python's :mod:`faulthandler` writes the traceback from inside the signal's handler, where no
Python can run and hardly anything else. The sentence after it comes from a small ``sh`` process
through which the traceback goes: once there was one and the process is gone, it says its
sentence. It says nothing where the process ends in any other way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
from types import TracebackType
from typing import Optional, Type

from ofengine.processes.supervisor import tries

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
    printf '\\n%s\\n' "$1"
fi
"""


class CrashReport:
    """While it is entered, a crash leaves a traceback of all threads and ``advice`` on stderr.

    A :mod:`faulthandler` that somebody else has switched on is left as it is. Under a supervisor
    (:mod:`.supervisor`) only the traceback is written: the supervisor says the rest.

    Args:
        advice: the sentence after the traceback.
    """

    def __init__(self, advice: str = ADVICE) -> None:
        self._advice = advice
        self._pipe: Optional[int] = None
        self._reader: Optional[subprocess.Popen[bytes]] = None
        self._enabled = False

    def __enter__(self) -> CrashReport:
        if faulthandler.is_enabled():
            return self
        if tries() is None:
            self._start_reader()
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

    def _start_reader(self) -> None:
        """Start the process that passes on a traceback and adds the advice, where that works."""
        out: Optional[int] = None
        read: Optional[int] = None
        write: Optional[int] = None
        try:
            out = os.dup(2)  # fails where descriptor 2 is closed
            read, write = os.pipe()
            self._reader = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "sh", self._advice],
                stdin=read,
                stdout=out,
                stderr=subprocess.DEVNULL,
                env={"LC_ALL": "C", "PATH": os.defpath},
                start_new_session=True,  # a Ctrl-C meant for Python must not end it
            )
        except OSError:
            if write is not None:
                os.close(write)
        else:
            self._pipe = write
        finally:
            for each in (out, read):
                if each is not None:
                    os.close(each)
