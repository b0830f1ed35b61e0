"""The arguments that say how long a run is, how much of the data it sees, when it validates."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Dict, List, Optional, Tuple, Union

import oneflow as flow
import pytest
from fits import FullDiary, fitted_on
from helpers import MeanLine, OfUnknownLength, numbered_batches, quiet_trainer
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback

# ---------------------------------------------------------------------- how long


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, "0 1 | 0 1 | 0 1 |"),
        ({"max_epochs": 0}, ""),
        ({"max_epochs": None, "max_steps": 3}, "0 1 | 0 |"),
        ({"max_epochs": -1, "max_steps": 3}, "0 1 | 0 |"),
        ({"max_epochs": 1, "max_steps": 9}, "0 1 |"),
        ({"max_epochs": 9, "max_steps": 1}, "0 |"),
        ({"max_epochs": 9, "max_steps": 2}, "0 1 |"),
        ({"max_epochs": 9, "max_steps": 0}, ""),
        ({"max_epochs": 2, "max_steps": -1}, "0 1 | 0 1 |"),
    ],
)
def test_max_epochs_and_max_steps_whichever_comes_first(
    mode: str, arguments: Dict[str, Any], expected: str
) -> None:
    diary, trainer = fitted_on(numbered_batches(2), mode=mode, **arguments)
    assert diary == expected
    assert trainer.global_step == len(expected.replace("|", "").split())
    assert trainer.current_epoch == expected.count("|")


def test_max_steps_counts_optimizer_steps_not_batches(mode: str) -> None:
    diary, trainer = fitted_on(mode=mode, max_steps=2, accumulate_grad_batches=2, max_epochs=9)
    assert diary == "0 1 2 3 |"
    assert trainer.global_step == 2


def test_max_steps_in_the_middle_of_an_epoch_does_not_validate(mode: str) -> None:
    assert fitted_on(None, numbered_batches(1), mode=mode, max_steps=3)[0] == "0 1 2 |"


def test_max_steps_at_the_end_of_an_epoch_validates(mode: str) -> None:
    assert fitted_on(None, numbered_batches(1), mode=mode, max_steps=5)[0] == "0 1 2 3 4 v0 |"


def test_neither_epochs_nor_steps_nor_time_means_1000_epochs() -> None:
    assert quiet_trainer().max_epochs == 1000


@pytest.mark.parametrize("limit", [{"max_steps": 5}, {"max_time": "00:00:00:05"}])
def test_steps_or_time_alone_lift_the_limit_on_epochs(limit: Dict[str, Any]) -> None:
    assert quiet_trainer(**limit).max_epochs == -1


@pytest.mark.parametrize("none", ["00:00:00:00", timedelta(0), {"seconds": 0}])
def test_no_time_at_all_stops_after_the_first_step(
    mode: str, none: Union[str, timedelta, Dict[str, int]]
) -> None:
    assert fitted_on(mode=mode, max_time=none)[0] == "0 |"


def test_time_runs_out_at_an_optimizer_step_not_inside_a_window(mode: str) -> None:
    assert fitted_on(mode=mode, max_time="00:00:00:00", accumulate_grad_batches=3)[0] == "0 1 2 |"


@pytest.mark.parametrize(
    ("max_time", "seconds_a_step", "steps"),
    [
        ("00:00:00:03", 1, 3),
        ("00:00:02:00", 60, 2),
        ("00:03:00:00", 3600, 3),
        ("02:00:00:00", 86400, 2),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 4, 1),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 3, 2),
        (timedelta(seconds=2.5), 1, 3),
        (timedelta(days=1), 43200, 2),
        ({"hours": 1, "minutes": 30}, 1800, 3),
        ({"weeks": 1}, 3 * 86400, 3),
    ],
)
def test_max_time_in_all_its_forms(
    monkeypatch: pytest.MonkeyPatch, max_time: Any, seconds_a_step: float, steps: int
) -> None:
    now = [1000.0]

    class TakesTime(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += seconds_a_step

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    _, trainer = fitted_on(
        numbered_batches(2), max_epochs=-1, max_time=max_time, callbacks=[TakesTime()]
    )
    assert trainer.global_step == steps


def test_time_to_spare_changes_nothing(mode: str) -> None:
    assert (
        fitted_on(numbered_batches(2), mode=mode, max_epochs=2, max_time="01:00:00:00")[0]
        == "0 1 | 0 1 |"
    )


# ---------------------------------------------------------------------- how many batches

SHARES = [
    (None, 7),
    (1.0, 7),
    (1, 1),
    (3, 3),
    (100, 7),
    (0.5, 3),
    (0.2, 1),
    (0.99, 6),
]


@pytest.mark.parametrize(("limit", "count"), SHARES)
def test_limit_train_batches(limit: Union[int, float, None], count: int) -> None:
    diary, trainer = fitted_on(numbered_batches(7), max_epochs=2, limit_train_batches=limit)
    epoch = " ".join(map(str, range(count))) + " |"
    assert diary == f"{epoch} {epoch}"
    assert trainer.num_training_batches == count


@pytest.mark.parametrize(("limit", "count"), [*SHARES, (0, 0), (0.0, 0)])
def test_limit_val_batches(limit: Union[int, float, None], count: int) -> None:
    diary, _ = fitted_on(numbered_batches(1), numbered_batches(7), limit_val_batches=limit)
    assert diary.split() == ["0", *(f"v{index}" for index in range(count)), "|"]


@pytest.mark.parametrize(("limit", "count"), SHARES)
@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
def test_limits_of_the_other_verbs(verb: str, limit: Union[int, float, None], count: int) -> None:
    diary = FullDiary()
    argument = {"test": "limit_test_batches", "predict": "limit_predict_batches"}
    arguments = {argument.get(verb, "limit_val_batches"): limit}
    getattr(quiet_trainer(callbacks=diary, **arguments), verb)(MeanLine(), numbered_batches(7))
    assert len(diary.events) == count


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_limit_train_batches_of_0_trains_nothing(mode: str, nothing: Union[int, float]) -> None:
    diary, trainer = fitted_on(mode=mode, max_epochs=3, limit_train_batches=nothing)
    assert diary.replace("|", "").strip() == ""
    assert trainer.global_step == 0


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_limit_of_0_evaluates_nothing_and_does_not_speak_of_missing_data(verb: str) -> None:
    trainer = quiet_trainer(limit_val_batches=0, limit_test_batches=0, limit_predict_batches=0)
    assert getattr(trainer, verb)(MeanLine(), numbered_batches(2)) in ([], [{}])


def test_a_limit_works_where_the_length_is_not_known(mode: str) -> None:
    train = OfUnknownLength(numbered_batches(5))
    diary, _ = fitted_on(
        train, OfUnknownLength(numbered_batches(5)), mode=mode, max_epochs=2,
        limit_train_batches=2, limit_val_batches=1,
    )  # fmt: skip
    assert diary == "0 1 v0 | 0 1 v0 |"


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("interval", "count", "expected"),
    [
        (None, 3, "0 1 2 v0 |"),
        (1.0, 3, "0 1 2 v0 |"),
        (1, 3, "0 v0 1 v0 2 v0 |"),
        (2, 5, "0 1 v0 2 3 v0 4 |"),
        (5, 5, "0 1 2 3 4 v0 |"),
        (0.5, 4, "0 1 v0 2 3 v0 |"),
        (0.5, 5, "0 1 v0 2 3 v0 4 |"),
        (0.25, 4, "0 v0 1 v0 2 v0 3 v0 |"),
        (0.99, 4, "0 1 2 v0 3 |"),
    ],
)
def test_val_check_interval_in_batches_or_as_a_share(
    interval: Union[int, float, None], count: int, expected: str
) -> None:
    assert (
        fitted_on(numbered_batches(count), numbered_batches(1), val_check_interval=interval)[0]
        == expected
    )
    limited, _ = fitted_on(
        numbered_batches(9),
        numbered_batches(1),
        val_check_interval=interval,
        limit_train_batches=count,
    )
    assert limited == expected  # a share is one of the limited epoch


@pytest.mark.parametrize(
    ("interval", "expected"), [(None, "0 1 2 v0 |"), (1.0, "0 1 2 v0 |"), (2, "0 1 v0 2 |")]
)
def test_val_check_interval_where_the_length_is_not_known(
    mode: str, interval: Union[int, float, None], expected: str
) -> None:
    for accumulate in (1, 2):
        train = OfUnknownLength(numbered_batches(3))
        diary, _ = fitted_on(
            train, numbered_batches(1), mode=mode,
            val_check_interval=interval, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        assert diary == expected


def test_check_val_every_n_epoch() -> None:
    diary, _ = fitted_on(
        numbered_batches(1), numbered_batches(1), max_epochs=5, check_val_every_n_epoch=2
    )
    assert diary == "0 | 0 v0 | 0 | 0 v0 | 0 |"


def test_val_check_interval_and_check_val_every_n_epoch_together() -> None:
    diary, _ = fitted_on(
        numbered_batches(2),
        numbered_batches(1),
        max_epochs=2,
        check_val_every_n_epoch=2,
        val_check_interval=1,
    )
    assert diary == "0 1 | 0 v0 1 v0 |"


@pytest.mark.parametrize(
    ("steps", "limit", "tried"),
    [(0, None, 0), (1, None, 1), (9, None, 3), (-1, None, 3), (2, 1, 1)],
)
def test_num_sanity_val_steps(steps: int, limit: Optional[int], tried: int) -> None:
    diary, _ = fitted_on(
        numbered_batches(1),
        numbered_batches(3),
        num_sanity_val_steps=steps,
        limit_val_batches=limit,
    )
    before = diary.split("0", 1)[0] if not tried else diary[: diary.index("sane")]
    assert before.split() == [f"v{index}" for index in range(tried)]
    assert ("sane" in diary) == bool(tried)


def test_the_sanity_check_tries_two_batches_unless_told_otherwise() -> None:
    diary = FullDiary()
    quiet_trainer(max_epochs=1, callbacks=diary).fit(
        MeanLine(), numbered_batches(1), numbered_batches(3)
    )
    assert diary.text == "v0 v1 sane 0 v0 v1 v2 |"


def test_the_sanity_check_tries_that_many_batches_of_each_loader() -> None:
    loaders = [DataLoader(TensorDataset(flow.ones(4, 1, 2) * n)) for n in (10, 20)]

    class OfLists(MeanLine):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Seen(Callback):
        def __init__(self) -> None:
            self.seen: List[Tuple[int, int]] = []

        def on_validation_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            if trainer.sanity_checking:
                self.seen.append((loader, batch_idx))

    seen = Seen()
    trainer = quiet_trainer(max_epochs=1, callbacks=seen, num_sanity_val_steps=2)
    trainer.fit(OfLists(), numbered_batches(1), loaders)
    assert seen.seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_sanity_check_leaves_nothing_in_callback_metrics() -> None:
    at_start: List[Dict[str, float]] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            at_start.append(trainer.callback_metrics)

    fitted_on(numbered_batches(1), numbered_batches(2), num_sanity_val_steps=2, callbacks=[Looks()])
    assert at_start == [{}]


def test_that_there_is_no_limit_is_told_where_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    """A Trainer that only evaluates says nothing of epochs."""
    caplog.set_level("INFO", "ofengine")
    told = "max_epochs was not given: training up to 1000 epochs."
    for given in ({}, {"max_steps": 1}, {"max_epochs": 1000}):
        caplog.clear()
        trainer = quiet_trainer(**given, limit_train_batches=0)
        assert told not in caplog.messages
        trainer.fit(MeanLine(), numbered_batches(2))
        assert (told in caplog.messages) is (given == {})
