"""A steady step is short: few frames, few files, few calls, and it waits for nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Iterator, List, Optional, Set, Tuple

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

import ofengine
from ofengine import TaskModule
from ofengine.callbacks import LRDecayCallback

# Found through the modules, for the callbacks' folder may lie beside the package's.
ENGINE = os.path.dirname(os.path.abspath(ofengine.__file__)) + os.sep
CALLBACKS = os.path.dirname(os.path.abspath(sys.modules[LRDecayCallback.__module__].__file__ or ""))
FIRST, LAST, COUNT = 20, 52, 60
"""The steps from FIRST up to LAST are looked at: by then everything is compiled."""


def path_of(frame: FrameType) -> str:
    return os.path.abspath(frame.f_code.co_filename)


def is_ours(frame: FrameType) -> bool:
    return path_of(frame).startswith((ENGINE, CALLBACKS + os.sep))


def is_hook(frame: FrameType) -> bool:
    return path_of(frame).startswith(CALLBACKS + os.sep)


def stack_below_the_loop(frame: FrameType) -> List[FrameType]:
    """The project's frames from the loop over the batches, itself included, to ``frame``."""
    frames: List[FrameType] = []
    at: Optional[FrameType] = frame
    while at is not None:
        if is_ours(at):
            frames.append(at)
        if path_of(at) == os.path.join(ENGINE, "run", "loops.py"):
            return frames[::-1]
        at = at.f_back
    return []


def callers(frame: FrameType) -> Iterator[FrameType]:
    at = frame.f_back
    while at is not None:
        yield at
        at = at.f_back


class Line(TaskModule):
    def __init__(self, logs: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.logs = logs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for index in range(self.logs):
            self.log(f"metric{index}", batch.mean(), on_epoch=True)
        return self.layer(batch).mean()


class Watched:
    """Batches that have ``profile`` called for every Python call of the steady steps."""

    def __init__(self, profile: Callable[[FrameType, str, Any], None]) -> None:
        self.profile = profile

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[Any]:
        for index in range(COUNT):
            if index == FIRST:
                sys.setprofile(self.profile)
            if index == LAST:
                sys.setprofile(None)
            yield flow.ones(2, 2)


def watch(
    profile: Callable[[FrameType, str, Any], None],
    logs: int = 0,
    task: Optional[TaskModule] = None,
    **arguments: Any,
) -> None:
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1000, **arguments)
    try:
        trainer.fit(task or Line(logs), Watched(profile))
    finally:
        sys.setprofile(None)


def names(frames: List[FrameType]) -> List[str]:
    return [f"{os.path.basename(path_of(f))}:{f.f_code.co_name}" for f in frames]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_from_the_loop_to_training_step_at_most_6_frames_in_3_files(accumulate: int) -> None:
    stacks: List[List[FrameType]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is Line.training_step.__code__:
            stacks.append(stack_below_the_loop(frame))

    watch(profile, mode="eager", accumulate_grad_batches=accumulate)
    assert len(stacks) == LAST - FIRST
    for stack in stacks:
        assert 2 <= len(stack) <= 6, names(stack)
        files = {os.path.relpath(path_of(frame), ENGINE) for frame in stack}
        assert files == {os.path.join("run", "loops.py"), os.path.join("modes", "eager.py")}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("logs", [0, 1])
def test_nowhere_in_a_step_is_the_project_more_than_6_frames_in_3_files_deep(
    mode: str, accumulate: int, logs: int
) -> None:
    deepest: List[Tuple[int, int, List[str]]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not is_ours(frame):
            return
        stack = stack_below_the_loop(frame)
        # What the user's step calls by itself, such as log(), comes on top.
        users = any(each.f_code is Line.training_step.__code__ for each in callers(frame))
        if not users and not any(map(is_hook, stack)):
            deepest.append((len(stack), len({path_of(f) for f in stack}), names(stack)))

    watch(profile, mode=mode, logs=logs, accumulate_grad_batches=accumulate)
    assert deepest
    frames, _, where = max(deepest)
    assert frames <= 6, where
    _, files, where = max(deepest, key=lambda each: each[1])
    assert files <= 3, where


class Moved(Line):
    """Weight decay by a schedule, which in graph mode ends the graph with the gradients."""

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)
        return {"optimizer": optimizer, "weight_decay_schedule": lambda step: 1.0 / (1 + step)}


class Two(Line):
    """Two optimizers of one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return (self.layer if optimizer_name == "a" else self.other)(batch).mean()

    def configure_optimizers(self) -> Any:
        sgd = flow.optim.SGD
        return {"a": sgd(self.layer.parameters(), 0.1), "b": sgd(self.other.parameters(), 0.1)}


@pytest.mark.parametrize(
    ("mode", "task", "arguments", "most_frames", "most_files"),
    [
        ("eager", Line, {"gradient_clip_val": 1.0}, 6, 4),
        ("graph", Line, {"gradient_clip_val": 1.0}, 6, 3),
        ("eager", Moved, {}, 7, 5),
        ("graph", Moved, {}, 12, 6),
        ("eager", Two, {}, 6, 4),
        ("graph", Two, {}, 6, 4),
        ("eager", Line, {"profiler": "simple"}, 6, 4),
        ("graph", Line, {"profiler": "simple"}, 6, 4),
    ],
)
def test_options_that_do_more_in_a_step_go_little_deeper(
    mode: str, task: Any, arguments: Any, most_frames: int, most_files: int, tmp_path: Path
) -> None:
    deepest: List[Tuple[int, int, List[str]]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_ours(frame):
            stack = stack_below_the_loop(frame)
            users = any(each.f_code is task.training_step.__code__ for each in callers(frame))
            if not users and not any(map(is_hook, stack)):
                deepest.append((len(stack), len({path_of(f) for f in stack}), names(stack)))

    watch(profile, task=task(), mode=mode, default_root_dir=tmp_path, **arguments)
    frames, _, where = max(deepest)
    assert 1 < frames <= most_frames, where
    _, files, where = max(deepest, key=lambda each: each[1])
    assert files <= most_files, where


@pytest.mark.parametrize(
    ("mode", "accumulate", "logs", "most"),
    # Measured: 8, 11, 9.5, 15.5; each log() adds 9 in eager mode, 3 in a graph.
    [
        ("eager", 1, 0, 8),
        ("graph", 1, 0, 11),
        ("eager", 2, 0, 10),
        ("graph", 2, 0, 16),
        ("eager", 1, 2, 26),
        ("graph", 1, 2, 17),
    ],
)
def test_a_step_makes_few_calls_into_the_project(
    mode: str, accumulate: int, logs: int, most: int
) -> None:
    calls: List[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_ours(frame):
            calls.extend(names([frame]))

    watch(profile, mode=mode, logs=logs, accumulate_grad_batches=accumulate)
    steps = LAST - FIRST
    often: Set[str] = {name for name in calls if calls.count(name) >= steps}
    assert 0 < len(calls) / steps <= most, sorted(often)


@pytest.mark.parametrize(
    ("mode", "most_ours", "most"),
    # Measured: 9 of 48 in eager mode, 12 of 43 in graph mode, making the batch included.
    [("eager", 9, 56), ("graph", 12, 51)],
)
def test_a_step_with_all_defaults_makes_few_python_calls(
    mode: str, most_ours: int, most: int, tmp_path: Path
) -> None:
    calls: List[bool] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls.append(is_ours(frame))

    watch(
        profile,
        mode=mode,
        logger=True,
        enable_progress_bar=True,
        enable_model_summary=True,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    steps = LAST - FIRST
    assert 0 < sum(calls) / steps <= most_ours
    assert len(calls) / steps <= most


@pytest.mark.parametrize("logs", [0, 3])
def test_between_two_logged_steps_nothing_waits_for_the_device(mode: str, logs: int) -> None:
    numpy = flow.Tensor.numpy.__code__
    waits: List[int] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        reads = event == "call" and frame.f_code is numpy
        if reads or (event == "c_call" and getattr(argument, "__name__", "") == "item"):
            waits.append(1)

    watch(profile, mode=mode, logs=logs)
    # Only the bound on how far Python runs ahead waits, for a loss of many steps ago.
    assert len(waits) <= (LAST - FIRST) / 8
