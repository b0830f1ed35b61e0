"""A run that is killed, as often as it may be, ends as the one that never stopped: every bit."""

from __future__ import annotations

import functools
import itertools
import json
import signal
from pathlib import Path
from typing import Any, List

import pytest
from helpers import MODES
from kill_harness import RESTARTED, SCENARIOS, run, start, until_the_end

CHOSEN = [
    "batch:1", "batch:20", "validation:3", "fsync:3", "fsync:8", "replaced:4", "replaced:9",
    "teardown:1",
]  # fmt: skip


@functools.lru_cache(maxsize=None)
def _never_stopped(mode: str, scenario: str, root: str) -> Any:
    return start(mode, Path(root), SCENARIOS[scenario], None)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run gives that never stopped, by mode and scenario."""
    root = tmp_path_factory.mktemp("never-stopped")
    return lambda mode, scenario: _never_stopped(mode, scenario, str(root / f"{mode}-{scenario}"))


def check(modes: List[str], root: Path, scenario: str, kills: List[str], reference: Any) -> None:
    """Killed at these points, one after the other, the run ends as if it never had been."""
    ended = until_the_end(modes, root, scenario, kills)
    assert ended.hits == len(kills)
    for mode, outcome in [(modes[0], ended.outcome), *ended.others]:
        assert outcome == reference(mode, scenario)


@pytest.mark.parametrize(
    ("mode", "kill"),
    [
        ("graph", "replace:7"),
        *(pytest.param(mode, "batch:9", marks=pytest.mark.slow) for mode in ("eager", "graph")),
        pytest.param("eager", "replace:7", marks=pytest.mark.slow),
    ],
)
def test_killed_at_a_chosen_point(mode: str, tmp_path: Path, kill: str, reference: Any) -> None:
    check([mode], tmp_path, "plain", [kill], reference)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "mode"), list(zip(CHOSEN, itertools.cycle(MODES))))
def test_killed_at_further_points(mode: str, tmp_path: Path, kill: str, reference: Any) -> None:
    check([mode], tmp_path, "plain", [kill], reference)


@pytest.mark.slow
def test_killed_while_the_graph_is_compiled(tmp_path: Path, reference: Any) -> None:
    check(["graph"], tmp_path, "plain", ["compile:1", "batch:5", "compile:1"], reference)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_step(tmp_path: Path, reference: Any) -> None:
    check(["eager"], tmp_path, "accumulation", ["step:8", "step:6", "step:3"], reference)


@pytest.mark.slow
def test_killed_between_the_steps_of_two_optimizers(tmp_path: Path, reference: Any) -> None:
    check(["eager"], tmp_path, "two optimizers", ["step:8", "step:6", "batch:3"], reference)


FURTHER = sorted(
    set(SCENARIOS) - {"adamw", "stopped early", "shuffled validation", "two at once"}
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modes", "scenario"),
    [([*MODES, *MODES][n % 2 :][:2], each) for n, each in enumerate(FURTHER)],
)
def test_killed_often_and_resumed_in_the_other_mode(
    tmp_path: Path, modes: List[str], scenario: str, reference: Any
) -> None:
    check(modes, tmp_path, scenario, ["batch:7", "replace:5", "validation:3"], reference)


OF_FOLDERS = {
    "a damaged file": ("plain", ["damage batch:9", "batch:12"]),
    "a copied folder": ("plain", ["copy batch:9", "batch:12"]),
    "a renamed folder": ("stopped early", ["move batch:7", "move replace:5"]),
    "another run in the same folder": ("two at once", ["batch:9", "replace:7"]),
}
OTHERS = {
    "SIGTERM and Ctrl-C": ("plain", ["batch:7:15", "batch:9:2"]),
    "SIGTERM in the validation after which training stops": ("stopped early", ["validation:7:15"]),
    "SIGTERM in the very last batch": ("accumulation", ["batch:32:15"]),
    "killed between validation and the end of the epoch": ("stopped early", ["replaced:10"]),
    "killed and stopped early": ("stopped early", ["batch:7", "replace:5"]),
    "killed while validation shuffles": ("shuffled validation", ["validation:3", "batch:4"]),
    "SIGTERM to the process group": ("workers", ["batch:7:15:group"]),
    "a closed terminal": ("plain", ["batch:7:1"]),
    "workers that hang": ("persistent workers", ["hang:3:15", "hang:5:15:group"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_stopped_otherwise(mode: str, name: str, tmp_path: Path, reference: Any) -> None:
    scenario, kills = OTHERS[name]
    check([mode], tmp_path / "run", scenario, kills, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "name"), [(MODES[number % 2], name) for number, name in enumerate(OF_FOLDERS)]
)
def test_what_happens_to_the_folder_meanwhile(
    mode: str, name: str, tmp_path: Path, reference: Any
) -> None:
    # In the modes by turns: the files are the same in both.
    scenario, kills = OF_FOLDERS[name]
    check([mode], tmp_path / "run", scenario, kills, reference)


@pytest.mark.slow
def test_killed_often_with_adamw(mode: str, tmp_path: Path, reference: Any) -> None:
    check([mode], tmp_path, "adamw", ["batch:7", "replace:5", "validation:3"], reference)


@pytest.mark.slow
def test_a_trainer_that_restarts_on_crash_ends_as_if_there_had_been_none(
    mode: str, tmp_path: Path, reference: Any
) -> None:
    done = run(mode, tmp_path, RESTARTED, f"batch:12:{int(signal.SIGSEGV)}")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome == reference(mode, "plain")
    assert [each.name for each in (tmp_path / "ofengine_logs").iterdir()] == ["version_0"]
    crashes = [line for line in done.stderr.splitlines() if "died of SIGSEGV" in line]
    # There are 32 batches. Each try dies in its twelfth, and the next goes on from the tenth:
    # in batches 12, 22 and 32.
    assert len(crashes) == 3
