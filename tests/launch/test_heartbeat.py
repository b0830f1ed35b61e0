"""What a rank's loops pay for being watched, and that all loops are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, List

import pytest
from launching import PRELUDE, launch, program

from ofengine.launch import heartbeat

COUNT_FRAMES = """
frames = []
sys.setprofile(lambda frame, event, argument: frames.append(event))
for step in range(100):
    heartbeat.beat()
sys.setprofile(None)
print(heartbeat.connected, frames.count("call"))
"""


def test_a_beat_calls_no_python_alone() -> None:
    frames: List[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        frames.append(event)

    sys.setprofile(profile)
    for _ in range(100):
        heartbeat.beat()
    sys.setprofile(None)
    assert not heartbeat.connected
    assert frames.count("call") == 0


def test_a_beat_calls_no_python_in_a_rank(tmp_path: Path) -> None:
    script = program(tmp_path, COUNT_FRAMES, prelude=PRELUDE.replace("world.rank", "0"))
    script.write_text(script.read_text().replace("world = environment.read()", ""))
    done = launch(tmp_path, "--nproc", 1, script)
    assert (done.stdout, done.stderr) == ("True 0\n", "")


FITS = """
import oneflow as flow
from oneflow import nn
from ofengine import Callback, TaskModule, Trainer
from ofengine.launch import heartbeat, slot

numbers = heartbeat._told.numbers

def beats():
    return numbers[slot.BEATS], numbers[slot.BEGUN], numbers[slot.ENDED]

class Line(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()
    def validation_step(self, batch, batch_idx):
        self.log("x", self.layer(batch).mean())
    def predict_step(self, batch, batch_idx):
        return self.layer(batch)
    def configure_optimizers(self):
        return flow.optim.SGD(self.parameters(), lr=0.1)

class Stops(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        raise RuntimeError("enough")

quiet = dict(device="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
             enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
data = [flow.ones(2, 2)] * 3
trainer = Trainer(**quiet)
trainer.fit(Line(), data, data[:2])
print(beats())
trainer.predict(Line(), data)
print(beats())
try:
    Trainer(callbacks=[Stops()], **quiet).fit(Line(), data)
except RuntimeError:
    print(beats(), numbers[slot.LEAVING])
trainer.predict(Line(), data)
print(beats(), numbers[slot.LEAVING])
"""


def test_every_loop_of_every_verb_beats(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 1, program(tmp_path, FITS, prelude=""))
    assert done.stdout.splitlines() == [
        "(5, 1, 1)",
        "(8, 2, 2)",
        "(9, 3, 2) 2",
        "(12, 4, 4) 0",
    ], done.stderr


@pytest.mark.parametrize("how", ["fork", pytest.param("subprocess", marks=pytest.mark.slow)])
def test_a_process_that_a_rank_has_started_is_no_rank(tmp_path: Path, how: str) -> None:
    text = """
with heartbeat.verb:
    if rank == 1:
        pass
    elif sys.argv[1] == "fork":
        pid = os.fork()
        if pid == 0:
            raise ValueError("in the child")  # runs excepthook and atexit
        os.waitpid(pid, 0)
    else:
        code = "from ofengine.launch import heartbeat as h; h.beat(); print(h.connected)"
        subprocess.run([sys.executable, "-c", code])
    time.sleep(1.0)
"""
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, text), how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if how == "fork" else "False\n")
