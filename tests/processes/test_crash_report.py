"""What a crash inside a fit leaves on stderr."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import pytest
from helpers import run_python

from ofengine.processes.crash_report import ADVICE, CrashReport

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}


def run(
    tmp_path: Path, body: str, before: str = "", options: Optional[List[str]] = None
) -> subprocess.CompletedProcess[str]:
    """A process that runs ``body`` inside a CrashReport."""
    script = tmp_path / "script.py"
    inside = body.strip().replace("\n", "\n        ")
    script.write_text(
        f"""
import faulthandler, os, signal, sys
from ofengine.processes.crash_report import CrashReport
{before}
def fit():
    with CrashReport() as report:
        {inside}
fit()
print("after", faulthandler.is_enabled(), flush=True)
"""
    )
    return run_python(*(options or []), script, env=ENVIRONMENT)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_crash_leaves_a_traceback_and_one_sentence(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, f"os.kill(os.getpid(), signal.{name})")
    assert done.returncode == -getattr(signal, name)
    assert done.stderr.startswith("Fatal Python error: ")
    assert "script.py" in done.stderr
    assert ", line 7 in fit\n" in done.stderr
    assert done.stderr.splitlines()[-1] == ADVICE
    assert done.stdout == ""


def test_where_the_run_was_is_said_before_it(tmp_path: Path) -> None:
    body = """
report.place.batch[0] = 6
report.place.note("of train_dataloader in epoch 2", "[4096, 3] float32", 12288)
report.place.batch[0] = 7
report.place.note("of train_dataloader in epoch 2", "[8, 3] float32", 24)
report.place.batch[0] = 9
os.kill(os.getpid(), signal.SIGABRT)
"""
    lines = run(tmp_path, body).stderr.splitlines()
    assert lines[-1] == ADVICE
    assert lines[-3] == (
        "ofengine: Python had come to batch 9 of train_dataloader in epoch 2: [8, 3] float32; the "
        "device may be behind, and the largest before was batch 6 of train_dataloader in epoch 2: "
        "[4096, 3] float32"
    )


def test_forked_workers_do_not_keep_the_sentence_back(tmp_path: Path) -> None:
    body = """
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)  # comes back when the parent is gone
    os._exit(0)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert run(tmp_path, body).stderr.splitlines()[-1] == ADVICE


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("os._exit(4)", 4), ("os.kill(os.getpid(), 9)", -9)],
)
def test_any_other_end_leaves_nothing(tmp_path: Path, body: str, code: int) -> None:
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (code, "")


def test_an_exception_leaves_only_its_own_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "raise ValueError('mine')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1] == "ValueError: mine"


def test_the_crash_of_a_forked_worker_is_not_taken_for_the_process_itself(tmp_path: Path) -> None:
    body = """
worker = os.fork()
if worker == 0:
    os.kill(os.getpid(), signal.SIGSEGV)
os.waitpid(worker, 0)
"""
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout) == (0, "after False\n")
    assert ADVICE not in done.stderr


def test_afterwards_faulthandler_is_off_and_a_crash_says_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "assert faulthandler.is_enabled()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "after False\n", "")


def test_a_faulthandler_of_somebody_else_is_left_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", options=["-X", "faulthandler"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "after True\n", "")
    done = run(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", options=["-X", "faulthandler"])
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")


def test_where_stderr_is_closed_nothing_fails(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", before="os.close(2)")
    assert (done.returncode, done.stdout) == (0, "after False\n")


def test_no_file_and_no_process_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = faulthandler.is_enabled()  # pytest's own
    faulthandler.disable()
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        with CrashReport() as report:
            assert report._reader is not None
            reader = report._reader
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert reader.returncode is not None
        assert not faulthandler.is_enabled()
    finally:
        if enabled:
            faulthandler.enable(file=sys.__stderr__)


def test_a_supervised_process_leaves_the_sentence_to_its_supervisor(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, signal
from ofengine.processes import supervisor
from ofengine.processes.crash_report import CrashReport

if supervisor.tries() is None:
    supervisor.supervise(1)
with CrashReport() as report:
    if supervisor.tries() == 1:
        report.place.batch[0] = 5
        report.place.note("of train_dataloader in epoch 0", "[8, 3] float32", 24)
        os.kill(os.getpid(), signal.SIGSEGV)
"""
    )
    done = run_python(script, env=ENVIRONMENT)
    assert done.returncode == 0
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")
    assert ADVICE not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "ofengine: training died of SIGSEGV" in said
    assert " at batch 5 of train_dataloader in epoch 0: [8, 3] float32; the device" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_memory_that_runs_out_is_told_with_the_batch(tmp_path: Path, mode: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import resource, sys
import oneflow as flow
from oneflow import nn
from ofengine import TaskModule, Trainer

class Task(TaskModule):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(64, 4096)

    def training_step(self, batch, batch_idx):
        return flow.relu(self.wide(batch)).mean()

def batches():
    for _ in range(3):
        yield flow.ones(8, 64)
    # One tensor of 8 GB does not fit, and whatever is small does: a C library without bytes for a
    # thread of its own ends the process with 127 before anyone can tell.
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
    yield flow.ones(500_000, 64)

Trainer(mode=sys.argv[1], max_epochs=1, device="cpu", logger=False).fit(Task(), batches())
"""
    )
    done = run_python(script, mode, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode in (1, -signal.SIGABRT)  # a graph may still be told in time
    assert "allocate failed" in done.stderr
    told = "Python had come to batch 3 of" if done.returncode != 1 else "epoch 0, batch 3 (after"
    assert told in done.stderr
    assert "[500000, 64] float32" in done.stderr
