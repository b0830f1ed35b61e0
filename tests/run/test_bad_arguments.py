"""An argument of Trainer that means nothing is refused by its name."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
from fits import FullDiary, fitted_on
from helpers import MeanLine, OfUnknownLength, numbered_batches, quiet_trainer

from ofengine import ConfigurationError, Trainer
from ofengine.loggers import CSVLogger

# ---------------------------------------------------------------------- bad values

NAN, INFINITY = float("nan"), float("inf")
LIMITS = [-1, 1.5, -0.1, "3", True, NAN, INFINITY, [1]]
COUNTS_FROM_1 = [0, -1, 1.5, "2", True, None, NAN]
BAD: Dict[str, List[Any]] = {
    "mode": ["Graph", "static", None, 1, "", ["graph"]],
    "eval_mode": ["Graph", "static", 1, "", ["graph"]],
    "max_epochs": [-2, 1.5, "3", True, NAN, [1]],
    "max_steps": [-2, 1.5, "3", True, None, 1e4],
    "max_time": [
        5,
        0.5,
        "1h",
        "12:30",
        "00:00:00:-1",
        "",
        [1],
        {"hour": 1},
        {"hours": "2"},
        {"hours": NAN},
        {"days": 10**10},
        {"seconds": -1},
        timedelta(seconds=-1),
    ],
    "limit_train_batches": LIMITS,
    "limit_val_batches": LIMITS,
    "limit_test_batches": LIMITS,
    "limit_predict_batches": LIMITS,
    "val_check_interval": [0, -1, 0.0, 1.5, -0.5, "1", True, NAN, INFINITY, [1]],
    "check_val_every_n_epoch": COUNTS_FROM_1,
    "num_sanity_val_steps": [-2, 1.5, True, "2", None],
    "fast_dev_run": [-1, 1.5, "yes"],
    "overfit_batches": [-1, 1.5, -0.1, "2", True, NAN],
    "log_every_n_steps": COUNTS_FROM_1,
    "accumulate_grad_batches": [*COUNTS_FROM_1, {0: 0}],
    "gradient_clip_val": [-1, -0.5, "1", True, NAN, INFINITY, [1.0]],
    "gradient_clip_algorithm": ["l2", None, 1, ["norm"]],
    "precision": ["half", "16-true", 64, 8, 16.0, None, True, ["16-mixed"]],
    "seed": [-1, 1.5, "0", True, 2**64],
    "callbacks": [
        5,
        "bar",
        [None],
        [FullDiary, FullDiary()],
        FullDiary,
        [FullDiary],
        object(),
        True,
    ],
    "logger": [5, "csv", [None], CSVLogger, [CSVLogger], None],
    "enable_progress_bar": ["no", None],
    "enable_model_summary": ["no", None],
    "enable_checkpointing": ["no", None],
    "default_root_dir": [5, ["here"], True],
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param(argument, value, id=f"{argument}-{index}")
        for argument, values in BAD.items()
        for index, value in enumerate(values)
    ],
)
def test_a_bad_value_is_refused_by_its_name_with_what_to_write(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(**{argument: value})
    text = str(error.value)
    assert argument in text
    assert re.search(r"\b(give|use|write|call)\b", text), text
    assert len(text.splitlines()) == 1


NUMPY = ["max_epochs", "max_steps", "accumulate_grad_batches", "limit_train_batches", "seed"]


@pytest.mark.parametrize("argument", NUMPY)
def test_numpy_s_whole_numbers_are_whole_numbers(argument: str) -> None:
    arguments: Dict[str, Any] = {"max_epochs": 2, argument: np.int64(2)}
    _, trainer = fitted_on(numbered_batches(4), **arguments)
    steps = {"max_steps": 2, "accumulate_grad_batches": 4, "limit_train_batches": 4}
    assert trainer.global_step == steps.get(argument, 8)


AT_FIT: List[Tuple[Dict[str, Any], bool, str]] = [
    ({"val_check_interval": 6}, True, "val_check_interval"),
    ({"val_check_interval": 3, "limit_train_batches": 2}, True, "val_check_interval"),
    ({"val_check_interval": 0.5}, False, "val_check_interval"),
    ({"limit_train_batches": 0.1}, True, "limit_train_batches"),
    ({"limit_train_batches": 0.5}, False, "limit_train_batches"),
    ({"overfit_batches": 0.1}, True, "overfit_batches"),
    ({"overfit_batches": 0.5}, False, "overfit_batches"),
]


@pytest.mark.parametrize(("arguments", "known_length", "name"), AT_FIT)
def test_what_shows_only_with_the_data_is_refused_before_training(
    arguments: Dict[str, Any], known_length: bool, name: str
) -> None:
    diary = FullDiary()
    data = numbered_batches(5) if known_length else OfUnknownLength(numbered_batches(5))
    trainer = quiet_trainer(max_epochs=1, callbacks=diary, **arguments)
    with pytest.raises(ConfigurationError) as error:
        trainer.fit(MeanLine(), data, numbered_batches(2))
    assert name in str(error.value)
    assert diary.events == []


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("validate", "limit_val_batches"),
        ("test", "limit_test_batches"),
        ("predict", "limit_predict_batches"),
    ],
)
def test_a_share_of_less_than_a_batch_is_refused_by_the_argument_s_name(
    stage: str, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        getattr(quiet_trainer(**{name: 0.1}), stage)(MeanLine(), numbered_batches(5))


def test_an_argument_that_does_not_exist_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="max_epoch"):
        Trainer(max_epoch=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Trainer("graph")  # type: ignore[call-arg]
