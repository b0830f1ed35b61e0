"""Checkpoint files and the disk: old versions, other models, failed and killed writing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from flowvision.models import shufflenet_v2_x0_5
from helpers import (
    assert_same_weights,
    bits,
    fill_deterministically,
    quiet_trainer,
    run_python,
    weights_of,
)
from helpers.tiny import Tiny, tiny_batches
from oneflow import nn
from safetensors.numpy import save_file

from ofengine import CheckpointError, TaskModule
from ofengine.checkpoint import encode, load_weights, put, read, remove_leftovers, save_weights

FILES = Path(__file__).parent / "files"
V1 = FILES / "weights_v1.safetensors"
"""``Tiny()`` before any training, written by the code of format version 1."""
V2 = FILES / "checkpoint_v2.safetensors"
"""``Tiny`` after 5 of 6 batches, in on_train_batch_end, in eager mode, with seed 3."""

# ---------------------------------------------------------------------- files of old versions


def by_hand(batches: int) -> Dict[str, np.ndarray]:
    """What ``Tiny`` becomes in so many batches: the formulas of momentum, in double precision."""
    shapes = {"body.weight": (3, 2), "body.bias": (3,), "head.weight": (1, 3), "head.bias": (1,)}
    w: Dict[str, np.ndarray] = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        w[name] = (np.arange(np.prod(shape)) / 8 - number / 4).reshape(shape)
    velocity = {name: np.zeros(shape) for name, shape in shapes.items()}
    rows = np.arange(12).reshape(3, 2, 2) / 4 - 1
    for batch in range(batches):
        inputs = rows[batch % 3]
        hidden = inputs @ w["body.weight"].T + w["body.bias"]
        error = hidden @ w["head.weight"].T + w["head.bias"] - inputs.sum(1, keepdims=True)
        slope = 2 * error / 2  # of the mean over two rows
        back = slope @ w["head.weight"]
        gradients = {
            "body.weight": back.T @ inputs, "body.bias": back.sum(0),
            "head.weight": slope.T @ hidden, "head.bias": slope.sum(0),
        }  # fmt: skip
        for name, gradient in gradients.items():
            velocity[name] = 0.5 * velocity[name] + gradient
            w[name] -= (0.0625 if name.startswith("body") else 0.125) * velocity[name]
    return w


def assert_near(task: nn.Module, expected: Dict[str, np.ndarray]) -> None:
    for name, array in weights_of(task).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_weights_of_format_version_1_are_still_read() -> None:
    task = Tiny()
    fill_deterministically(task, 1)
    metadata = load_weights(task, V1)
    assert_near(task, by_hand(0))
    assert (metadata["format_version"], metadata["epoch"], metadata["global_step"]) == (
        "1", "2", "6",
    )  # fmt: skip
    assert read(V1).state is None


def test_weights_of_format_version_1_are_no_run_to_resume() -> None:
    with pytest.raises(CheckpointError, match=r"no run that could be resumed.*load_weights"):
        quiet_trainer(max_epochs=1).fit(Tiny(), tiny_batches(), ckpt_path=V1)


def test_a_checkpoint_of_format_version_2_is_still_read() -> None:
    task = Tiny.load_from_checkpoint(V2)
    assert task.hparams == {"width": 3}
    assert_near(task, by_hand(5))
    checkpoint = read(V2)
    assert checkpoint.metadata["format_version"] == "2"
    assert checkpoint.state is not None
    assert checkpoint.state["task"] == {"seen": [0, 1, 2, 0, 1]}


@pytest.mark.parametrize("max_epochs", [2, 4])
def test_a_checkpoint_of_format_version_2_is_still_resumed(mode: str, max_epochs: int) -> None:
    task = Tiny()
    trainer = quiet_trainer(mode=mode, max_epochs=max_epochs)
    trainer.fit(task, tiny_batches(), ckpt_path=V2)
    assert trainer.global_step == 3 * max_epochs
    assert task.seen == [0, 1, 2] * max_epochs
    assert_near(task, by_hand(3 * max_epochs))


def test_a_checkpoint_of_format_version_2_is_resumed_bit_for_bit_as_its_numbers_go_on(
    mode: str,
) -> None:
    """The file's numbers are those of another processor, so the loop by hand begins with them."""
    resumed, hand = Tiny(), Tiny.load_from_checkpoint(V2)
    quiet_trainer(mode=mode, max_epochs=2).fit(resumed, tiny_batches(), ckpt_path=V2)
    groups = [(hand.body, 0.0625), (hand.head, 0.125)]
    velocities = (read(V2).state or {})["optimizer"]["states"]
    inputs, targets = tiny_batches()[2]  # step 5, the last of two epochs
    ((hand.head(hand.body(inputs)) - targets) ** 2).mean().backward()
    optimizer = flow.optim.SGD(
        [{"params": each.parameters(), "lr": lr} for each, lr in groups], momentum=0.5
    )
    for name, parameter in hand.named_parameters():
        kept = flow.tensor(velocities[name]["momentum_buf"])
        optimizer._state[parameter]["momentum_buf"] = kept
    optimizer.step()
    assert_same_weights(hand, resumed)


# ---------------------------------------------------------------------- between models


class Wrapped(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = shufflenet_v2_x0_5(num_classes=3)
        self.extra = nn.Linear(1, 1)


@pytest.mark.slow
def test_part_of_a_task_goes_into_a_plain_model_and_back(tmp_path: Path) -> None:
    task, plain, again = Wrapped(), shufflenet_v2_x0_5(num_classes=3), Wrapped()
    fill_deterministically(task, 3)
    path = save_weights(task, tmp_path / "task")
    load_weights(plain, path, "model.")
    assert_same_weights(plain, task.model)
    extra = weights_of(again.extra)
    load_weights(again.model, plain.state_dict())
    assert_same_weights(again.model, task.model)
    assert {n: a.tolist() for n, a in extra.items()} == {
        n: a.tolist() for n, a in weights_of(again.extra).items()
    }


def test_a_dict_of_tensors_or_arrays_is_as_good_as_a_file() -> None:
    saved = nn.Linear(2, 2)
    for source in (saved.state_dict(), weights_of(saved)):
        loaded = nn.Linear(2, 2)
        assert load_weights(loaded, source) == {}
        assert_same_weights(loaded, saved)


def test_a_file_of_another_library_is_read(tmp_path: Path) -> None:
    saved, loaded = nn.Linear(2, 2), nn.Linear(2, 2)
    # Texts that ofengine would understand otherwise in a file of its own.
    save_file(weights_of(saved), str(tmp_path / "file"), {"state": "final", "format": "pt"})
    load_weights(loaded, tmp_path / "file")
    assert_same_weights(loaded, saved)


@pytest.mark.parametrize("prefix", ["model", "nothing.", "extra."])
def test_a_prefix_that_does_not_fit_is_named_and_nothing_is_changed(
    tmp_path: Path, prefix: str
) -> None:
    path = save_weights(Wrapped(), tmp_path / "task")
    plain = shufflenet_v2_x0_5(num_classes=3)
    before = bits(plain)
    with pytest.raises(CheckpointError) as error:
        load_weights(plain, path, prefix)
    assert f"(below {prefix!r}) belongs to another model" in str(error.value)
    assert bits(plain) == before


def test_a_dict_of_another_model_is_refused_and_changes_nothing() -> None:
    plain, odd = nn.Linear(2, 2), nn.Linear(2, 2)
    before = bits(plain)
    wrong: List[Any] = [
        {}, nn.Linear(2, 3).state_dict(), nn.Linear(2, 2, bias=False).state_dict(),
        {**odd.state_dict(), "more": flow.ones(1)}, {**odd.state_dict(), "bias": np.zeros(2)},
        {"weight": odd.weight, "bias": None},
    ]  # fmt: skip
    for source in wrong:
        with pytest.raises(CheckpointError, match="the dict of weights belongs to another model"):
            load_weights(plain, source)
        assert bits(plain) == before


# ---------------------------------------------------------------------- writing that fails


CONTENTS = [encode({"w": np.full(50, n, dtype="float32")}, {"n": n}) for n in range(3)]


def test_a_disk_that_gives_back_other_bytes_is_noticed_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "file", CONTENTS[1])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda _: b"other bytes")
        with pytest.raises(CheckpointError, match="reading it back gave other bytes"):
            put(path, CONTENTS[2])
    assert path.read_bytes() == CONTENTS[1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_may_not_become_so_large_leaves_the_old_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    # Really refused by the system, in the middle of the file, as on a full disk.
    path = put(tmp_path / "file", CONTENTS[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=r"file could not be written: File too large\."):
            put(path, CONTENTS[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == CONTENTS[1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_is_read_only_says_so() -> None:
    # Nobody can make a file there, root neither.
    with pytest.raises(CheckpointError, match="/proc/weights could not be written: "):
        put("/proc/weights", CONTENTS[1])


KILLED_WHILE_WRITING = """
import os, signal, sys
from ofengine.checkpoint import put
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
put(sys.argv[1], b"half" * 1000)
"""


def test_a_process_killed_while_writing_leaves_the_old_file_and_what_is_removed_later(
    tmp_path: Path,
) -> None:
    path = put(tmp_path / "last.safetensors", CONTENTS[1])
    killed = run_python("-c", KILLED_WHILE_WRITING, path)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == CONTENTS[1]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_dead_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        kept = (
            f".last.safetensors.{living.pid}.tmp", ".last.safetensors.tmp", "last.safetensors",
            f".other.{dead.pid}.tmp", f"last.safetensors.{dead.pid}.tmp", ".last.safetensors.x.tmp",
            f".last.safetensors.{dead.pid}.tmp2",
        )  # fmt: skip
        left = (f".last.safetensors.{dead.pid}.tmp", f".epoch=1-a.b.safetensors.{dead.pid}.tmp")
        for name in (*kept, *left):
            (tmp_path / name).write_text("")
        remove_leftovers(tmp_path)  # in another container these numbers are other processes'
        assert len(list(tmp_path.iterdir())) == len((*kept, *left))
        for name in (*kept, *left):
            os.utime(tmp_path / name, (1e9, 1e9))
        remove_leftovers(tmp_path)
        assert sorted(each.name for each in tmp_path.iterdir()) == sorted(kept)
        living.communicate(b"\n")
    remove_leftovers(tmp_path / "no such folder")
