"""A script that starts its own ranks: one that dies, a signal, and how the run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import hashlib, os, signal, sys
import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset
from ofengine import Callback, TaskModule, Trainer, rank_zero_only
from ofengine.processes import supervisor

how, devices = sys.argv[1], int(sys.argv[2])

class Line(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.2)
    def training_step(self, batch, batch_idx):
        return (self.layer(self.dropout(batch[0])) - 1.0).square().mean()
    def configure_optimizers(self):
        return flow.optim.AdamW(self.parameters(), lr=0.05)

class Dies(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if how == "waits" and trainer.global_step == 5:
            open(f"ready-{trainer.global_rank}", "w").close()
            while trainer._run.interrupts.received is None:
                pass
        if how == "dies" and trainer.global_step == 5 and trainer.global_rank == 1:
            if supervisor.tries() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

rng = np.random.default_rng(0)
data = TensorDataset(flow.tensor(rng.standard_normal((24, 3)).astype(np.float32)))
from ofengine.callbacks import ModelCheckpoint
flow.manual_seed(3)
task = Line()
trainer = Trainer(
    device="cpu", devices=devices, accumulate_grad_batches=2 // devices, max_epochs=3, seed=1,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Dies(), ModelCheckpoint(dirpath="kept", every_n_train_steps=2)],
    restart_on_crash=1 if how == "dies" else 0,
)
trainer.fit(task, DataLoader(data, batch_size=2, shuffle=True),
            ckpt_path="last" if how == "goes on" else None)
kept = hashlib.sha256()
for name, each in sorted(task.state_dict().items()):
    kept.update(np.ascontiguousarray(each.numpy()).tobytes())
rank_zero_only(print)("weights", kept.hexdigest(), "step", trainer.global_step)
"""


def start(folder: Path, how: str, devices: int) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "script.py", how, str(devices)], cwd=folder, text=True,
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def run(folder: Path, how: str, devices: int) -> Tuple[List[str], str]:
    """What it printed of its weights, and what it wrote to stderr."""
    process = start(folder, how, devices)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return re.findall("weights.*", out), err


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """One process that accumulates two batches."""
    return run(tmp_path_factory.mktemp("alone"), "trains", 1)[0]


@pytest.mark.slow
def test_ranks_that_start_again_after_a_crash_come_to_the_same_weights(
    alone: List[str], tmp_path: Path
) -> None:
    weights, err = run(tmp_path, "dies", 2)
    assert weights == alone
    (told,) = [line for line in err.splitlines() if line.startswith("ofengine: after")]
    assert "rank 1 of 2" in told
    assert "died of SIGKILL" in told and " at batch 4 of train_dataloader" in told
    assert "All ranks start again from the last checkpoint" in told


@pytest.mark.slow
def test_a_signal_saves_once_and_one_process_goes_on(alone: List[str], tmp_path: Path) -> None:
    process = start(tmp_path, "waits", 2)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.count("saved ") == 1 and "Traceback" not in err
    assert run(tmp_path, "goes on", 1)[0] == alone
