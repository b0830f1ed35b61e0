"""Ranks of OneFlow: they meet, train, and end together, on one host and on two."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List

import numpy as np
import pytest
from launching import end, launch, program, start, wait_for_files

RANKS = """
import os, signal, sys, time
import oneflow as flow
from ofengine.launch import environment, heartbeat

world = environment.read()
rank, folder = world.rank, os.environ["FOLDER"]

def write(name, text=""):
    with open(os.path.join(folder, f"{name}-{rank}"), "w") as file:
        file.write(str(text))

def stay_here():
    time.sleep(1000)

write("pid", os.getpid())
assert (flow.env.get_rank(), flow.env.get_world_size()) == (rank, world.world_size)
assert flow.env.get_local_rank() == world.local_rank
last = world.world_size - 1
ones = flow.ones(2)
with heartbeat.verb:
    for step in range(5):
        heartbeat.beat()
        if step == 3 and rank == last:
            how = sys.argv[1]
            if how == "raise":
                raise ValueError("no more")
            if how == "sys.exit":
                sys.exit(3)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                stay_here()
        with heartbeat.exchange:
            flow.comm.all_reduce(ones)
            total = float(ones.sum().numpy())
sys.stdout.write(f"sum {total}\\n")  # at once: both ranks write
"""

FIT = """
import os, sys, time
import oneflow as flow
from oneflow import nn
from ofengine import Callback, TaskModule, Trainer

rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]

def write(name, text=""):
    with open(os.path.join(folder, f"{name}-{rank}"), "w") as file:
        file.write(str(text))

class Line(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            write("ready")
        time.sleep(0.01)
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return flow.optim.SGD(self.parameters(), lr=0.1)

class Saves(Callback):
    def on_exception(self, trainer, task, error):
        with open(os.path.join(folder, f"saved-{rank}"), "a") as file:
            file.write(type(error).__name__ + " ")

write("pid", os.getpid())
trainer = Trainer(mode="eager", device="cpu", max_epochs=1, logger=False, callbacks=[Saves()],
                  enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False)
trainer.fit(Line(), [flow.ones(2, 2)] * 100_000)
"""

TRAIN = """
import os, sys
import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset
from ofengine import TaskModule, Trainer

mode, batch_size, accumulate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
x, y = rng.standard_normal((46, 6)).astype(np.float32), rng.integers(0, 3, 46)

class Net(TaskModule):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    def training_step(self, batch, batch_idx):
        hidden = self.first(batch[0])
        if mode == "eager":
            hidden = self.norm(hidden)
        loss = nn.functional.cross_entropy(self.last(hidden.relu()), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss
    def configure_optimizers(self):
        return flow.optim.AdamW(self.parameters(), lr=0.02)

flow.manual_seed(0)
task, data = Net(), TensorDataset(flow.tensor(x), flow.tensor(y))
trainer = Trainer(mode=mode, device="cpu", seed=5, max_epochs=2, gradient_clip_val=0.5,
                  accumulate_grad_batches=accumulate, enable_progress_bar=False,
                  enable_model_summary=False, default_root_dir=os.environ["FOLDER"])
trainer.fit(task, DataLoader(data, batch_size=batch_size, shuffle=True))
name = f"{trainer.global_rank}-of-{trainer.world_size}.npz"
np.savez(os.path.join(os.environ["FOLDER"], name), steps=trainer.global_step,
         loss=trainer.callback_metrics["loss"],
         **{name: each.numpy() for name, each in task.state_dict().items()})
"""


def test_a_rank_of_oneflow_that_raises_ends_all(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, RANKS, prelude=""), "raise")
    assert done.returncode == 1
    assert done.stderr.count("ValueError: no more") == 1
    assert "rank 1 of 2" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_of_oneflow_that_are_well_end_well(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, RANKS, prelude=""), "well")
    assert (done.returncode, done.stdout) == (0, "sum 64.0\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("sys.exit", 3, "by sys.exit(3) while rank 0"),
        ("kill", 137, "died of SIGKILL"),
        ("hang", 1, "hung for more than 10 s"),
    ],
)
def test_a_rank_of_oneflow_that_dies_ends_all(
    tmp_path: Path, how: str, code: int, said: str
) -> None:
    script = program(tmp_path, RANKS, prelude="")
    done = launch(tmp_path, "--nproc", 2, "--hang-timeout", 10, script, how)
    assert done.returncode == code
    assert "rank 1 of 2" in done.stderr.splitlines()[-1]
    assert said in done.stderr.splitlines()[-1]
    assert ("in stay_here" in done.stderr) == (how == "hang")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_stops_every_fit_once(tmp_path: Path, number: signal.Signals) -> None:
    script = program(tmp_path, FIT, prelude="")
    process = start(tmp_path, "--nproc", 2, script, start_new_session=True)
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    os.killpg(process.pid, number)
    done = end(process, tmp_path)
    assert done.returncode == 128 + number
    raised = "KeyboardInterrupt " if number == signal.SIGINT else "SystemExit "
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [raised, raised]


@pytest.mark.slow
def test_oneflow_s_own_launcher_starts_ranks_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "oneflow.distributed.launch", "--nproc_per_node", "2"]
    script = program(tmp_path, RANKS.replace('"raise"', '"raised"'), prelude="")
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [*command, str(script), "well"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 64.0") == 2


# ---------------------------------------------------------------------- two hosts


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[List[str]]:
    """Two network namespaces with a cable between them: nothing else do they share."""
    names = [f"ofengine-{os.getpid()}-{each}" for each in "ab"]
    try:
        command("ip", "netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("making network namespaces takes `ip` and root")
    ends = [f"ofe{os.getpid()}{each}" for each in "ab"]
    try:
        command("ip", "netns", "add", names[1])
        of_second = ["peer", "name", ends[1], "netns", names[1]]
        command("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", *of_second)
        for number, (name, cable) in enumerate(zip(names, ends), 1):
            inside = ["ip", "-n", name]
            command(*inside, "addr", "add", f"10.99.0.{number}/24", "dev", cable)
            command(*inside, "link", "set", "lo", "up")
            command(*inside, "link", "set", cable, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                command("ip", "netns", "del", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"), [("well", 0), ("raise", 1), ("kill", 137), ("sys.exit", 3), ("hang", 1)]
)
def test_two_hosts(tmp_path: Path, hosts: List[str], how: str, code: int) -> None:
    script = program(tmp_path, RANKS, prelude="")
    of_all = ["--nproc", 1, "--nnodes", 2, "--master-addr", "10.99.0.1", "--hang-timeout", 10]
    processes = [
        start(
            tmp_path, *of_all, "--node-rank", node, script, how,
            within=["ip", "netns", "exec", hosts[node]],
        )
        for node in (1, 0)
    ]  # fmt: skip
    second, first = [each.communicate(timeout=120) for each in processes]
    assert [each.returncode for each in processes] == [code, code], (first, second)
    if how == "well":
        assert first[0] == "sum 64.0\n"
    else:
        assert "rank 1 of 2, on host" in first[1].splitlines()[-1]
        assert (
            first[1].splitlines()[-1].split(" rank ")[1]
            == (second[1].splitlines()[-1].split(" rank ")[1])
        )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_fit_on_two_hosts_is_that_of_one_process(
    tmp_path: Path, hosts: List[str], mode: str
) -> None:
    script = program(tmp_path, TRAIN, prelude="")
    of_all = ["--nproc", 1, "--nnodes", 2, "--master-addr", "10.99.0.1"]
    processes = [
        start(
            tmp_path, *of_all, "--node-rank", node, script, mode, 4, 1,
            within=["ip", "netns", "exec", hosts[node]],
        )
        for node in (1, 0)
    ]  # fmt: skip
    said = [each.communicate(timeout=120) for each in processes]
    assert [each.returncode for each in processes] == [0, 0], said
    alone = ["graph", "8", "1"] if mode == "graph" else ["eager", "4", "2"]
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(
        [sys.executable, str(script), *alone],
        env={**os.environ, "FOLDER": str(tmp_path), "PYTHONPATH": root}, check=True,
    )  # fmt: skip

    def found(name: str) -> Dict[str, np.ndarray]:
        return dict(np.load(tmp_path / f"{name}.npz"))

    first, second, one = map(found, ("0-of-2", "1-of-2", "0-of-1"))
    assert first["steps"] == 12
    for name, each in one.items():
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], each, rtol=0, atol=1e-6 * (mode == "graph"))
    saved = [path.parent.name for path in tmp_path.rglob("*.safetensors")]
    assert len(saved) == 2  # of both runs, and of one rank each
