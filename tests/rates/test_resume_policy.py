"""Which rates count after a resume, measured from outside: by how far the weights move.

What is expected is written out in ``resumed_rates.py`` and here, in closed forms: no schedule,
plan or calendar of the engine (or of OneFlow) is asked for it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, OfUnknownLength, quiet_trainer, weights_of
from oneflow.optim import lr_scheduler
from resumed_rates import (
    BATCHES,
    EPOCHS,
    EQUAL_GROUPS,
    GROUPS,
    KINDS,
    SAVED_AT,
    TABLE,
    Closed,
    Line,
    annealed,
    assert_close,
    by_hand,
    cosine_decay,
    lines_of,
    sequence,
    train,
    wave,
)

from ofengine import CheckpointError, RateError
from ofengine.rates import WarmupLR

# Short runs of long schedules, which the engine rightly finds strange.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")


def resumed_in(mode: str, number: int) -> str:
    """The same mode for every other case, and the other one for those between."""
    return mode if number % 2 == 0 else MODES[1 - MODES.index(mode)]


both_turns = pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
"""The other turn resumes each case in the other mode."""


# ---------------------------------------------------------------------- unchanged code


@both_turns
@pytest.mark.parametrize("kind", list(KINDS))
def test_unchanged_code_goes_on_with_the_same_rates(
    mode: str, kind: str, turn: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the same mode or in the other one; decay and ``lr_scale`` included; nothing logged."""
    make, closed, groups, scheduling = KINDS[kind]
    whole = train(mode, Line(make, groups, scheduling), save=tmp_path / "c")
    assert_close(whole, by_hand(closed, groups), range(BATCHES * EPOCHS))
    caplog.set_level(logging.INFO, "ofengine")
    other = resumed_in(mode, list(KINDS).index(kind) + turn)
    rest = train(other, Line(make, groups, scheduling), ckpt=tmp_path / "c")
    assert rest == {step: whole[step] for step in range(SAVED_AT, BATCHES * EPOCHS)}
    assert lines_of(caplog) == []


BY_EPOCH = ["StepLR", "LambdaLR", "ChainedScheduler", "ofengine WarmupLR", "function", "table"]


@pytest.mark.parametrize("kind", [*BY_EPOCH, "one a group"])
@pytest.mark.parametrize("save_at", [4, 9])
@both_turns
def test_by_epoch_with_accumulation_and_set_lr(
    mode: str, kind: str, save_at: int, turn: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    late = {step: change for step, change in changes.items() if step > done}
    other = resumed_in(mode, [*BY_EPOCH, "one a group"].index(kind) + save_at + turn)
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
        lambda lr, p: annealed(lr, p, length, 0.0),
    )


def _milestones(*at: int) -> Tuple[Callable[[Any], Any], Closed]:
    return (
        lambda o: lr_scheduler.MultiStepLR(o, list(at), gamma=0.5),
        lambda lr, p: lr * 0.5 ** sum(p >= each for each in at),
    )


def _warmup(iters: int) -> Tuple[Callable[[Any], Any], Closed]:
    def closed(lr: float, p: int) -> float:
        end = cosine_decay(lr, iters)
        return cosine_decay(lr, p) if p >= iters else 0.2 * lr + (end - 0.2 * lr) * p / iters

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
        (lambda o: wave, lambda lr, p: lr * wave(p)),
        (lambda o: wave, lambda lr, p: lr * wave(p)),
        groups_now=_with(lr=0.7),
    ),
    "lr under a LambdaLR": Change(
        (lambda o: lr_scheduler.LambdaLR(o, wave), lambda lr, p: lr * wave(p)),
        (lambda o: lr_scheduler.LambdaLR(o, wave), lambda lr, p: lr * wave(p)),
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


@pytest.mark.parametrize(
    ("change", "policy", "mode"),
    [
        pytest.param(change, policy, mode, marks=pytest.mark.slow if other else ())
        for number, change in enumerate(CHANGES)
        for policy, first in zip(["checkpoint", "config"], MODES)
        for mode in MODES
        for other in [mode != resumed_in(first, number)]
    ],
)
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


@pytest.mark.parametrize("policy", ["checkpoint", "config"])
def test_another_rate_is_told_where_the_run_had_come_to_its_end(
    mode: str, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file knows of no step to come."""
    train("eager", Line(), epochs=1, save=tmp_path / "c", save_at=BATCHES)
    caplog.set_level(logging.INFO, "ofengine")
    assert train(mode, Line(), epochs=1, ckpt=tmp_path / "c") == {}
    train(mode, Line(), epochs=2, ckpt=tmp_path / "c")
    assert not [line for line in lines_of(caplog) if "by the code" in line]
    stem, *others = GROUPS
    task = Line(groups=[{**stem, "lr": 0.75}, *others])
    rest = train(mode, task, epochs=2, ckpt=tmp_path / "c", policy=policy)
    (line,) = [line for line in lines_of(caplog) if "by the code" in line]
    told = LINE.fullmatch(line)
    assert told is not None and told.group(1, 2) == (stem["name"], str(BATCHES - 1))
    theirs, ours, counts = map(float, told.group(3, 4, 5))
    assert ours == pytest.approx(theirs * 1.5) and counts == (ours, theirs)[policy == "checkpoint"]
    assert len(rest) == BATCHES


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
        lambda o: wave, lambda o: TABLE, {}, {},
        r"is a function by step, and the code's is a table by step",
    ),
    "another class inside": (
        sequence,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [4]
        ),
        {}, {},
        r"SequentialLR \(LinearLR, ExponentialLR\) by step, .* "
        r"SequentialLR \(ConstantLR, ExponentialLR\) by step",
    ),
    "another of one group": (
        lambda o: {"stem": wave}, lambda o: {"stem": wave, "head": TABLE}, {}, {},
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
        lambda o: wave, lambda o: lambda p: wave(p) * (1.01 if p >= 8 else 1), {}, {},
        r"gave group 'stem' the rate 1\.05\d* at step 8 in the checkpoint, and gives 1\.0\d* now",
    ),
    "another function in a LambdaLR": (
        lambda o: lr_scheduler.LambdaLR(o, wave),
        lambda o: lr_scheduler.LambdaLR(o, [wave, lambda p: 1.0]), {}, {},
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
    train("eager", Line(lambda o: wave), epochs=2, save=tmp_path / "c", save_at=8)
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
