"""EarlyStopping: training ends when it should, says why, and a resumed run remembers."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import oneflow as flow
import pytest
from helpers import Resume, Scored, quiet_trainer

from ofengine import Callback, CheckpointError, ConfigurationError, OFEngineWarning
from ofengine.callbacks import EarlyStopping, ModelCheckpoint

NAN, INF = float("nan"), float("inf")
BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""


class Task(Scored):
    """Logs ``scores[epoch]`` as ``val_loss`` at each validation (without, nothing)."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        if self.scores is not None:
            self.log("val_loss", self.scores[min(self.current_epoch, len(self.scores) - 1)])


class TrainMean(Task):
    """Logs an epoch's mean of training, ``means[epoch]``, and nothing in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_x", loss * 0 + batch.mean(), on_step=False, on_epoch=True)
        return loss


def fit(
    early: EarlyStopping,
    scores: Optional[Sequence[float]],
    also: Sequence[Callback] = (),
    task: Optional[Task] = None,
    **arguments: Any,
) -> Any:
    arguments = {"max_epochs": len(scores or "1234"), "num_sanity_val_steps": 0, **arguments}
    trainer = quiet_trainer(callbacks=[early, *also], **arguments)
    trainer.fit(task or Task(scores), BATCHES, None if scores is None else BATCHES)
    return trainer


def messages(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("EarlyStopping")]


@pytest.fixture(autouse=True)
def _keep_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ofengine")


# ---------------------------------------------------------------------- when it stops


@pytest.mark.parametrize(
    ("arguments", "scores", "stopped", "reason"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1], 3, "no better 2 times in a row than its best, 2."),
        ({"patience": 3}, [3, 2, 2, 2, 1], None, ""),
        ({"patience": 2, "mode": "max"}, [1, 2, 1, 1, 3], 3, "val_loss was no better 2 times"),
        ({"patience": 1}, [3, 3, 3], 1, "no better 1 time in a row"),
        ({"patience": 0}, [3, 2, 2, 2], 2, "no better 1 time in a row"),
        ({"patience": 0}, [3, 2, 1], None, ""),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.5, 2.5, 1], 2, "no better by 0.5 2 times"),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.25, 1.5, 0.75], None, ""),
        ({"patience": 2, "min_delta": 0.5, "mode": "max"}, [0, 0.5, 0.5, 2], 2, "no better by"),
        ({"stopping_threshold": 1.0}, [3, 1, 0.5, 0], 2, "better than stopping_threshold=1"),
        ({"stopping_threshold": 1.0, "mode": "max"}, [0, 1, 2, 3], 2, "val_loss = 2 is better"),
        ({"divergence_threshold": 5.0}, [3, 5, 6, 1], 2, "worse than divergence_threshold=5"),
        ({"divergence_threshold": 0.0, "mode": "max"}, [1, 0, -1, 1], 2, "= -1 is worse than"),
        ({}, [3, NAN, 1], 1, "nan is not finite (the best was 3)"),
        ({}, [3, INF, 1], 1, "inf is not finite"),
        ({"check_finite": False, "patience": 2}, [3, NAN, 1, NAN, NAN, 0], 4, "than its best, 1"),
    ],
)
def test_it_stops_where_the_metric_says_so(
    caplog: pytest.LogCaptureFixture,
    arguments: Dict[str, Any],
    scores: List[float],
    stopped: Optional[int],
    reason: str,
) -> None:
    early = EarlyStopping("val_loss", **arguments)
    trainer = fit(early, scores)
    assert early.stopped_epoch == stopped
    assert trainer.global_step == 2 * (len(scores) if stopped is None else stopped + 1)
    assert trainer.should_stop == (stopped is not None)
    assert len(messages(caplog)) == (stopped is not None)
    if stopped is not None:
        assert reason in messages(caplog)[0]
        assert f"stops in epoch {stopped} at step {2 * stopped + 2}" in messages(caplog)[0]


def test_both_modes_stop_at_the_same_step(mode: str) -> None:
    early = EarlyStopping("val_loss", patience=1)
    assert fit(early, [3, 2, 2, 1], mode=mode).global_step == 6
    assert (early.best_score, early.wait_count, early.stopped_epoch) == (2.0, 1, 2)


def test_a_validation_within_the_epoch_can_stop_it_there() -> None:
    early = EarlyStopping("val_loss", patience=1)
    assert fit(early, [3, 2, 1], val_check_interval=1).global_step == 2
    assert early.stopped_epoch == 0


def test_the_sanity_check_does_not_count() -> None:
    early = EarlyStopping("val_loss", patience=1)
    assert fit(early, [3, 2, 1], num_sanity_val_steps=1).global_step == 6


def test_each_fit_starts_anew() -> None:
    early = EarlyStopping("val_loss", patience=1)
    fit(early, [1, 1, 1])
    trainer = fit(early, [9, 8, 7])
    assert (trainer.global_step, early.best_score, early.stopped_epoch) == (6, 7.0, None)


def test_verbose_logs_each_new_best(caplog: pytest.LogCaptureFixture) -> None:
    fit(EarlyStopping("val_loss", verbose=True), [3, 2, 2])
    assert messages(caplog) == [
        "EarlyStopping: val_loss = 3 is the best so far.",
        "EarlyStopping: val_loss = 2 is the best so far (before: 3).",
    ]


# ---------------------------------------------------------------------- which moments count


def test_without_validation_each_epoch_counts() -> None:
    assert fit(EarlyStopping("loss", stopping_threshold=INF), None).global_step == 2


@pytest.mark.parametrize("every", [1, 2])
def test_an_epochs_mean_of_training_counts_once_an_epoch(every: int) -> None:
    data = [[flow.full((3, 2), x)] for x in (5.0, 4.0, 4.0, 3.0, 3.0, 3.0)]
    early = EarlyStopping("train_x", patience=2)

    class Epochs:
        def __init__(self) -> None:
            self.epoch = -1

        def __iter__(self) -> Any:
            self.epoch += 1
            return iter(data[self.epoch])

    trainer = quiet_trainer(
        max_epochs=6,
        callbacks=early,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=every,
    )
    trainer.fit(TrainMean([0.0]), Epochs(), BATCHES)
    assert (early.stopped_epoch, early.best_score) == (5, 3.0)


def test_epochs_without_validation_do_not_count() -> None:
    early = EarlyStopping("val_loss", patience=2)
    trainer = fit(early, [3] * 8, check_val_every_n_epoch=2)
    assert (trainer.global_step, early.stopped_epoch) == (12, 5)


@pytest.mark.parametrize(("at_epoch_end", "stopped"), [(True, 1), (False, 0), (None, 0)])
def test_the_moments_can_be_chosen(at_epoch_end: Optional[bool], stopped: int) -> None:
    early = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=at_epoch_end)
    fit(early, [3, 3], val_check_interval=1)
    assert early.stopped_epoch == stopped


def test_looking_after_validations_that_never_come_is_warned_of() -> None:
    early = EarlyStopping("loss", check_on_train_epoch_end=False, stopping_threshold=INF)
    with pytest.warns(OFEngineWarning, match="this fit has none"):
        assert fit(early, None).global_step == 8


# ---------------------------------------------------------------------- resumed runs


def state_after(scores: List[float], **arguments: Any) -> Dict[str, Any]:
    early = EarlyStopping("val_loss", **arguments)
    fit(early, scores)
    return early.state_dict()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_stops_where_the_whole_run_stops(cut: int) -> None:
    scores: List[float] = [3, 2, 2.5, 2.25, 1, 0]
    whole = EarlyStopping("val_loss", patience=2)
    fit(whole, scores)
    assert whole.stopped_epoch == 3
    resumed = EarlyStopping("val_loss", patience=2)
    state = state_after(scores[:cut], patience=2)
    fit(resumed, scores[cut:], [Resume(resumed, state)])
    assert resumed.stopped_epoch == 3 - cut
    assert (resumed.best_score, resumed.wait_count) == (whole.best_score, whole.wait_count)


def test_the_state_survives_the_round_trip() -> None:
    state = state_after([3, 2, 2], patience=3)
    assert state == {
        "best_score": 2.0,
        "last_score": 2.0,
        "stopped_epoch": None,
        "wait_count": 1,
        "validated": True,
        "waits_for_epoch_end": False,
        "missed": False,
        "stopped_by": None,
    }
    fresh = EarlyStopping("val_loss")
    assert fresh.state_dict()["best_score"] == math.inf
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    # Of the first days of this format.
    fresh.load_state_dict({name: state[name] for name in list(state)[:4]})
    assert fresh.state_dict() == state


STOPPED: List[Tuple[Dict[str, Any], List[float]]] = [
    ({"patience": 2}, [1, 1, 1]),
    ({"patience": 0}, [1, 1]),
    ({"stopping_threshold": 0.5}, [1, 0.25]),
    ({"divergence_threshold": 5.0}, [1, 6]),
    ({}, [1, NAN]),
]


@pytest.mark.parametrize(("arguments", "scores"), STOPPED)
def test_a_run_that_had_stopped_stops_again(
    caplog: pytest.LogCaptureFixture, arguments: Dict[str, Any], scores: List[float]
) -> None:
    state = state_after(scores, **arguments)
    caplog.clear()
    early = EarlyStopping("val_loss", **arguments)
    trainer = fit(early, [0.0] * 3, [Resume(early, state)])
    assert trainer.global_step == 0
    assert early.stopped_epoch == len(scores) - 1
    assert len(messages(caplog)) == 1
    assert "had been stopped before: val_loss" in messages(caplog)[0]


class WasStopping(Callback):
    """Brings a run to the state that a checkpoint of a stopped run may bring it to."""

    def on_fit_start(self, trainer: Any, task: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("arguments", "scores", "now"),
    [
        ({"patience": 2}, [1, 1, 1], {"patience": 4}),
        ({"stopping_threshold": 0.5}, [1, 0.25], {"stopping_threshold": -1.0}),
        ({}, [1, NAN], {"check_finite": False}),
    ],
)
def test_a_run_that_had_stopped_goes_on_where_it_may_now(
    caplog: pytest.LogCaptureFixture,
    arguments: Dict[str, Any],
    scores: List[float],
    now: Dict[str, Any],
) -> None:
    state = state_after(scores, **arguments)
    caplog.clear()
    early = EarlyStopping("val_loss", **now)
    trainer = fit(early, [0.5], [Resume(early, state), WasStopping()])
    assert trainer.global_step == 2
    assert early.stopped_epoch is None
    assert len(messages(caplog)) == 1
    assert f"stopped in epoch {len(scores) - 1}, training goes on" in messages(caplog)[0]


@pytest.mark.parametrize(
    ("arguments", "worse"), [({"patience": 1}, 2.0), ({"divergence_threshold": 5.0}, 9.0)]
)
def test_a_stop_that_is_held_back_stays_one_when_the_metric_recovers(
    mode: str, tmp_path: Path, arguments: Dict[str, Any], worse: float
) -> None:
    def run(path: Optional[Path] = None, **now: Any) -> Tuple[int, Optional[int]]:
        early = EarlyStopping("val_loss", **{**arguments, **now})
        saves = [] if path else [ModelCheckpoint(tmp_path, save_top_k=-1)]
        trainer = quiet_trainer(
            mode=mode, max_epochs=6, min_epochs=4, num_sanity_val_steps=0, callbacks=[early, *saves]
        )
        trainer.fit(Task([1.0, worse, 0.5, 0.25, 0.125, 0.0]), BATCHES, BATCHES, ckpt_path=path)
        return trainer.global_step, early.stopped_epoch

    whole, path = run(), tmp_path / "epoch=2-step=6.safetensors"
    assert whole == (8, 1)
    assert run(path) == whole
    assert run(path, patience=9, divergence_threshold=99.0) == (12, None)


def test_another_that_may_go_on_does_not_overrule_a_stop_that_is_held_back() -> None:
    held, other = (EarlyStopping("val_loss", patience=1) for _ in range(2))
    fit(held, [1, 2, 0.5], [other], min_epochs=3)
    states = held.state_dict(), other.state_dict()
    assert states[0]["stopped_by"] == [2.0, 1.0, 1]
    early, patient = EarlyStopping("val_loss", patience=1), EarlyStopping("val_loss", patience=9)
    also = [patient, Resume(early, states[0]), Resume(patient, states[1]), WasStopping()]
    assert fit(early, [0.25], also).global_step == 0


@pytest.mark.parametrize("patient_first", [True, False])
def test_of_two_one_that_may_go_on_does_not_overrule_one_that_may_not(patient_first: bool) -> None:
    state = state_after([1, 1, 1], patience=2)
    patient, other = EarlyStopping("val_loss", patience=9), EarlyStopping("val_loss", patience=2)
    pair = [patient, other] if patient_first else [other, patient]
    trainer = fit(pair[0], [0.5], [pair[1], Resume(patient, state), Resume(other, state)])
    assert trainer.global_step == 0


def test_a_state_that_lacks_something_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="lacks 'last_score', 'stopped_epoch'"):
        EarlyStopping("x").load_state_dict({"best_score": 1.0, "wait_count": 0})


# ---------------------------------------------------------------------- errors


def test_a_metric_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ConfigurationError) as caught:
        fit(EarlyStopping("val_los"), [1.0])
    assert "EarlyStopping(monitor='val_los')" in str(caught.value)
    assert "Did you mean 'val_loss'?" in str(caught.value)
    assert "['loss', 'val_loss']" in str(caught.value)


def test_not_strict_it_warns_once_and_never_stops() -> None:
    with pytest.warns(OFEngineWarning, match=r"no such metric.*mean 'val_loss'") as warned:
        trainer = fit(EarlyStopping("val_los", strict=False), [1.0, 1.0, 1.0])
    assert len(warned) == 1
    assert trainer.global_step == 6


def test_a_misspelt_metric_is_warned_of_before_training() -> None:
    with pytest.warns(OFEngineWarning, match="EarlyStopping.*did you mean 'val_loss'"):  # noqa: SIM117
        with pytest.raises(ConfigurationError):
            fit(EarlyStopping("val_los"), [0.5], num_sanity_val_steps=1)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"monitor": ""}, "monitor=''"),
        ({"monitor": None}, "monitor=None"),
        ({"min_delta": -0.1}, "min_delta=-0.1: give a number from 0 on"),
        ({"min_delta": "1"}, "min_delta='1': give a number"),
        ({"patience": -1}, "patience=-1: give a whole number"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"mode": "best"}, "mode='best': use one of"),
        ({"stopping_threshold": NAN}, "stopping_threshold=nan"),
        ({"divergence_threshold": True}, "divergence_threshold=True"),
        ({"check_finite": 1}, "check_finite=1: give True or False"),
        ({"check_on_train_epoch_end": "no"}, "check_on_train_epoch_end='no'"),
        ({"strict": 0}, "strict=0"),
        ({"verbose": None}, "verbose=None"),
    ],
)
def test_wrong_arguments_are_errors_at_once(wrong: Dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        EarlyStopping(**{"monitor": "val_loss", **wrong})
