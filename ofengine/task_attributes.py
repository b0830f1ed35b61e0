"""What a task's attributes lead to: its Trainer, a scheduler, the error within a property."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, List, Optional

from ofengine.errors import ConfigurationError
from ofengine.rates.followed import Followed
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


def scheduler_of(trainer: RunView) -> Any:
    """What ``configure_optimizers`` returned as such; it tells the rates that train."""

    def rates() -> List[float]:
        return trainer.rates.rates(max(trainer.global_step - 1, 0))

    scheduler = trainer.lr_scheduler
    return Followed(scheduler, rates) if hasattr(scheduler, "get_last_lr") else scheduler


if TYPE_CHECKING:
    of_class_alone = classmethod
else:

    class of_class_alone(classmethod):
        """A class method that makes a new object: called on an object, it would leave that as is.

        Raises :class:`ConfigurationError` at such a call.
        """

        def __get__(self, instance: Any, owner: Optional[type] = None) -> Any:
            """The method of the class; of an object, what refuses the call."""
            bound = super().__get__(instance, owner)
            return bound if instance is None else _refusing(bound, type(instance).__name__)


def _refusing(method: Any, cls: str) -> Any:
    name = method.__name__

    @functools.wraps(method)
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise ConfigurationError(
            f"{name}() makes a new task, and was called on an object, which would stay as it is: "
            f"call it on the class, as in task = {cls}.{name}(path), or write "
            "ofengine.load_weights(task, path)."
        )

    return refuse
