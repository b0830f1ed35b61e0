"""A run with any optimizer, resumed from any point, goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import MODES
from helpers.resuming import OPTIMIZERS, Net, assert_same_run, check_exact, run, some_slow


@pytest.mark.parametrize("optimizer", some_slow(OPTIMIZERS, "amsgrad"))
def test_every_optimizer(mode: str, optimizer: str, tmp_path: Path) -> None:
    whole = run(mode, task=lambda: Net(optimizer))
    saved = run(mode, task=lambda: Net(optimizer), save_to=tmp_path).saves
    assert saved is not None
    for path in [each for each in saved.files if "batch" in each.name][2:8:5]:
        resumed = run(mode, task=lambda: Net(optimizer), resume_from=path)
        assert_same_run(resumed, whole, saved.rows_before[path], path.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "mode", "accumulate"),
    [
        (optimizer, mode, 1 + (number + place) % 2)
        for number, optimizer in enumerate(OPTIMIZERS)
        for place, mode in enumerate(MODES)
    ],
)
def test_every_optimizer_from_every_point(
    mode: str, optimizer: str, accumulate: int, tmp_path: Path
) -> None:
    task = lambda: Net(optimizer)  # noqa: E731
    check_exact(tmp_path, mode, "", None, task=task, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("optimizer", some_slow(OPTIMIZERS, "lamb"))
def test_every_optimizer_across_the_modes(mode: str, optimizer: str, tmp_path: Path) -> None:
    """Also with a bias in front of a batch norm, whose gradient is zero but for rounding."""
    other = "graph" if mode == "eager" else "eager"
    whole = run(mode, task=lambda: Net(optimizer))
    saved = run(mode, task=lambda: Net(optimizer), save_to=tmp_path).saves
    assert saved is not None
    for path in [each for each in saved.files if "batch" in each.name][3:8:3]:
        resumed = run(other, task=lambda: Net(optimizer), resume_from=path)
        assert_same_run(resumed, whole, saved.rows_before[path], path.name)


@pytest.mark.slow
def test_there_and_back_again(mode: str, tmp_path: Path) -> None:
    """Three runs, the second in the other mode, are one run."""
    whole = run(mode, task=lambda: Net("amsgrad"))
    path, rows = None, 0
    for number, each in enumerate((mode, "graph" if mode == "eager" else "eager", mode)):
        folder = tmp_path / str(number)
        folder.mkdir()
        part = run(each, task=lambda: Net("amsgrad"), resume_from=path, save_to=folder)
        assert part.saves is not None
        assert_same_run(part, whole, rows, each)
        path = [each for each in part.saves.files if "batch" in each.name][2]
        rows += part.saves.rows_before[path]
