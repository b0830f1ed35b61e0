"""A logger that the Trainer could not call is refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Notes, quiet_trainer

from ofengine import ConfigurationError
from ofengine.loggers import CSVLogger, Logger


def of_lightning(self: Any, metrics: Any, step: Any) -> None:
    """As a logger of Lightning's takes metrics."""


def without_default(self: Any, *, metrics: Any) -> None:
    """Cannot be called by position."""


@pytest.mark.parametrize(
    ("name", "method", "call"),
    [
        ("log_metrics", of_lightning, "self, metrics, step, epoch"),
        ("log_metrics", without_default, "self, metrics, step, epoch"),
        ("log_hyperparams", lambda self: None, "self, hparams"),
        ("finalize", lambda self: None, "self, status"),
        ("save", lambda self, path: None, "self"),
        ("state_dict", lambda self, prefix: {}, "self"),
        ("load_state_dict", lambda self, state: None, "self, state, continue_files"),
    ],
)
def test_a_method_with_other_arguments_is_named(name: str, method: Any, call: str) -> None:
    logger = type("Own", (Notes,), {name: method})()
    with pytest.raises(ConfigurationError, match=rf"Own\.{name} takes other .*{name}\({call}\)`"):
        quiet_trainer(logger=[Notes(), logger])


def test_one_without_log_metrics_is_told_so() -> None:
    class Empty(Logger):
        """Nothing."""

    with pytest.raises(ConfigurationError, match=r"Empty has no log_metrics: write `def log_metr"):
        quiet_trainer(logger=Empty())


def test_one_that_takes_more_or_anything_is_content() -> None:
    class Wide(Notes):
        def log_metrics(self, metrics: Any, *rest: Any, **more: Any) -> None:
            """Nothing."""

        def finalize(self, status: str, at: int = 0) -> None:
            """Nothing."""

    class Own(CSVLogger):
        """As it is."""

    trainer = quiet_trainer(logger=[Wide(), Own("unused")])
    assert len(trainer.loggers) == 2
