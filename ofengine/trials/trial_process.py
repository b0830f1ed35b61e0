"""A trial in a process of its own: the user's script, run again up to the call that asked for it.

OneFlow keeps the memory of what it has computed and compiled for as long as a process lives, so
that several trials in one process would each find less. A child that runs the script again has all
that the script's training would have, gives everything back at its end, and may be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Optional

import attrs

from ofengine.errors import ConfigurationError
from ofengine.processes import supervisor
from ofengine.trials.memory import bytes_of, in_mb

_PAUSE = 0.02
"""Seconds between two looks at the memory of a trial."""
_FIRST_TO_DIE = "1000"
"""What tells the kernel to take this process before all others where memory is short."""
_NO_MEMORY = ("out of memory", "bad_alloc", "cannot allocate memory", "memoryerror")


@attrs.frozen
class Trial:
    """What a child is told.

    Attributes:
        found: the sizes that the script's calls before this one have found.
        rows: how many a batch is to have in this trial.
        answer: the descriptor to which the child writes the peak of its memory, in bytes.
    """

    found: List[int]
    rows: int
    answer: int

    @classmethod
    def of_this_process(cls) -> Optional[Trial]:
        """What this process was told; None where it is no child of a search."""
        told = os.environ.get(supervisor.TRIAL, "").partition(" ")[2]
        return cls(**json.loads(told)) if supervisor.is_trial() else None

    def succeed(self) -> None:
        """Tell the parent that the trial was carried out; does not return."""
        peak = bytes_of(Path("/proc/self/status"), "VmHWM") or 0
        os.write(self.answer, str(peak).encode())
        os._exit(0)  # nothing behind the call is to happen


@attrs.frozen
class Outcome:
    """Whether the rows of a trial fit, and, where they do not, why, as a clause."""

    fits: bool
    why: str = ""


def check_can_try() -> None:
    """Raise :class:`ConfigurationError` where the script cannot be run again."""
    problem = supervisor.why_not_again("scale_batch_size()", "choose the batch size yourself")
    if problem is not None:
        raise ConfigurationError(f"scale_batch_size runs the script again for each try: {problem}")


def carry_out(found: List[int], rows: int, limit: int) -> Outcome:
    """Run the script up to the trial of ``rows``, with no more memory than ``limit`` bytes.

    Raises :class:`ConfigurationError` where it fails for another reason than memory.
    """
    read, write = os.pipe()
    told = json.dumps({"found": found, "rows": rows, "answer": write})
    environment = {**os.environ, supervisor.TRIAL: f"{os.getpid()} {told}"}
    command = [sys.executable, *supervisor.original_arguments()[1:]]
    prepare = supervisor.child_preparation(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                command, cwd=supervisor.FOLDER, env=environment, pass_fds=(write,),
                preexec_fn=prepare, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors,
            )  # fmt: skip
        finally:
            os.close(write)
        try:
            grown = _watch(child, limit)
        finally:
            child.kill()
            child.wait()
            with os.fdopen(read, "rb") as answer:
                said = answer.read()
        errors.seek(0)
        return _judge(rows, limit, grown, said, child.returncode, errors.read())


def _watch(child: subprocess.Popen[bytes], limit: int) -> bool:
    """Wait for ``child``; kill it where it takes more than ``limit`` bytes, and return True."""
    own = Path(f"/proc/{child.pid}")
    with contextlib.suppress(OSError):
        (own / "oom_score_adj").write_text(_FIRST_TO_DIE)
    while child.poll() is None:
        if (bytes_of(own / "status", "VmRSS") or 0) > limit:
            child.kill()
            return True
        time.sleep(_PAUSE)
    return False


def _judge(rows: int, limit: int, grown: bool, said: bytes, code: int, errors: bytes) -> Outcome:
    most = f"and {in_mb(limit)} is the most"
    if grown:
        return Outcome(False, f"{rows} rows took more, {most}")
    if said:
        peak = int(said)
        return Outcome(peak <= limit, f"{rows} rows took {in_mb(peak)}, {most}")
    text = errors.decode("utf-8", "replace")
    if code == -signal.SIGKILL or any(each in text.lower() for each in _NO_MEMORY):
        return Outcome(False, f"{rows} rows ran out of memory")
    lines = [line for line in text.splitlines() if line.strip()] or [f"exit code {code}"]
    raise ConfigurationError(
        f"scale_batch_size: the try with {rows} rows failed, for another reason than memory: "
        f"{lines[-1].strip()}"
    )
