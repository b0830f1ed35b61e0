"""Starts a training script again when it dies of a crash: ``Trainer(restart_on_crash=N)``.

What happens, step by step:

1. The script is run as always. Its ``fit`` calls :func:`supervise`, which checks that the same
   command can be run again and turns the process into a small supervisor: it *executes* this
   very file in its place, under the same process id. Nothing of the script is left, neither
   OneFlow's memory and threads nor a ``finally`` that might write over the child's results.
2. The supervisor runs the original command as its child, with ``OFENGINE_SUPERVISED`` set. In
   there :func:`tries` says which try it is, and ``fit`` trains.
3. Where the child dies of a crash, the supervisor says so and starts the next try, whose ``fit``
   resumes from the last checkpoint. However else the child ends, the supervisor ends with it.

The supervisor stays in the child's process group, so that the terminal, Ctrl-C and Ctrl-Z work
as always; signals sent to it are passed on, and where they were sent to the whole group the
child takes both for one; and the child dies when it is killed.

What the script does before ``fit`` is done once more by each child: it should be repeatable.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Callable, Dict, FrozenSet, List, NoReturn, Optional

VARIABLE = "OFENGINE_SUPERVISED"
TRIAL = "OFENGINE_TRIAL"
"""Says in a process that tries a part of the script what that is, and who asked for it."""
PLACE_SIZE = 4096
PLACE = "OFENGINE_PLACE"
"""The descriptor of what a supervised run notes of where it is, see :mod:`.crash_report`."""
FOLDER = os.getcwd()
"""Where the process was started, unless the script changed folders before importing ofengine."""

CRASHES: Dict[int, str] = {
    signal.SIGSEGV: "a segmentation fault",
    signal.SIGABRT: "an abort",
    signal.SIGBUS: "a bus error",
    signal.SIGILL: "an illegal instruction",
    signal.SIGFPE: "an arithmetic error",
    signal.SIGKILL: "killed from outside, often for want of memory",
}
"""The signals after which training is started again, in words."""

PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SI_KERNEL = 0x80
"""What ``si_code`` is where the terminal sent the signal."""
_PR_SET_PDEATHSIG = 1


def tries() -> Optional[int]:
    """Which try this process is, from 1 on; None where it was not started by a supervisor.

    None as well in the processes that a supervised process starts, to whom it passes on its
    environment.
    """
    told = _told()
    return None if told is None else int(told[0])


def is_trial() -> bool:
    """True in a process that tries a part of the script, and ends there."""
    return os.environ.get(TRIAL, "").partition(" ")[0] == str(os.getppid())


def supervised_by() -> str:
    """What tells the supervisor of this process from all others; "" without one."""
    told = _told()
    return "" if told is None else ":".join(told[1:])


def new_place_file() -> int:
    """The descriptor of memory in which a run can note at which batch it is."""
    file = os.memfd_create("ofengine-place")
    os.truncate(file, PLACE_SIZE)
    return file


def place_file() -> Optional[int]:
    """Where a supervised process notes at which batch it is; None without a supervisor."""
    file = os.environ.get(PLACE, "")
    return int(file) if tries() is not None and file.isdigit() else None


def _told() -> Optional[List[str]]:
    """Try, the supervisor's process id, and the time it was started at; None without one."""
    told = os.environ.get(VARIABLE, "").split(":")
    return told if len(told) == 3 and told[1] == str(os.getppid()) else None


def supervise(restarts: int) -> NoReturn:
    """Turn this process into the supervisor of a child that runs the same command. No return.

    Args:
        restarts: how often the child may be started again after a crash, from 1 on.

    Raises:
        ConfigurationError: the command cannot be run again, or only this one process of several
            would be. Nothing has happened then.
    """
    from ofengine.errors import ConfigurationError  # not where this file runs as a script
    from ofengine.processes.signals import keep_ignored

    problem = _why_not(restarts)
    if problem is not None:
        raise ConfigurationError(f"restart_on_crash={restarts!r}: {problem}")
    command = [sys.executable, *original_arguments()[1:]]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    close_files_on_exec()
    keep_ignored()  # exec keeps what is ignored, and makes OneFlow's handler the default
    # -I and -S: the standard library is all it needs, and nothing may be found in its place.
    interpreter = [sys.executable, "-I", "-S"]
    os.execv(
        sys.executable, [*interpreter, os.path.abspath(__file__), str(restarts), FOLDER, *command]
    )


def _why_not(restarts: int) -> Optional[str]:
    """What keeps this process from being supervised; None where nothing does."""
    if not isinstance(restarts, int) or isinstance(restarts, bool) or restarts < 1:
        return "give a whole number of restarts from 1 on."
    if tries() is not None:
        return "this process is supervised already."
    problem = why_not_again("fit()", "leave restart_on_crash out")
    if problem is None and os.environ.get("WORLD_SIZE", "1") != "1":
        return (
            "one rank of several cannot be started again alone. Start them with `ofengine launch`, "
            "which starts them all again."
        )
    return problem


def why_not_again(call: str, instead: str) -> Optional[str]:
    """What keeps the command of this process from being run again; None where nothing does.

    Args:
        call: what the user calls, for the sentence.
        instead: what a user can do who has no program in a file.
    """
    main = sys.modules["__main__"]
    # In Python 3.8 it is relative, to where the process was started.
    script = os.path.join(FOLDER, getattr(main, "__file__", None) or "")
    advice = f"Put the program into a file and run that, or {instead}."
    if _in_notebook() or sys.flags.interactive or sys.flags.inspect or hasattr(sys, "ps1"):
        return f"an interactive session cannot be started again. {advice}"
    # A module (-m), a folder or a zip file has a spec; a script does not, but is a file.
    if getattr(main, "__spec__", None) is None and not os.path.isfile(script):
        return f"a program from the command line or a pipe cannot be started again. {advice}"
    if sys.platform != "linux" or not sys.executable:
        return "this works on Linux only, with a Python that knows where it is."
    if threading.current_thread() is not threading.main_thread():
        return f"call {call} in the main thread."
    if _in_child_process():
        return f"call {call} in the process that the command started, not in a child of it."
    if not original_arguments():
        return "the command of this process is not known: is /proc there?"
    return None


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython, "get_ipython", lambda: None)() is not None


def _in_child_process() -> bool:
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


def original_arguments() -> List[str]:
    """The command line of this process, with the interpreter's own options; as `sys.orig_argv`."""
    known = getattr(sys, "orig_argv", None)  # from Python 3.10 on
    if known:
        return list(known)
    try:
        with open("/proc/self/cmdline", "rb") as file:
            return [os.fsdecode(part) for part in file.read().split(b"\0")[:-1]]
    except OSError:
        return []


def close_files_on_exec() -> None:
    """Let go of every file and socket but 0, 1 and 2: OneFlow's keep a port that the child needs.

    Python's own files are closed anyway; those that a C++ library opens often are not.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:  # the listing's own, closed by now
            continue


# ------------------------------------------------------------------ in the supervisor


def _run(restarts: int, folder: str, command: List[str]) -> int:
    """Run ``command`` until it ends without a crash, or too often with one; the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would swallow exit codes
    # One that is ignored, as SIGHUP in nohup, is so in the child too.
    passed_on = {each for each in PASSED_ON if signal.getsignal(each) != signal.SIG_IGN}
    waited_for = frozenset({signal.SIGCHLD, *passed_on})
    # Blocked, signals wait until sigwaitinfo takes them, which also says where they come from.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    prepare = child_preparation(before)
    stopped, started = False, time.time()
    for number in range(1, restarts + 2):
        environment = {**os.environ, VARIABLE: f"{number}:{os.getpid()}:{started}"}
        place = new_place_file()
        environment[PLACE] = str(place)
        begun = time.monotonic()
        child = subprocess.Popen(
            command, cwd=folder, env=environment, preexec_fn=prepare, pass_fds=(place,)
        )
        stopped = _wait_for(child, waited_for) or stopped
        code, seconds = child.returncode, time.monotonic() - begun
        if code >= 0:
            return code
        if stopped or -code not in CRASHES:
            return 128 - code
        died = f"training died of {signal.Signals(-code).name} ({CRASHES[-code]})"
        died = f"ofengine: {died} after {duration(seconds)}{place_in(place)}"
        os.close(place)
        if number > restarts:
            say(f"{died}, and no restart is left of {restarts}. Giving up.")
            return 128 - code
        left = restarts - number
        say(f"{died}. It starts again from the last checkpoint; restarts left after that: {left}.")
    raise AssertionError("not reached")


def place_in(file: int) -> str:
    """At which batch the child was, as it noted in ``file``."""
    noted = os.pread(file, PLACE_SIZE, 0)
    text = noted[8:].rstrip(b"\0").decode("utf-8", "replace")
    return f" at batch {int.from_bytes(noted[:8], sys.byteorder)} {text}" if text else ""


def _wait_for(child: subprocess.Popen[bytes], waited_for: FrozenSet[signal.Signals]) -> bool:
    """Wait until ``child`` has ended, pass signals on to it; True where one asked it to stop."""
    stopped = False
    while child.poll() is None:
        received = signal.sigwaitinfo(waited_for)
        number = received.si_signo
        if number == signal.SIGCHLD:
            continue
        stopped = stopped or number in STOPS
        # Ctrl-C goes to all processes of the terminal, but its end to the session's first alone.
        if received.si_code != _SI_KERNEL or number == signal.SIGHUP:
            child.send_signal(number)
    return stopped


def child_preparation(mask: object) -> Callable[[], None]:
    """What a child does before it runs the command: it takes signals, and dies with its parent."""
    supervisor, libc = os.getpid(), ctypes.CDLL(None)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # type: ignore[arg-type]
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:  # it died before it could be watched
            os._exit(1)

    return prepare


def duration(seconds: float) -> str:
    """``seconds`` as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def say(line: str) -> None:
    """Write ``line`` to stderr."""
    # On a terminal the cursor may stand behind a progress bar. Not through sys.stderr: what
    # could not be written, because the terminal is closed, would be an error again at the end.
    text = f"\n{line}\n" if os.isatty(2) else f"{line}\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


if __name__ == "__main__":
    sys.exit(_run(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
