"""``ofengine.processes.supervisor``, with scripts that stand in for a training script."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import zipfile
from pathlib import Path
from typing import Dict, List, Optional

import pytest
from helpers import run_python

SCRIPT = """
import os, signal, sys
from ofengine.processes import supervisor

restarts, *plan = sys.argv[1:]
number = supervisor.tries()
if number is None:
    print("no try", flush=True)
    supervisor.supervise(int(restarts))
print("try", number, flush=True)
end = plan[number - 1]
if end.startswith("SIG"):
    signal.signal(getattr(signal, end), signal.SIG_DFL) if end != "SIGKILL" else None
    os.kill(os.getpid(), getattr(signal, end))
sys.exit(int(end))
"""


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    """A script with this text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(
    *arguments: object, stdin: Optional[str] = None, environment: Optional[Dict[str, str]] = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    return run_python(*arguments, input=stdin or "", env={**os.environ, **(environment or {})})


def lines(text: str) -> List[str]:
    """The lines of ``text``."""
    return text.splitlines()


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGKILL"])
def test_after_a_crash_the_script_is_started_again(tmp_path: Path, name: str) -> None:
    done = run(write(tmp_path, SCRIPT), 2, name, 0)
    assert done.returncode == 0
    assert lines(done.stdout) == ["no try", "try 1", "try 2"]
    (line,) = lines(done.stderr)
    assert line.startswith(f"ofengine: training died of {name} (")
    assert line.endswith("starts again from the last checkpoint; restarts left after that: 1.")


def test_when_the_restarts_are_used_up_it_says_so_and_ends_with_128_and_the_signal(
    tmp_path: Path,
) -> None:
    done = run(write(tmp_path, SCRIPT), 2, "SIGSEGV", "SIGABRT", "SIGSEGV", 0)
    assert done.returncode == 128 + signal.SIGSEGV
    assert lines(done.stdout) == ["no try", "try 1", "try 2", "try 3"]
    first, second, third = lines(done.stderr)
    assert "died of SIGSEGV" in first
    assert "died of SIGABRT" in second
    assert third.endswith("no restart is left of 2. Giving up.")


@pytest.mark.parametrize("code", [0, 1, 3, 139])
def test_an_exit_code_is_handed_on(tmp_path: Path, code: int) -> None:
    done = run(write(tmp_path, SCRIPT), 2, code, 0)
    assert (done.returncode, lines(done.stdout), done.stderr) == (code, ["no try", "try 1"], "")


def test_a_signal_that_is_no_crash_is_not_followed_by_a_restart(tmp_path: Path) -> None:
    done = run(write(tmp_path, SCRIPT), 2, "SIGTERM", 0)
    assert done.returncode == 128 + signal.SIGTERM
    assert lines(done.stdout) == ["no try", "try 1"]


def test_nothing_of_the_script_runs_after_supervise(tmp_path: Path) -> None:
    text = """
import atexit, sys
from ofengine.processes import supervisor

atexit.register(print, "atexit", supervisor.tries())
try:
    if supervisor.tries() is None:
        supervisor.supervise(1)
finally:
    print("finally", supervisor.tries())
"""
    assert lines(run(write(tmp_path, text)).stdout) == ["finally 1", "atexit 1"]


# ---------------------------------------------------------------------- signals

WAITING = """
import os, signal, sys
from ofengine.processes import supervisor

if supervisor.tries() is None:
    supervisor.supervise(3)
received = []

def receive(number, frame):
    received.append(signal.Signals(number).name)
    if number == signal.SIGUSR1:
        print(*received, flush=True)
        os._exit(7)
    if number == signal.SIGUSR2:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    print("received", flush=True)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, receive)
print("ready", os.getpid(), flush=True)
while True:
    signal.pause()
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """Start the script above and wait until it is ready."""
    process = subprocess.Popen(
        [sys.executable, str(write(tmp_path, WAITING))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    return process


def test_signals_are_passed_on_to_the_child(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        assert process.stdout.readline() == "received\n"
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate()
    assert (process.returncode, out) == (7, "SIGINT SIGTERM SIGHUP SIGUSR1\n")


def test_a_crash_after_it_was_asked_to_stop_is_the_end(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "received\n"
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate()
    assert (process.returncode, out) == (128 + signal.SIGSEGV, "")


def test_the_child_dies_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.kill()
    out, _ = process.communicate()  # ends when nobody, the child included, has it open any more
    assert (process.returncode, out) == (-signal.SIGKILL, "")


def test_ctrl_c_in_the_terminal_reaches_the_child_once(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(write(tmp_path, WAITING))],
        stdin=slave,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    os.write(master, b"\x03")
    assert process.stdout.readline() == "received\n"
    process.send_signal(signal.SIGUSR1)  # passed on after whatever the Ctrl-C has led to
    out, _ = process.communicate()
    os.close(master)
    assert (process.returncode, out) == (7, "SIGINT SIGUSR1\n")


# ---------------------------------------------------------------------- the same command

SHOW = """
import os, sys
from ofengine.processes import supervisor

if sys.argv[-1] != "alone" and supervisor.tries() is None:
    sys.argv[1:] = ["changed by the script"]
    supervisor.supervise(1)
print(sys.argv[1:-1], sys.flags, sys.warnoptions, sys._xoptions, __name__, __package__)
"""


def test_the_child_runs_with_the_same_options_and_arguments(tmp_path: Path) -> None:
    options = ["-O", "-B", "-X", "utf8", "-W", "error::ImportWarning", "-u"]
    script = write(tmp_path, SHOW)
    alone = run(*options, script, "--lr", "-c", "", "ü b", "alone")
    done = run(*options, script, "--lr", "-c", "", "ü b", "supervised")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert "['--lr', '-c', '', 'ü b']" in done.stdout


@pytest.mark.parametrize("how", ["module", "package", "folder", "zip"])
def test_every_kind_of_program_is_found_again(tmp_path: Path, how: str) -> None:
    if how == "module":
        write(tmp_path, SHOW, "program.py")
        command = ["-m", "program"]
    elif how == "package":
        write(tmp_path, "", "program/__init__.py")
        write(tmp_path, SHOW, "program/__main__.py")
        command = ["-m", "program"]
    elif how == "folder":
        write(tmp_path, SHOW, "program/__main__.py")
        command = ["program"]
    else:
        with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
            archive.writestr("__main__.py", SHOW)
        command = ["program.zip"]
    alone, done = run(*command, "x", "alone"), run(*command, "x", "supervised")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert "['x']" in done.stdout


def test_without_sys_orig_argv_the_command_is_found_in_proc(tmp_path: Path) -> None:
    text = "import sys\nif hasattr(sys, 'orig_argv'): del sys.orig_argv\n" + SHOW
    script = write(tmp_path, text)
    alone, done = run("-O", script, "", "x", "alone"), run("-O", script, "", "x", "supervised")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout


def test_the_child_starts_in_the_folder_where_the_command_was_given(tmp_path: Path) -> None:
    text = """
import os
from ofengine.processes import supervisor

print(os.path.basename(os.getcwd()), flush=True)
os.chdir("/")
if supervisor.tries() is None:
    supervisor.supervise(1)
"""
    write(tmp_path, text)
    assert lines(run("script.py").stdout) == [tmp_path.name] * 2


def test_a_port_that_a_library_holds_is_free_for_the_child(tmp_path: Path) -> None:
    text = """
import os, socket
from ofengine.processes import supervisor

number = supervisor.tries()
if number is None:
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.listen()
    held.set_inheritable(True)  # as in C++
    os.environ["TEST_PORT"] = str(held.getsockname()[1])
    supervisor.supervise(1)
socket.socket().bind(("127.0.0.1", int(os.environ["TEST_PORT"])))
print("free")
"""
    done = run(write(tmp_path, text))
    assert done.stdout == "free\n", done.stderr


def test_processes_that_the_child_starts_are_not_supervised(tmp_path: Path) -> None:
    text = """
import subprocess, sys
from ofengine.processes import supervisor

if supervisor.tries() is None:
    supervisor.supervise(1)
program = "from ofengine.processes import supervisor; print(supervisor.tries())"
subprocess.run([sys.executable, "-c", program])
"""
    assert run(write(tmp_path, text)).stdout == "None\n"


# ---------------------------------------------------------------------- refused

CALL = """
from ofengine.processes import supervisor
from ofengine.errors import ConfigurationError
try:
    supervisor.supervise(1)
except ConfigurationError as error:
    print(error)
"""


def test_python_c_is_refused() -> None:
    assert "a program from the command line or a pipe cannot be" in run("-c", CALL).stdout


def test_a_program_on_stdin_is_refused() -> None:
    assert "a program from the command line or a pipe cannot be" in run(stdin=CALL).stdout
    assert "a program from the command line or a pipe cannot be" in run("-", stdin=CALL).stdout


def test_an_interactive_session_is_refused(tmp_path: Path) -> None:
    assert "an interactive session" in run("-i", write(tmp_path, CALL)).stdout


def test_a_notebook_is_refused(tmp_path: Path) -> None:
    notebook = """
import sys, types
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: object())
"""
    assert "an interactive session" in run(write(tmp_path, notebook + CALL)).stdout


def test_one_rank_of_several_is_refused(tmp_path: Path) -> None:
    done = run(write(tmp_path, CALL), environment={"WORLD_SIZE": "2"})
    assert "one rank of several cannot be started again alone" in done.stdout


def test_another_thread_is_refused(tmp_path: Path) -> None:
    body = CALL.strip().replace("\n", "\n    ")
    text = f"""
import threading
def call():
    {body}
thread = threading.Thread(target=call)
thread.start()
thread.join()
"""
    assert "call fit() in the main thread" in run(write(tmp_path, text)).stdout


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_multiprocessing_is_refused(tmp_path: Path, method: str) -> None:
    body = CALL.strip().replace("\n", "\n    ")
    text = f"""
import multiprocessing
def call():
    {body}
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=call)
    process.start()
    process.join()
"""
    assert "not in a child of it" in run(write(tmp_path, text)).stdout


@pytest.mark.parametrize("restarts", ["0", "-1", "True", "1.5", "None", "'2'"])
def test_a_number_of_restarts_that_is_none_is_refused(tmp_path: Path, restarts: str) -> None:
    text = CALL.replace("supervise(1)", f"supervise({restarts})")
    done = run(write(tmp_path, text))
    assert f"restart_on_crash={restarts}: give a whole number" in done.stdout


def test_a_supervised_process_is_refused(tmp_path: Path) -> None:
    text = (
        "from ofengine.processes import supervisor\n"
        "if not supervisor.tries(): supervisor.supervise(1)\n"
    )
    assert "is supervised already" in run(write(tmp_path, text + CALL)).stdout


# ---------------------------------------------------------------------- with OneFlow


@pytest.mark.slow
def test_with_oneflow_at_work_in_both_processes(tmp_path: Path) -> None:
    text = """
import faulthandler, os, signal
import oneflow as flow
from ofengine.processes import supervisor

print(supervisor.tries(), (flow.ones(2) * 3).numpy().sum(), flush=True)
if supervisor.tries() is None:
    supervisor.supervise(1)
if supervisor.tries() == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
"""
    done = run(write(tmp_path, text))
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == ["None 6.0", "1 6.0", "2 6.0"]
