"""Errors: that they come before training, and read well."""

from __future__ import annotations

import re
from typing import Any, Optional, Type

import pytest

from helpers.data import batches
from helpers.trainers import quiet_trainer
from ofengine import Callback, OFEngineError

# What comes out of OneFlow itself must not be handed on as it is.
NOT_FOR_USERS = ("\x1b", "ci-user", "Traceback", "NoneType", "\n")


def first_line(error: Optional[BaseException]) -> str:
    """The first line of an error's text."""
    return str(error).splitlines()[0] if error is not None else ""


def line_of(function: Any) -> str:
    """``file:line`` of where a function begins."""
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def sentence(error: pytest.ExceptionInfo[OFEngineError], *parts: str) -> str:
    """The error's text, which is one readable line with all ``parts`` in it."""
    text = str(error.value)
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"
    for ugly in NOT_FOR_USERS:
        assert ugly not in text, f"{ugly!r} is in: {text}"
    assert len(text) > 20, text
    return text


class _Trained(Callback):
    """Counts what was trained before the error came."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def refused(
    task: Any,
    kind: Type[OFEngineError],
    *parts: str,
    mode: str = "eager",
    train: Any = None,
    validation: Any = None,
    trained: int = 0,
    **arguments: Any,
) -> str:
    """``fit`` raises ``kind`` with ``parts`` in its text, after ``trained`` batches.

    It trains on two ``batches()`` unless told otherwise.
    """
    counter = _Trained()
    callbacks = [counter, *arguments.pop("callbacks", [])]
    arguments.setdefault("max_epochs", 1)
    trainer = quiet_trainer(mode=mode, callbacks=callbacks, **arguments)
    with pytest.raises(kind) as error:
        trainer.fit(task, batches() if train is None else train, validation)
    assert counter.batches == trained
    return sentence(error, *parts)
