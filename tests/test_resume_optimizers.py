"""A run with any optimizer, resumed from any point, goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import largest_difference
from oneflow import nn
from resuming import OPTIMIZERS, Net, assert_same_run, check_exact, run, some_slow


@pytest.mark.parametrize("optimizer", some_slow(OPTIMIZERS, "momentum", "amsgrad"))
def test_every_optimizer(mode: str, optimizer: str, tmp_path: Path) -> None:
    whole = run(mode, task=lambda: Net(optimizer))
    saved = run(mode, task=lambda: Net(optimizer), save_to=tmp_path).saves
    assert saved is not None
    for path in [each for each in saved.files if "batch" in each.name][2:8:5]:
        resumed = run(mode, task=lambda: Net(optimizer), resume_from=path)
        assert_same_run(resumed, whole, saved.rows_before[path], path.name)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_from_every_point(
    mode: str, optimizer: str, accumulate: int, tmp_path: Path
) -> None:
    task = lambda: Net(optimizer)  # noqa: E731
    check_exact(tmp_path, mode, "", None, task=task, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("optimizer", some_slow(OPTIMIZERS, "adam", "rmsprop"))
def test_every_optimizer_across_the_modes(mode: str, optimizer: str, tmp_path: Path) -> None:
    # Eager and graph mode round their bias corrections differently, which a few steps at these
    # rates amplify to 2e-5 (weights are of size 1); a state that is lost makes 1e-2. The gradient
    # of a bias in front of a batch norm is zero but for rounding, and Adam's steps do
    # not depend on a gradient's size.
    def task() -> Net:
        made = Net(optimizer)
        made.body = nn.Linear(4, 8, bias=False)
        return made

    other = "graph" if mode == "eager" else "eager"
    whole = run(mode, task=task)
    saved = run(mode, task=task, save_to=tmp_path).saves
    assert saved is not None
    path = [each for each in saved.files if "batch" in each.name][3]
    resumed = run(other, task=task, resume_from=path)
    assert len(resumed.rows) == len(whole.rows) - saved.rows_before[path]
    assert largest_difference(resumed.weights, whole.weights)[0] < 1e-4
