"""Every on_exception is called, and the first error is the one that is raised."""

from __future__ import annotations

import logging
import threading
from typing import Any, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule


class Line(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.layer(batch).mean())


class Fails(Callback):
    def __init__(self, seen: List[str], name: str, raises: BaseException) -> None:
        self.seen, self.name, self.raises = seen, name, raises

    def on_exception(self, trainer: Any, task: Any, exception: BaseException) -> None:
        self.seen.append(f"{self.name}: {exception}")
        raise self.raises

    def teardown(self, trainer: Any, task: Any, stage: str) -> None:
        self.seen.append(f"{self.name}: teardown")


@pytest.mark.parametrize("first", [ValueError("first"), KeyboardInterrupt("first")])
def test_an_error_in_on_exception_keeps_no_other_from_being_called(
    first: BaseException, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen: List[str] = []

    class Raises(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise first

    callbacks = [Raises(), Fails(seen, "a", KeyError("no")), Fails(seen, "b", OSError("no"))]
    with caplog.at_level(logging.ERROR, "ofengine"), pytest.raises(type(first), match="first"):
        quiet_trainer(mode=mode, max_epochs=1, callbacks=callbacks).fit(Line(), [flow.ones(1, 1)])
    assert seen == ["a: first", "b: first", "a: teardown", "b: teardown"]
    assert sum("on_exception itself raised" in line for line in caplog.messages) == 2


def test_two_fits_at_the_same_time_are_refused() -> None:
    """Both would draw from the same generators; one within the other is one after the other."""
    within, over, told = threading.Event(), threading.Event(), []

    class Waits(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            quiet_trainer(max_epochs=1).fit(Line(), [flow.ones(2, 1)])
            within.set()
            over.wait(60)

    def first() -> None:
        quiet_trainer(max_epochs=1, callbacks=[Waits()]).fit(Line(), [flow.ones(2, 1)])
        told.append("over")

    thread = threading.Thread(target=first)
    thread.start()
    assert within.wait(60)
    second = quiet_trainer(max_epochs=1)
    with pytest.raises(ConfigurationError, match="running in another thread, and both would draw"):
        second.fit(Line(), [flow.ones(2, 1)])
    second.validate(Line(), [flow.ones(2, 1)])  # draws nothing that is kept
    over.set()
    thread.join()
    assert told == ["over"]
    second.fit(Line(), [flow.ones(2, 1)])
    assert second.global_step == 1
