"""What a task's attributes lead to: its Trainer, a scheduler, the error within a property."""

from __future__ import annotations

from typing import Any, List, Optional

from ofengine.rates.followed import Followed
from ofengine.run.view import RunView
from ofengine.tracing import forbid_in_trace


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


def scheduler_of(trainer: RunView) -> Any:
    """What ``configure_optimizers`` returned as such; it tells the rates that train."""

    def rates() -> List[float]:
        forbid_in_trace("self.lr_schedulers().get_last_lr()")
        return trainer.rates.rates(max(trainer.global_step - 1, 0))

    scheduler = trainer.lr_scheduler
    return Followed(scheduler, rates) if hasattr(scheduler, "get_last_lr") else scheduler
