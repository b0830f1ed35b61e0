"""Terminals that are closed, signals to a whole group, jobs in the background, workers that hang.

Each run is a process of its own, in a session of its own, and gets real signals.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any, Iterator, List, Optional

import oneflow as flow
import pytest
from children import START
from helpers import bits, quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader

from ofengine import TaskModule

# What a run says goes into a pipe, for a terminal that is closed shows nothing: that is descriptor
# 0, since a supervisor hands on this one and 1 and 2.
SCRIPT = (
    START
    + """
import os
from oneflow.utils.data import DataLoader

def say(*words):
    os.write(0, (" ".join(map(str, words)) + "\\n").encode())

class Saves(Slow):
    def on_exception(self, trainer, task, exception):
        time.sleep(0.3)  # time for a signal that comes twice
        super().on_exception(trainer, task, exception)

def fit(data, task=None, **arguments):
    arguments = {"enable_progress_bar": False, "enable_model_summary": False, **arguments}
    Trainer(mode=MODE, device="cpu", max_epochs=1, logger=False, callbacks=[Saves()],
            **arguments).fit(task or Line(), data)
    say("finished")
"""
)
SLOW = pytest.mark.slow
IN_BACKGROUND = "exec 3<&0; {} <&3 & wait"  # or its descriptor 0 is /dev/null
TRAIN = "fit(batches(2000))"
SUPERVISED = "fit(batches(2000), restart_on_crash=2)"


class Session:
    """A shell that runs a script, as the first process of a session.

    Args:
        folder: where it runs, and keeps its checkpoints.
        script: what is run, behind ``SCRIPT``.
        command: what the shell does; ``{}`` is the command that runs the script.
        terminal: True for a terminal of its own, on which everything is written.
    """

    def __init__(self, folder: Path, script: str, command: str, terminal: bool) -> None:
        (folder / "script.py").write_text(SCRIPT + script)
        self.folder = folder
        self.lines: List[str] = []
        self.code: Optional[int] = None
        self._notes, write = os.pipe()
        self._rest = b""
        self._terminal, slave = pty.openpty() if terminal else (-1, -1)
        self._errors = folder / "stderr"
        with open(self._errors, "wb") as errors:
            out: Any = slave if terminal else errors
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", command.replace("{}", f"{sys.executable} script.py eager")],
                cwd=str(folder),
                stdin=write,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_take_terminal if terminal else None,
            )
        os.close(write)
        if terminal:
            os.close(slave)
        # Nothing here is timed; this only ends a test that hangs.
        self._alarm = threading.Timer(120.0, self._kill)
        self._alarm.start()

    def _read(self) -> bool:
        """Take note of what was said; False once nobody is left who could say anything."""
        terminal = [] if self._terminal < 0 else [self._terminal]
        readable, _, _ = select.select([self._notes, *terminal], [], [])
        for descriptor in set(terminal).intersection(readable):
            with contextlib.suppress(OSError):  # the terminal's other side is closed
                os.read(descriptor, 65536)
        if self._notes not in readable:
            return True
        read = os.read(self._notes, 65536)
        *lines, self._rest = (self._rest + read).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(read)

    def until(self, line: str) -> None:
        """Wait until a line was said that begins so."""
        while not any(said.startswith(line) for said in self.lines):
            assert self._read(), f"never said {line!r}, but {self.lines}\n{self.errors}"

    def send(self, number: int) -> None:
        """Send a signal to all processes of the group."""
        os.killpg(self.process.pid, number)

    def close_terminal(self) -> None:
        """What the kernel does where a window is closed, or a connection lost."""
        os.close(self._terminal)
        self._terminal = -1

    def end(self) -> List[str]:
        """Wait until all processes have ended; what was said."""
        while self._read():
            pass
        self.code = self.process.wait()
        self._alarm.cancel()
        return [line for line in self.lines if line != "ready"]

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.safetensors"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)

    def close(self) -> None:
        self._alarm.cancel()
        self._kill()
        self.process.wait()
        os.close(self._notes)
        if self._terminal >= 0:
            os.close(self._terminal)


def _take_terminal() -> None:
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Any]:
    begun: List[Session] = []

    def begin(script: str, command: str = "exec {}", terminal: bool = False) -> Session:
        begun.append(Session(tmp_path, script, command, terminal))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


def in_order(code: int) -> List[str]:
    """What is said where a run is ended once, by this exit code."""
    return [f"on_exception SystemExit {code}", "teardown fit"]


# ---------------------------------------------------------------------- a terminal that is closed

PRINTS = """
class Prints(Line):
    def on_train_batch_end(self, *_):
        print("a line of the user's", flush=True)
    def on_exception(self, exception):
        print("a line of the user's, to a terminal that is gone", flush=True)
"""


@pytest.mark.parametrize(
    ("command", "script"),
    [
        pytest.param("exec {}", TRAIN, marks=SLOW),
        ("{}; :", "fit(batches(2000), enable_progress_bar=True)"),  # the shell goes first
        ("exec {}", PRINTS + "fit(batches(2000), task=Prints(), enable_progress_bar=True)"),
        ("exec {}", SUPERVISED),
    ],
    ids=["alone", "under a shell", "printing", "supervised"],
)
def test_a_terminal_that_is_closed_ends_the_run_in_order(
    session: Any, command: str, script: str
) -> None:
    run = session(script, command, terminal=True)
    run.until("ready")
    run.close_terminal()
    assert run.end() == in_order(129)
    assert run.last.exists()
    assert run.code == (129 if command == "exec {}" else -signal.SIGHUP)


def test_a_run_that_nohup_started_outlives_its_terminal(session: Any) -> None:
    """With a bar on a terminal that is no longer there."""
    run = session(
        "fit(batches(20), enable_progress_bar=True)", "trap '' HUP; exec {}", terminal=True
    )
    run.until("ready")
    run.close_terminal()
    assert run.end() == ["teardown fit", "finished"]
    assert run.code == 0


def test_a_crash_without_a_terminal_is_followed_by_a_restart_too(session: Any) -> None:
    run = session(
        """
from ofengine.processes import supervisor
class Dies(Line):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if supervisor.tries() == 1 and batch_idx == 2:
            say("ready to die")
            while os.isatty(2):  # until it is closed
                time.sleep(0.01)
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
fit(batches(5), task=Dies(), restart_on_crash=1)
""",
        "trap '' HUP; ulimit -c 0; exec {}",
        terminal=True,
    )
    run.until("ready to die")
    run.close_terminal()
    assert run.end()[-1] == "finished"
    assert run.code == 0


def test_a_sighup_that_means_something_to_the_program_is_left_to_it(session: Any) -> None:
    run = session(
        """
signal.signal(signal.SIGHUP, lambda *_: say("my own"))
fit(batches(20))
"""
    )
    run.until("ready")
    run.send(signal.SIGHUP)
    assert run.end() == ["my own", "teardown fit", "finished"]


# ---------------------------------------------------------------------- a whole group


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=SLOW) for n in (signal.SIGHUP, signal.SIGINT))],
)
def test_a_signal_to_the_group_of_a_supervised_run_is_one(session: Any, number: int) -> None:
    """It reaches the child twice, and would end it in the middle of what the first one began."""
    run = session(SUPERVISED)
    run.until("ready")
    run.send(number)
    said = run.end()
    if number == signal.SIGINT:
        assert said == ["on_exception KeyboardInterrupt ", "teardown fit"]
    else:
        assert said == in_order(128 + number)
        assert run.code == 128 + number
    assert run.last.exists()


def test_sighup_behind_sigterm_is_no_second_signal(session: Any) -> None:
    """As systemd sends them with ``SendSIGHUP=yes``."""
    run = session(TRAIN)
    run.until("ready")
    run.send(signal.SIGTERM)
    run.send(signal.SIGHUP)
    assert run.end() == in_order(run.code or 0)
    assert run.code in (143, 129)  # the kernel hands over the lower number first, if both wait
    assert run.last.exists()


def test_workers_work_on_when_the_group_is_interrupted(session: Any) -> None:
    """Or the run would fail in a later batch of the same window, for want of its workers."""
    run = session(
        """
class Reads:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return flow.ones(2)
fit(DataLoader(Reads(), batch_size=1, num_workers=2), accumulate_grad_batches=2)
"""
    )
    run.until("ready")
    run.send(signal.SIGINT)
    assert run.end() == ["on_exception KeyboardInterrupt ", "teardown fit"]
    assert run.last.exists()
    assert "exited unexpectedly" not in run.errors


# ---------------------------------------------------------------------- in the background


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("fit(batches(30))", marks=SLOW),
        pytest.param("fit(batches(30), restart_on_crash=1)", id="supervised"),
    ],
)
def test_the_ctrl_c_that_a_background_job_ignores_is_not_its_own(session: Any, script: str) -> None:
    """A shell without job control has its jobs in its own group, and lets them ignore SIGINT."""
    run = session(script, IN_BACKGROUND)
    run.until("ready")
    run.send(signal.SIGINT)
    assert run.end() == ["teardown fit", "finished"]
    assert run.code == -signal.SIGINT  # the shell's


def test_the_workers_of_a_background_job_ignore_it_as_well(session: Any) -> None:
    run = session(
        """
class Reads:
    def __len__(self):
        return 30
    def __getitem__(self, index):
        return flow.ones(2)
fit(DataLoader(Reads(), batch_size=1, num_workers=2))
""",
        IN_BACKGROUND,
    )
    run.until("ready")
    run.send(signal.SIGINT)
    assert run.end() == ["teardown fit", "finished"]


# ---------------------------------------------------------------------- data that does not come


class Numbers:
    """Each sample is its number."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return flow.ones(2) * index / 8


class Own:
    """A user's own iterable, with a DataLoader in it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


class Weighs(TaskModule):
    """Its weights tell which samples came, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.constant_(self.layer.bias, 0.25)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


HANGS = """
class Weighs(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.constant_(self.layer.bias, 0.25)
    def training_step(self, batch, batch_idx):
        return (self.layer(batch) ** 2).mean()
    def configure_optimizers(self):
        return flow.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)

class Hangs:
    def __init__(self, blocked):
        self.blocked = blocked
    def __len__(self):
        return 24
    def __getitem__(self, index):
        if index == 16:
            if self.blocked:  # as in C++ that never comes back, where no handler of Python's runs
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
            say("hangs")
            while True:
                time.sleep(60)
        return flow.ones(2) * index / 8

class Own:
    def __init__(self, loader):
        self.loader = loader
    def __len__(self):
        return len(self.loader)
    def __iter__(self):
        for batch in self.loader:
            yield batch

def loader(workers, blocked=False, **options):
    return DataLoader(Hangs(blocked), batch_size=2, num_workers=workers, **options)
"""


@pytest.mark.parametrize(
    ("data", "number"),
    [
        pytest.param("loader(2)", signal.SIGTERM, marks=SLOW),
        ("loader(3, blocked=True, persistent_workers=True)", signal.SIGHUP),
        pytest.param("Own(loader(1, blocked=True))", signal.SIGTERM, marks=SLOW),
        ("loader(0)", signal.SIGTERM),
    ],
    ids=["in Python", "in C++", "in an iterable", "in the run itself"],
)
def test_a_run_whose_data_hangs_is_saved_and_ends(session: Any, data: str, number: int) -> None:
    run = session(f"{HANGS}\nfit({data}, task=Weighs())")
    run.until("hangs")
    run.until("ready")
    run.send(number)
    assert [line for line in run.end() if line != "hangs"] == in_order(128 + number)
    assert run.code == 128 + number

    def data_that_comes() -> Any:
        loader = DataLoader(Numbers(), batch_size=2)
        return Own(loader) if data.startswith("Own") else loader

    whole, resumed = Weighs(), Weighs()
    quiet_trainer(max_epochs=1).fit(whole, data_that_comes())
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True)
    trainer.fit(resumed, data_that_comes(), ckpt_path=run.last)
    assert bits(resumed) == bits(whole)
    assert trainer.global_step == 12


@pytest.mark.slow
def test_validation_data_that_hangs_is_not_waited_for_either(session: Any) -> None:
    run = session(
        HANGS
        + """
class Validates(Weighs):
    def validation_step(self, batch, batch_idx):
        self.log("val", batch.mean())
task = Validates()
Trainer(mode=MODE, device="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Saves()], num_sanity_val_steps=0,
        ).fit(task, batches(4), loader(2, blocked=True))
"""
    )
    run.until("hangs")
    run.send(signal.SIGTERM)
    said = [line for line in run.end() if line != "hangs"]
    assert said == in_order(143)
    assert run.last.exists()


def test_a_process_that_the_run_s_own_code_forks_ends_as_without_the_run(session: Any) -> None:
    run = session(
        """
import multiprocessing
class Forks(Line):
    def on_train_start(self):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        process.start()
        process.terminate()
        process.join()
        say("ended by", process.exitcode)
fit(batches(3), task=Forks())
"""
    )
    assert run.end() == [f"ended by {-signal.SIGTERM}", "teardown fit", "finished"]
