"""What stands for a logger on the ranks other than 0 has its methods, and does nothing."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from ofengine.loggers import Logger, TensorBoardLogger
from ofengine.loggers.silent import SilentLogger


class Pictures(Logger):
    """A logger that has more than there has to be."""

    def __init__(self) -> None:
        self.title = "of the run"

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        raise AssertionError("only rank 0 logs")

    def log_image(self, name: str, image: Any) -> Any:
        raise AssertionError("only rank 0 logs")

    @property
    def experiment(self) -> Any:
        raise AssertionError("only rank 0 has it")


def test_methods_do_nothing_and_attributes_are_what_they_were() -> None:
    silent: Any = SilentLogger(Pictures())
    assert silent.log_image("rates", image=1) is None
    assert silent.title == "of the run"
    with pytest.raises(AttributeError, match="log_picture"):
        silent.log_picture("rates", 1)


def test_another_library_s_object_takes_whatever_is_done_with_it() -> None:
    silent: Any = SilentLogger(Pictures())
    with silent.experiment.start_run("here") as run:
        run.log({"loss": 1.0}).config["lr"] = 0.1
    assert list(silent.experiment.runs) == []


def test_so_it_is_with_those_of_ofengine(tmp_path: Any) -> None:
    silent: Any = SilentLogger(TensorBoardLogger(tmp_path))
    for name in ("log_image", "log_histogram", "log_figure", "log_text"):
        assert getattr(silent, name)("name", None) is None
    assert not list(tmp_path.iterdir())
