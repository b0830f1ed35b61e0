"""Which rates count after a resume, measured from outside: by how far the weights move.

The loss is a sum of weights, so that its gradient is constant and an SGD step moves a weight by
its rate. What is expected is written out in this file, in closed forms: no schedule, plan or
calendar of the engine (or of OneFlow) is asked for it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, OfUnknownLength, quiet_trainer, weights_of
from hypothesis import given, settings, strategies as st
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import Callback, CheckpointError, RateError, TaskModule, Trainer
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback
from ofengine.rates import WarmupLR
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group
from ofengine.rates.optimizers import Optimization, make_schedule
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.resume import plan_state, resume_plan

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")

Closed = Callable[[float, int], float]
"""The rate of a group of this base rate at this position of a schedule, by hand."""
Rates = Dict[int, List[float]]
"""The rates of all groups by optimizer step."""

BATCHES, EPOCHS, SAVED_AT = 4, 3, 6
"""12 steps; the checkpoint is saved in the middle of the second epoch."""

GROUPS = (
    {"name": "stem", "lr": 0.5},
    {"name": "head", "lr": 0.3, "lr_scale": 0.5, "lr_decay_scale": 0.75},
)
EQUAL_GROUPS = (
    {"name": "stem", "lr": 0.5},
    {"name": "head", "lr": 0.5, "lr_scale": 0.5, "lr_decay_scale": 0.75},
)


class Line(TaskModule):
    """One weight for each group; the gradient of each is 1."""

    def __init__(
        self,
        schedule: Optional[Callable[[Any], Any]] = None,
        groups: Sequence[Dict[str, Any]] = GROUPS,
        scheduling: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.options = [dict(group) for group in groups]
        self.scheduling = dict(scheduling or {})
        for index in range(len(groups)):
            setattr(self, f"w{index}", nn.Parameter(flow.zeros(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("flat", 1.0)
        loss = batch.sum() * 0.0
        for index in range(len(self.options)):
            loss = loss + getattr(self, f"w{index}").sum()
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": [getattr(self, f"w{index}")], **options}
            for index, options in enumerate(self.options)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.1)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), **self.scheduling}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Meter(Callback):
    """Reads each step's rates off the weights, which it puts back to 0, then saves and acts."""

    fires_last = True

    def __init__(
        self, save: Optional[Path], save_at: int, changes: Dict[int, Tuple[str, float]]
    ) -> None:
        self.rates: Rates = {}
        self._save, self._save_at, self._changes = save, save_at, changes

    def on_train_batch_end(
        self, trainer: Trainer, task: Line, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        weights = [getattr(task, f"w{index}") for index in range(len(task.options))]
        moved = [-float(weight.numpy()[0]) for weight in weights]
        if any(moved):
            self.rates[trainer.global_step - 1] = moved
            if trainer.global_step in self._changes:
                trainer.set_lr(*self._changes[trainer.global_step])
        for weight in weights:
            weight.data.zero_()
        if self._save is not None and trainer.batches_seen == self._save_at:
            trainer.save_checkpoint(self._save)


def train(
    mode: str,
    task: TaskModule,
    data: Any = None,
    epochs: int = EPOCHS,
    save: Optional[Path] = None,
    save_at: int = SAVED_AT,
    ckpt: Optional[Path] = None,
    policy: str = "checkpoint",
    changes: Optional[Dict[int, Tuple[str, float]]] = None,
    every: int = 3,
    **arguments: Any,
) -> Rates:
    """The rates of each step of a run; a checkpoint is saved after ``save_at`` batches."""
    meter = Meter(save, save_at, changes or {})
    decay = [LRDecayCallback(every_n_batches=every), GraphLRScaleCallback(every_n_batches=every)]
    trainer = quiet_trainer(mode=mode, max_epochs=epochs, callbacks=[*decay, meter], **arguments)
    if data is None:
        data = [flow.zeros(1) for _ in range(BATCHES)]
    trainer.fit(task, data, ckpt_path=ckpt, rates_on_resume=policy)
    return meter.rates


def by_hand(
    closed: Closed,
    groups: Sequence[Dict[str, Any]] = GROUPS,
    lengths: Sequence[int] = (BATCHES,) * EPOCHS,
    every: int = 3,
    by_epoch: bool = False,
    accumulate: int = 1,
    changes: Optional[Dict[int, Tuple[str, float]]] = None,
) -> Rates:
    """``schedule * lr_scale * lr_decay_scale ** events`` for each step, by a loop over batches."""
    rates: Rates = {}
    lrs = {group["name"]: group["lr"] for group in groups}
    events = step = 0
    for epoch, length in enumerate(lengths):
        for first in range(0, length, accumulate):
            if changes and step in changes:
                name, lr = changes[step]
                lrs[name] = lr
            rates[step] = [
                closed(lrs[group["name"]], epoch if by_epoch else step)
                * group.get("lr_scale", 1.0)
                * group.get("lr_decay_scale", 1.0) ** events
                for group in groups
            ]
            step += 1
            window = range(first, min(first + accumulate, length))
            events += sum(batch % every == 0 for batch in window)
    return rates


def assert_close(ours: Rates, expected: Rates, steps: Sequence[int]) -> None:
    """Equal but for a few roundings to float32, at exactly these steps."""
    assert sorted(ours) == list(steps)
    for step in steps:
        np.testing.assert_allclose(ours[step], expected[step], rtol=1e-6, atol=1e-9, err_msg=step)


# ---------------------------------------------------------------------- unchanged code


class Kind(NamedTuple):
    make: Optional[Callable[[Any], Any]]
    closed: Closed
    groups: Sequence[Dict[str, Any]] = GROUPS
    scheduling: Optional[Dict[str, Any]] = None


def _cosine(lr: float, position: int, length: int, low: float) -> float:
    return low + (lr - low) * (1 + math.cos(math.pi * position / length)) / 2


def _chain(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=7),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    ]
    return lr_scheduler.ChainedScheduler(parts)


def _sequence(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.25, end_factor=1.0, total_iters=4),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4], interval_rescaling=True)


def _linear_warmup(optimizer: Any) -> Any:
    cosine = lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1)
    return lr_scheduler.WarmupLR(cosine, warmup_factor=0.2, warmup_iters=8)


def _own_warmup(optimizer: Any) -> Any:
    return WarmupLR(lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1), 0.2, 8)


def _cosine_decay(lr: float, position: int) -> float:
    return _cosine(lr, min(position, 12), 12, 0.1 * lr)


def _warmed_up(lr: float, position: int) -> float:
    if position >= 8:
        return _cosine_decay(lr, position)
    return 0.2 * lr + (_cosine_decay(lr, 8) - 0.2 * lr) * position / 8


def _wave(position: int) -> float:
    return 1 / (1 + position) + position % 3


TABLE = [1.0, 0.5, 0.75, 0.25, 0.1, 0.3, 0.2, 0.9, 0.6]
KINDS = {
    "none": Kind(None, lambda lr, p: lr),
    "ConstantLR": Kind(
        lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=8),
        lambda lr, p: lr * (0.25 if p < 8 else 1),
    ),
    "LinearLR": Kind(
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, end_factor=0.9, total_iters=9),
        lambda lr, p: lr * (0.1 + 0.8 * min(p, 9) / 9),
    ),
    "StepLR": Kind(
        lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.3), lambda lr, p: lr * 0.3 ** (p // 4)
    ),
    "MultiStepLR": Kind(
        lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.3),
        lambda lr, p: lr * 0.3 ** ((p >= 2) + (p >= 7)),
    ),
    "ExponentialLR": Kind(
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8), lambda lr, p: lr * 0.8**p
    ),
    "PolynomialLR": Kind(
        lambda o: lr_scheduler.PolynomialLR(o, 20, end_learning_rate=0.01, power=2.0),
        lambda lr, p: (lr - 0.01) * (1 - p / 20) ** 2 + 0.01,
    ),
    "CosineDecayLR": Kind(
        lambda o: lr_scheduler.CosineDecayLR(o, decay_steps=12, alpha=0.1), _cosine_decay
    ),
    "CosineAnnealingLR": Kind(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15, eta_min=0.02),
        lambda lr, p: _cosine(lr, p, 15, 0.02),
    ),
    "CosineAnnealingWarmRestarts": Kind(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, eta_min=0.02),
        lambda lr, p: _cosine(lr, p % 5, 5, 0.02),
    ),
    "LambdaLR": Kind(lambda o: lr_scheduler.LambdaLR(o, _wave), lambda lr, p: lr * _wave(p)),
    "ChainedScheduler": Kind(_chain, lambda lr, p: lr * (0.5 if p < 7 else 1) * 0.9**p),
    "SequentialLR": Kind(
        _sequence, lambda lr, p: lr * ((0.25 + 0.75 * p / 4) if p < 4 else 0.8 ** (p - 4))
    ),
    "oneflow WarmupLR": Kind(_linear_warmup, _warmed_up, EQUAL_GROUPS),
    "ofengine WarmupLR": Kind(_own_warmup, _warmed_up),
    "function": Kind(lambda o: _wave, lambda lr, p: lr * _wave(p)),
    "table": Kind(lambda o: list(TABLE), lambda lr, p: lr * TABLE[min(p, 8)]),
    "one a group": Kind(
        lambda o: {"stem": lr_scheduler.ExponentialLR(o, gamma=0.8), "head": [0.9, 0.5, 0.1]},
        lambda lr, p: lr * (0.8**p if lr == 0.5 else [0.9, 0.5, 0.1][min(p, 2)]),
    ),
    "ReduceLROnPlateau": Kind(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        # The first metric is the best; each second one after it is one too many.
        lambda lr, p: lr * 0.5 ** (max(p - 1, 0) // 2),
        scheduling={"monitor": "flat", "interval": "step"},
    ),
}


def lines_of(caplog: pytest.LogCaptureFixture) -> List[str]:
    """What was logged about rates at the resume."""
    return [r.getMessage() for r in caplog.records if "its rate at step" in r.getMessage()]


@pytest.mark.parametrize("kind", list(KINDS))
def test_unchanged_code_goes_on_with_the_same_rates(
    mode: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the same mode and in the other one; decay and ``lr_scale`` included; nothing logged."""
    make, closed, groups, scheduling = KINDS[kind]
    whole = train(mode, Line(make, groups, scheduling), save=tmp_path / "c")
    assert_close(whole, by_hand(closed, groups), range(BATCHES * EPOCHS))
    caplog.set_level(logging.INFO, "ofengine")
    for other in MODES:
        rest = train(other, Line(make, groups, scheduling), ckpt=tmp_path / "c")
        assert rest == {step: whole[step] for step in range(SAVED_AT, BATCHES * EPOCHS)}
    assert lines_of(caplog) == []


BY_EPOCH = ["StepLR", "LambdaLR", "ChainedScheduler", "ofengine WarmupLR", "function", "table"]


@pytest.mark.parametrize("kind", [*BY_EPOCH, "one a group"])
@pytest.mark.parametrize("save_at", [4, 9])
def test_by_epoch_with_accumulation_and_set_lr(
    mode: str, kind: str, save_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A schedule that moves by epochs, windows of 3 batches, and a rate set before the save.

    After 4 batches a window is open; after 9, the third epoch has begun.
    """
    make, closed, groups, _ = KINDS[kind]
    if kind == "one a group":
        changes = {2: ("stem", 0.5)}
    else:
        changes = {1: ("stem", 0.7), 2: ("head", 0.0625)}
    scheduling = {"interval": "epoch"}
    options = {"accumulate_grad_batches": 3}
    task = Line(make, groups, scheduling)
    whole = train(mode, task, save=tmp_path / "c", save_at=save_at, changes=changes, **options)
    expected = by_hand(closed, groups, by_epoch=True, accumulate=3, changes=changes)
    assert_close(whole, expected, range(2 * EPOCHS))
    caplog.set_level(logging.INFO, "ofengine")
    done = {4: 2, 9: 4}[save_at]
    for other in MODES:
        late = {step: change for step, change in changes.items() if step > done}
        task = Line(make, groups, scheduling)
        rest = train(other, task, ckpt=tmp_path / "c", changes=late, **options)
        assert rest == {step: whole[step] for step in range(done, 2 * EPOCHS)}
    assert lines_of(caplog) == []


def test_a_second_resume_is_as_exact_as_the_first(mode: str, tmp_path: Path) -> None:
    """What the first resume took over is in the checkpoint of the resumed run too."""
    make, closed, groups, _ = KINDS["ofengine WarmupLR"]
    changes = {3: ("stem", 0.7)}
    whole = train(mode, Line(make), save=tmp_path / "a", save_at=4, changes=changes)
    others = [{**group, "lr": 2.0, "lr_scale": 3.0} for group in groups]
    train(mode, Line(make, others), save=tmp_path / "b", save_at=7, ckpt=tmp_path / "a")
    rest = train(mode, Line(make, others), ckpt=tmp_path / "b")
    assert rest == {step: whole[step] for step in range(7, BATCHES * EPOCHS)}
    assert_close(whole, by_hand(closed, groups, changes=changes), range(BATCHES * EPOCHS))


@pytest.mark.parametrize("kind", ["none", "CosineAnnealingLR", "function", "one a group"])
def test_more_epochs_than_before(mode: str, kind: str, tmp_path: Path) -> None:
    """A run that was over goes on as if it had been longer from the start."""
    make, closed, groups, _ = KINDS[kind]
    train(mode, Line(make, groups), epochs=2, save=tmp_path / "c", save_at=8)
    rest = train(mode, Line(make, groups), epochs=4, ckpt=tmp_path / "c")
    assert_close(rest, by_hand(closed, groups, lengths=[4] * 4), range(8, 16))


@pytest.mark.parametrize("save_at", [2, 3, 5, 7])
@pytest.mark.parametrize("by_epoch", [False, True])
def test_epochs_of_unknown_and_unequal_length(
    mode: str, save_at: int, by_epoch: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Decay and epochs are counted by how long the epochs really were."""
    batches = [[flow.zeros(1) for _ in range(length)] for length in (3, 5, 4)]
    scheduling = {"interval": "epoch" if by_epoch else "step"}
    make, closed, groups, _ = KINDS["table"]
    data = OfUnknownLength(*batches)
    whole = train(mode, Line(make, groups, scheduling), data, save=tmp_path / "c", save_at=save_at)
    assert_close(whole, by_hand(closed, lengths=(3, 5, 4), by_epoch=by_epoch), range(12))
    data = OfUnknownLength(*batches)
    data.begun = 1 if save_at > 3 else 0
    caplog.set_level(logging.INFO, "ofengine")
    rest = train(mode, Line(make, groups, scheduling), data, ckpt=tmp_path / "c")
    assert rest == {step: whole[step] for step in range(save_at, 12)}
    assert lines_of(caplog) == []


# ---------------------------------------------------------------------- changed code


class Change(NamedTuple):
    """Two versions of the code, each with its closed form, groups, and decay interval."""

    before: Tuple[Optional[Callable[[Any], Any]], Closed]
    now: Tuple[Optional[Callable[[Any], Any]], Closed]
    groups: Sequence[Dict[str, Any]] = GROUPS
    groups_now: Sequence[Dict[str, Any]] = GROUPS
    every_now: int = 3


def _none(lr: float, position: int) -> float:
    return lr


def _exponential(gamma: float) -> Tuple[Callable[[Any], Any], Closed]:
    return lambda o: lr_scheduler.ExponentialLR(o, gamma=gamma), lambda lr, p: lr * gamma**p


def _annealing(length: int) -> Tuple[Callable[[Any], Any], Closed]:
    return (
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=length),
        lambda lr, p: _cosine(lr, p, length, 0.0),
    )


def _milestones(*at: int) -> Tuple[Callable[[Any], Any], Closed]:
    return (
        lambda o: lr_scheduler.MultiStepLR(o, list(at), gamma=0.5),
        lambda lr, p: lr * 0.5 ** sum(p >= each for each in at),
    )


def _warmup(iters: int) -> Tuple[Callable[[Any], Any], Closed]:
    def closed(lr: float, p: int) -> float:
        end = _cosine_decay(lr, iters)
        return _cosine_decay(lr, p) if p >= iters else 0.2 * lr + (end - 0.2 * lr) * p / iters

    def make(optimizer: Any) -> Any:
        cosine = lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1)
        return WarmupLR(cosine, 0.2, iters)

    return make, closed


def _flow_warmup(iters: int) -> Tuple[Callable[[Any], Any], Closed]:
    def make(optimizer: Any) -> Any:
        cosine = lr_scheduler.CosineDecayLR(optimizer, decay_steps=12, alpha=0.1)
        return lr_scheduler.WarmupLR(cosine, warmup_factor=0.2, warmup_iters=iters)

    return make, _warmup(iters)[1]


def _chained(gamma: float) -> Tuple[Callable[[Any], Any], Closed]:
    def make(optimizer: Any) -> Any:
        constant = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=7)
        decaying = lr_scheduler.ExponentialLR(optimizer, gamma=gamma)
        return lr_scheduler.ChainedScheduler([constant, decaying])

    return make, lambda lr, p: lr * (0.5 if p < 7 else 1) * gamma**p


def _table(*factors: float) -> Tuple[Callable[[Any], Any], Closed]:
    return (
        lambda o: list(factors),
        lambda lr, p: lr * factors[min(p, len(factors) - 1)],
    )


def _with(**keys: Any) -> List[Dict[str, Any]]:
    return [GROUPS[0], {**GROUPS[1], **keys}]


CHANGES = {
    "lr": Change((None, _none), (None, _none), groups_now=_with(lr=0.7)),
    "lr under a schedule": Change(_exponential(0.8), _exponential(0.8), groups_now=_with(lr=0.7)),
    "lr under a function": Change(
        (lambda o: _wave, lambda lr, p: lr * _wave(p)),
        (lambda o: _wave, lambda lr, p: lr * _wave(p)),
        groups_now=_with(lr=0.7),
    ),
    "lr under a LambdaLR": Change(
        (lambda o: lr_scheduler.LambdaLR(o, _wave), lambda lr, p: lr * _wave(p)),
        (lambda o: lr_scheduler.LambdaLR(o, _wave), lambda lr, p: lr * _wave(p)),
        groups_now=_with(lr=0.7),
    ),
    "lr_scale": Change(_exponential(0.8), _exponential(0.8), groups_now=_with(lr_scale=0.125)),
    "lr_decay_scale": Change((None, _none), (None, _none), groups_now=_with(lr_decay_scale=0.5)),
    "no decay any more": Change((None, _none), (None, _none), groups_now=_with(lr_decay_scale=1.0)),
    "every_n_batches": Change(_exponential(0.8), _exponential(0.8), every_now=1),
    "gamma": Change(_exponential(0.8), _exponential(0.9)),
    "T_max": Change(_annealing(15), _annealing(13)),
    "milestones": Change(_milestones(2, 7), _milestones(2, 5, 9)),
    "milestones to come": Change(_milestones(2, 7), _milestones(2, 8)),
    "the last milestone": Change(_milestones(2, 11), _milestones(2)),
    "warmup_iters": Change(_warmup(8), _warmup(9)),
    "oneflow's warmup_iters": Change(_flow_warmup(8), _flow_warmup(9), EQUAL_GROUPS, EQUAL_GROUPS),
    "a part of a chain": Change(_chained(0.9), _chained(0.8)),
    "a table": Change(_table(*TABLE), _table(0.5, *TABLE)),
    "schedule and lr and scale at once": Change(
        _warmup(8), _warmup(9), groups_now=_with(lr=0.7, lr_scale=0.25, lr_decay_scale=0.5)
    ),
}

LINE = re.compile(
    r"resume: group '(\w+)': its rate at step (\d+) is (\S+) by the checkpoint and (\S+) by the "
    r"code; (\S+) counts \(rates_on_resume='(\w+)'\)\."
)


@pytest.mark.parametrize("policy", ["checkpoint", "config"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_code(
    mode: str, change: str, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint's rates go on, or the code's count as if from step 0; each is told."""
    before, now, groups, groups_now, every_now = CHANGES[change]
    train("eager", Line(before[0], groups), save=tmp_path / "c")
    old = by_hand(before[1], groups)
    new = by_hand(now[1], groups_now, every=every_now)
    caplog.set_level(logging.INFO, "ofengine")
    task = Line(now[0], groups_now)
    rest = train(mode, task, ckpt=tmp_path / "c", policy=policy, every=every_now)
    steps = range(SAVED_AT, BATCHES * EPOCHS)
    assert_close(rest, old if policy == "checkpoint" else new, steps)
    differing = [
        group["name"]
        for index, group in enumerate(groups)
        if any(abs(old[step][index] - new[step][index]) > 1e-7 for step in steps)
    ]
    told = [LINE.fullmatch(line) for line in lines_of(caplog)]
    assert all(told) and differing
    assert [match.group(1) for match in told if match] == differing
    for match in told:
        assert match is not None
        name, step = match.group(1), int(match.group(2))
        index = [group["name"] for group in groups].index(name)
        theirs, ours, counts = map(float, match.groups()[2:5])
        assert theirs == pytest.approx(old[step][index], rel=1e-6)
        assert ours == pytest.approx(new[step][index], rel=1e-6)
        assert counts == (theirs if policy == "checkpoint" else ours) != 0
        assert theirs != ours and match.group(6) == policy


def test_config_forgets_what_set_lr_did_and_says_so(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``set_lr`` is part of the run, not of the code."""
    train(mode, Line(), save=tmp_path / "c", changes={3: ("stem", 0.25)})
    caplog.set_level(logging.INFO, "ofengine")
    rest = train(mode, Line(), ckpt=tmp_path / "c", policy="config")
    assert_close(rest, by_hand(_none), range(SAVED_AT, BATCHES * EPOCHS))
    (line,) = lines_of(caplog)
    assert "'stem': its rate at step 6 is 0.25 by the checkpoint and 0.5 by the code" in line


def test_set_lr_goes_on_over_a_changed_base_rate(mode: str, tmp_path: Path) -> None:
    """Under "checkpoint" a rate that was set stays, and can be set again."""
    make, closed, groups, _ = KINDS["ExponentialLR"]
    before, later = {3: ("stem", 0.25)}, {9: ("head", 0.125)}
    train(mode, Line(make), save=tmp_path / "c", changes=before)
    task = Line(make, [{**group, "lr": 9.0} for group in groups])
    rest = train(mode, task, ckpt=tmp_path / "c", changes=later)
    expected = by_hand(closed, changes={**before, **later})
    assert_close(rest, expected, range(SAVED_AT, BATCHES * EPOCHS))


def test_a_plateau_keeps_its_memory_or_begins_anew(mode: str, tmp_path: Path) -> None:
    """Under "checkpoint" with its old arguments; under "config" with a fresh memory."""
    _, closed, groups, scheduling = KINDS["ReduceLROnPlateau"]

    def plateau(factor: float, patience: int) -> Callable[[Any], Any]:
        return lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=factor, patience=patience)

    train(mode, Line(plateau(0.5, 1), groups, scheduling), save=tmp_path / "c")
    for policy in ("checkpoint", "config"):
        task = Line(plateau(0.25, 2), groups, scheduling)
        rest = train(mode, task, ckpt=tmp_path / "c", policy=policy)

        def afresh(lr: float, step: int) -> float:
            # The metric of the step that was saved is the first that is observed.
            return lr * 0.25 ** (max(step - SAVED_AT, 0) // 3)

        expected = by_hand(closed if policy == "checkpoint" else afresh)
        assert_close(rest, expected, range(SAVED_AT, BATCHES * EPOCHS))


# ---------------------------------------------------------------------- refused

REFUSED: Dict[str, Tuple[Any, Any, Dict[str, Any], Dict[str, Any], str]] = {
    "another class": (
        _exponential(0.8)[0], lambda o: lr_scheduler.StepLR(o, 3), {}, {},
        r"the checkpoint's schedule is ExponentialLR by step, and the code's is StepLR by step",
    ),
    "none any more": (
        _exponential(0.8)[0], None, {}, {},
        r"is ExponentialLR by step, and the code's is none,",
    ),
    "one where there was none": (
        None, _exponential(0.8)[0], {}, {},
        r"is none, and the code's is ExponentialLR by step",
    ),
    "a table for a function": (
        lambda o: _wave, lambda o: TABLE, {}, {},
        r"is a function by step, and the code's is a table by step",
    ),
    "another class inside": (
        _sequence,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [4]
        ),
        {}, {},
        r"SequentialLR \(LinearLR, ExponentialLR\) by step, .* "
        r"SequentialLR \(ConstantLR, ExponentialLR\) by step",
    ),
    "another of one group": (
        lambda o: {"stem": _wave}, lambda o: {"stem": _wave, "head": TABLE}, {}, {},
        r"one for each group \(a function, none\) by step, .*\(a function, a table\) by step",
    ),
    "another interval": (
        lambda o: TABLE, lambda o: TABLE, {}, {"interval": "epoch"},
        r"is a table by step, and the code's is a table by epoch",
    ),
    "another frequency": (
        lambda o: TABLE, lambda o: TABLE, {}, {"frequency": 2},
        r"is a table by step, and the code's is a table by 2 steps",
    ),
    "another function": (
        lambda o: _wave, lambda o: lambda p: _wave(p) * (1.01 if p >= 8 else 1), {}, {},
        r"gave group 'stem' the rate 1\.05\d* at step 8 in the checkpoint, and gives 1\.0\d* now",
    ),
    "another function in a LambdaLR": (
        lambda o: lr_scheduler.LambdaLR(o, _wave),
        lambda o: lr_scheduler.LambdaLR(o, [_wave, lambda p: 1.0]), {}, {},
        r"gave group 'head' the rate \S+ at step \d+ in the checkpoint, and gives 0\.3 now",
    ),
}  # fmt: skip


class Momentum(Line):
    """As :class:`Line`, with an optimizer that keeps something."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
        return made


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_schedule_that_cannot_go_on_is_refused_before_anything_changes(
    mode: str, case: str, tmp_path: Path
) -> None:
    """Weights, optimizer and generators stay; "config" takes the code's, as is said."""
    before, now, scheduling, scheduling_now, message = REFUSED[case]
    train("eager", Line(before, scheduling=scheduling), save=tmp_path / "c")
    task = Line(now, scheduling=scheduling_now)
    for index in range(2):
        getattr(task, f"w{index}").data.fill_(index + 5.0)
    weights = weights_of(task)
    flow.manual_seed(5)
    np.random.seed(5)
    trainer = quiet_trainer(mode=mode, max_epochs=EPOCHS)
    data = [flow.zeros(1) for _ in range(BATCHES)]
    with pytest.raises(RateError, match=message) as caught:
        trainer.fit(task, data, ckpt_path=tmp_path / "c")
    assert "fit(..., rates_on_resume='config')" in str(caught.value)
    assert "configure_optimizers()" in str(caught.value)
    assert weights_of(task) == weights
    assert trainer.global_step == 0
    assert all(not kept for kept in trainer.optimizer.state_dict()["state"].values())
    drawn = flow.rand(3).numpy(), np.random.rand()
    flow.manual_seed(5)
    np.random.seed(5)
    assert (drawn[0] == flow.rand(3).numpy()).all() and drawn[1] == np.random.rand()
    rest = train(mode, Line(now, scheduling=scheduling_now), ckpt=tmp_path / "c", policy="config")
    assert sorted(rest) == list(range(SAVED_AT, BATCHES * EPOCHS))


def test_a_changed_function_is_noticed_where_the_run_was_over(mode: str, tmp_path: Path) -> None:
    """No rate was to come, but those of the past tell."""
    train("eager", Line(lambda o: _wave), epochs=2, save=tmp_path / "c", save_at=8)
    with pytest.raises(RateError, match="it has become another"):
        train(mode, Line(lambda o: lambda p: 1.0), epochs=3, ckpt=tmp_path / "c")


def test_a_function_that_knows_no_further_steps_can_be_saved_and_resumed(
    mode: str, tmp_path: Path
) -> None:
    """Of a run whose length is known, no step beyond it is asked for."""
    factors = [1.0 / (1 + p) for p in range(BATCHES * EPOCHS)]

    def make(optimizer: Any) -> Any:
        return lambda position: factors[position]

    whole = train(mode, Line(make), save=tmp_path / "c", save_at=BATCHES * EPOCHS - 1)
    rest = train(mode, Line(make), ckpt=tmp_path / "c")
    assert rest == {11: whole[11]}


@pytest.mark.parametrize("policy", ["checkpoint", "config"])
@pytest.mark.parametrize("case", ["names", "count", "order", "members"])
def test_other_groups_are_refused_under_both(
    mode: str, case: str, policy: str, tmp_path: Path
) -> None:
    """A run goes on with the groups it was begun with."""

    class Regrouped(Line):
        def param_groups(self) -> List[Dict[str, Any]]:
            first, second = super().param_groups()
            if case == "names":
                return [first, {**second, "name": "neck"}]
            if case == "count":
                return [{**first, "params": [*first["params"], *second["params"]]}]
            if case == "order":
                return [second, first]
            return [{**first, "params": second["params"]}, {**second, "params": first["params"]}]

    train("eager", Line(), save=tmp_path / "c")
    task = Regrouped()
    weights = weights_of(task)
    with pytest.raises(CheckpointError, match="with the groups it was begun with") as caught:
        train(mode, task, ckpt=tmp_path / "c", policy=policy)
    if case == "members":
        assert "group 'stem' holds 'w1'" in str(caught.value)
    assert weights_of(task) == weights


# ---------------------------------------------------------------------- without training


@st.composite
def plans(draw: Any) -> Tuple[Callable[..., Tuple[RatePlan, Optimization]], int, int]:
    """(what makes a plan, its optimizer steps, the step of the checkpoint).

    All base rates and scales of the plan can be multiplied by a number each.
    """
    keys = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "lr": st.floats(1e-4, 10),
                    "lr_scale": st.one_of(st.just(1.0), st.floats(0, 5)),
                    "lr_decay_scale": st.one_of(st.just(1.0), st.floats(0.1, 1.5)),
                }
            ),
            min_size=1,
            max_size=3,
        )
    )
    kind = draw(st.sampled_from([k for k in KINDS if k not in ("one a group", "oneflow WarmupLR")]))
    batches, accumulate = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    epochs = draw(st.integers(1, 4))
    interval = draw(st.sampled_from(["step", "epoch"]))
    frequency = draw(st.integers(1, 2))
    decay = DecayEvents(
        draw(st.integers(1, 4)), draw(st.booleans()),
        draw(st.sampled_from(["lr_scale", "lr_decay_scale"])),
    )  # fmt: skip
    total = epochs * -(-batches // accumulate)

    def make(more: float = 1.0, scale: float = 1.0) -> Tuple[RatePlan, Optimization]:
        optimizer = flow.optim.SGD(
            [{"params": [nn.Parameter(flow.zeros(1))], "lr": each["lr"] * more} for each in keys]
        )
        schedule = KINDS[kind].make
        made = Optimization(
            optimizer, None if schedule is None else schedule(optimizer), interval, frequency
        )
        groups = [
            Group(
                name=f"g{index}",
                lr=each["lr"] * more,
                lr_scale=each["lr_scale"] * scale,
                lr_decay_scale=each["lr_decay_scale"],
                tensors=1,
                numbers=1,
                declares_scale=True,
            )
            for index, each in enumerate(keys)
        ]
        rates = make_schedule(made, [g.name for g in groups], [g.lr for g in groups])
        calendar = Calendar(batches, accumulate)
        plan = RatePlan(groups, calendar, rates, interval, frequency)
        plan.set_decay(decay, "test")
        plan.stop = total
        return plan, made

    return make, total, draw(st.integers(0, total - 1))


@settings(max_examples=200)
@given(plans(), st.data())
def test_a_resumed_plan_gives_the_uninterrupted_plan_s_rates(drawn: Any, data: Any) -> None:
    """For any groups, schedule and place; with rates set, and a metric observed, on the way."""
    make, total, place = drawn
    plan, made = make()
    for step in range(place):
        plan.rates(step)
        if data.draw(st.booleans()):
            plan.observe(data.draw(st.sampled_from([1.0, 2.0])))
        if step and data.draw(st.integers(0, 3)) == 0:
            group = data.draw(st.sampled_from(plan.names))
            plan.set_lr(group, data.draw(st.floats(0, 1)), step)
    state = json.loads(json.dumps(plan_state(plan, made, place)))
    resumed, its_made = make()
    assert resume_plan(resumed, its_made, state, "checkpoint") == []
    for step in range(place, total):
        assert resumed.rates(step) == plan.rates(step)
    assert json.loads(json.dumps(plan_state(resumed, its_made, place))) == state


@settings(max_examples=200)
@given(plans(), st.floats(0.1, 4), st.floats(0.1, 4), st.sampled_from(["checkpoint", "config"]))
def test_changed_numbers_count_by_the_policy(
    drawn: Any, more: float, scale: float, policy: str
) -> None:
    """All base rates and scales multiplied: the old plan's rates go on, or the new one's do."""
    make, total, place = drawn
    old, made = make()
    state = json.loads(json.dumps(plan_state(old, made, place)))

    new, _ = make(more, scale)
    resumed, its_made = make(more, scale)
    lines = resume_plan(resumed, its_made, state, policy)
    for step in range(place, total):
        assert resumed.rates(step) == (old if policy == "checkpoint" else new).rates(step)
    differs = [old.rates(step) != new.rates(step) for step in range(place, total)]
    assert bool(lines) == any(differs)
