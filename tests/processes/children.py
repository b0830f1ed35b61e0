"""Python processes that train, and what they say."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import List

START = """
import signal, sys, threading, time
from ofengine import Callback, TaskModule, Trainer
import oneflow as flow
from oneflow import nn

MODE = sys.argv[1]

def say(*words):
    print(*words, flush=True)

class Line(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()
    def validation_step(self, batch, batch_idx):
        self.log("mean", self.layer(batch).mean())

class Tells(Callback):
    def on_exception(self, trainer, task, exception):
        say("on_exception", type(exception).__name__, exception)
    def teardown(self, trainer, task, stage):
        say("teardown", stage)

class Slow(Tells):  # so that a test of a tiny model is not over before the signal comes
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if batch_idx == 2:
            say("ready")
        time.sleep(0.05)
    def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx, loader):
        self.on_train_batch_end(trainer, task, outputs, batch, batch_idx)

def trainer(*callbacks, mode=MODE, **arguments):
    return Trainer(mode=mode, device="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, enable_checkpointing=False,
                   callbacks=list(callbacks), **{"max_epochs": 1, **arguments})

def batches(count):
    return [flow.ones(2, 2)] * count
"""


class Child:
    """A Python process that runs ``START`` and a script."""

    def __init__(self, folder: Path, script: str, mode: str) -> None:
        path = folder / "script.py"
        path.write_text(START + script)
        self.lines: List[str] = []
        self.errors = folder / "stderr"
        with open(self.errors, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(path), mode],
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=str(folder),
                universal_newlines=True,
            )
        # Nothing here is timed; this only ends a test that hangs.
        self.alarm = threading.Timer(120.0, self.process.kill)
        self.alarm.start()

    def until(self, line: str, times: int = 1) -> None:
        """Wait until the process has said ``line`` that many times more."""
        assert self.process.stdout is not None
        for said in self.process.stdout:
            self.lines.append(said.rstrip("\n"))
            times -= self.lines[-1] == line
            if times == 0:
                return
        raise AssertionError(f"never said {line!r}, but {self.lines}\n{self.errors.read_text()}")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the end; the exit code, negative for the signal that ended it."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        code = self.process.wait()
        self.alarm.cancel()
        return code
