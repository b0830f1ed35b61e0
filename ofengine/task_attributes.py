"""What a task's attributes lead to: its Trainer, and the error within one of its properties."""

from __future__ import annotations

from typing import Any, Optional

from ofengine.run.view import RunView


class Attached:
    """The Trainer that runs a task. A copy, or what is unpickled, belongs to no Trainer."""

    def __init__(self, trainer: Optional[RunView]) -> None:
        self.trainer = trainer

    def __reduce__(self) -> Any:
        return Attached, (None,)


def error_within(own: Any, task: Any) -> Optional[AttributeError]:
    """The AttributeError that a property raises, which sends Python to ``__getattr__``."""
    try:
        own.__get__(task, type(task))
    except AttributeError as error:
        return error
    return None
