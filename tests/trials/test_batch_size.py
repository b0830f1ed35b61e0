"""``scale_batch_size`` finds the largest batch within a limit of memory, and leaves no trace."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer, run_python
from helpers.tiny import Tiny, tiny_batches

from ofengine import ConfigurationError, DataError
from ofengine.trials.batch_size import resized, search
from ofengine.trials.memory import free_memory, limit_of
from ofengine.trials.trial_process import Outcome, _judge

MB = 1024 * 1024

# ``find LIMIT MODE OPTIONS`` searches; ``fit ROWS MODE`` trains on so many, and tells its peak.
SCRIPT = """
import hashlib, json, random, sys

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine import TaskModule, Trainer

what, number, mode, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
print("the script runs")


class Hungry(TaskModule):
    '''Each row becomes a tensor of 16 MB, and its gradient another.'''

    def __init__(self):
        super().__init__()
        self.body, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        return (self.drop(self.body(batch[0])) * flow.ones(1, options.get("width", 1))).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen += 1


random.seed(1), np.random.seed(2), flow.manual_seed(3)
task = Hungry()
quiet = dict(
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False
)
trainer = Trainer(mode=mode, max_steps=3, **quiet)
if what == "fit":
    trainer.fit(task, [(flow.ones(number, 4),)] * 3)
    with open("/proc/self/status") as status:  # ru_maxrss begins at that of the test's own process
        lines = dict(line.split(":", 1) for line in status)
    print("peak", int(lines["VmHWM"].split()[0]) * 1024)
    sys.exit()
data = [(flow.randn(4, 4), flow.ones(3)) for _ in range(3)]
if what == "find":
    limits = {"memory_limit": number} if number else {}
    print("found", trainer.scale_batch_size(task, data, **limits, **options["how"]), task.seen)
    if options.get("twice"):
        print("again", trainer.scale_batch_size(task, data, init_val=1, max_trials=1))
trainer.fit(task, data)
bits = b"".join(p.numpy().tobytes() for p in task.parameters())
drawn = [random.random(), np.random.rand(), flow.rand(1).item()]
print("then", hashlib.sha1(bits).hexdigest(), drawn, task.seen)
"""


def run(script: Path, *arguments: object) -> Dict[str, List[str]]:
    """What the script printed, by the first word of a line."""
    result = run_python(script, *arguments)
    assert result.returncode == 0, result.stderr
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    return {word: rest.split(" ") for word, rest in lines}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    "mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)]
)  # fmt: skip
def test_it_leaves_no_trace(mode: str, script: Path) -> None:
    """Weights, generators and the task's attributes are those of a run without it."""
    how = '{"how": {"max_val": 2, "steps_per_trial": 1}, "twice": true}'
    found = run(script, "find", 0, mode, how)
    assert found["found"] == ["2", "0"]  # rows; and steps that this process made for it
    assert found["again"] == ["1"]
    assert found["then"] == run(script, "none", 0, mode, how)["then"]


@pytest.mark.slow
def test_it_finds_the_size_at_the_limit(mode: str, script: Path) -> None:
    """By the peaks of plain runs, as the kernel tells them."""
    width = 16 * MB // 4
    options = f'{{"width": {width}, "how": {{}}}}'
    peaks = [int(run(script, "fit", rows, mode, options)["peak"][0]) for rows in (2, 6)]
    per_row = (peaks[1] - peaks[0]) / 4
    assert per_row >= 16 * MB
    limit = int(peaks[0] + 4.5 * per_row)  # between 6 and 7 rows
    (rows, _) = run(script, "find", limit, mode, options)["found"]
    assert rows == "6"


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 31, 32, 33, 100, 101, 5000])
@pytest.mark.parametrize("init_val", [1, 2, 3])
def test_the_search_finds_the_largest_that_fits(most: int, init_val: int) -> None:
    tried: List[int] = []

    def attempt(rows: int) -> Outcome:
        tried.append(rows)
        return Outcome(rows <= most, "too many rows")

    if init_val > most:
        with pytest.raises(DataError, match=r"init_val=\d\): too many rows. Give a smaller"):
            search(attempt, "binsearch", init_val, 100, 8192)
        return
    assert search(attempt, "binsearch", init_val, 100, 8192) == most
    assert len(tried) == len(set(tried)) <= 26
    powers = [init_val * 2**n for n in range(20) if init_val * 2**n <= most]
    assert search(attempt, "power", init_val, 100, 8192) == powers[-1]
    assert search(attempt, "binsearch", init_val, 1, 8192) == init_val
    assert search(attempt, "binsearch", init_val, 100, min(most, 40)) == min(most, 40)


def test_rows_are_repeated_or_cut_and_what_has_no_rows_stays() -> None:
    batch = {
        "x": flow.arange(6).reshape(3, 2),
        "y": [flow.tensor([7, 8, 9]), "text"],
        "w": flow.ones(2),
    }
    longer = resized(batch, 5)
    assert longer["x"].numpy().tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert longer["y"][0].numpy().tolist() == [7, 8, 9, 7, 8]
    assert longer["y"][1] == "text"
    assert longer["w"].shape == (2,)
    assert resized(batch, 2)["y"][0].numpy().tolist() == [7, 8]


# ---------------------------------------------------------------------- how a try ends


@pytest.mark.parametrize(
    ("grown", "said", "code", "errors", "fits", "why"),
    [
        (False, b"52428800", 0, b"", True, "8 rows took 50 MB, and 100 MB is the most"),
        (False, b"209715200", 0, b"", False, "8 rows took 200 MB, and 100 MB is the most"),
        (True, b"", -signal.SIGKILL, b"", False, "8 rows took more, and 100 MB is the most"),
        (False, b"", -signal.SIGKILL, b"", False, "8 rows ran out of memory"),
        (False, b"", 1, b"RuntimeError: CUDA error: out of memory\n", False, "8 rows ran out"),
        (False, b"", -6, b"terminate: std::bad_alloc\n", False, "8 rows ran out of memory"),
    ],
)
def test_a_try_is_judged_by_how_it_ends(
    grown: bool, said: bytes, code: int, errors: bytes, fits: bool, why: str
) -> None:
    outcome = _judge(8, 100 * MB, grown, said, code, errors)
    assert outcome.fits is fits
    assert outcome.why.startswith(why)


def test_another_error_is_told() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"the try with 8 rows failed, for another reason than memory: ValueError: no$",
    ):
        _judge(8, MB, False, b"", 1, b"Traceback\n  line\nValueError: no\n\n")


# ---------------------------------------------------------------------- what is free


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 8000 * 1024),
        ({"memory.max": "5000000\n", "memory.current": "1000000\n"}, 4_000_000),
        ({"memory.max": "5\n", "memory.current": "7\n"}, 0),
        (
            {"memory/memory.limit_in_bytes": "3000000", "memory/memory.usage_in_bytes": "1000000"},
            2_000_000,
        ),
    ],
)
def test_a_container_s_bound_counts_too(tmp_path: Path, group: Dict[str, str], free: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000 kB\n")
    for name, text in group.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path, tmp_path) == free
    assert free_memory(tmp_path / "nowhere", tmp_path / "nowhere") is None


@pytest.mark.parametrize("limit", [0, 0.0, 0.95, 1.0, -1, True, "1GB", 901])
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    assert (limit_of(0.5, 1000), limit_of(900, 1000)) == (500, 900)
    with pytest.raises(ConfigurationError, match=r"memory_limit=.*: give a share of the free memo"):
        limit_of(limit, 1000)


def test_a_system_that_does_not_tell_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Choose the batch size yourself"):
        limit_of(0.5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "linear"}, r"mode='linear': use one of \['binsearch', 'power'\]"),
        ({"steps_per_trial": 0}, "steps_per_trial=0: give a whole number from 1 on"),
        ({"init_val": 9000}, "init_val=9000 is more than max_val=8192"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: Dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer().scale_batch_size(Tiny(), tiny_batches(), **arguments)


def test_a_program_that_cannot_run_again_is_refused() -> None:
    code = (
        "import oneflow as flow\n"
        "from ofengine import TaskModule, Trainer\n"
        "Trainer().scale_batch_size(TaskModule(), [(flow.ones(2, 2),)])\n"
    )
    result = run_python("-c", code, env=dict(os.environ))
    assert "scale_batch_size runs the script again for each try: a program from" in result.stderr
    assert "or choose the batch size yourself." in result.stderr
