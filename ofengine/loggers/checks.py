"""Whether a logger of the user's own can be called as the Trainer calls it, before it trains."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Tuple

from ofengine.errors import ConfigurationError
from ofengine.loggers.base import Logger

_CALLS: Dict[str, Tuple[str, ...]] = {
    "log_metrics": ("metrics", "step", "epoch"),
    "log_hyperparams": ("hparams",),
    "save_due": ("step",),
    "state_dict": (),
    "check_state_dict": ("state",),
    "save": (),
    "finalize": ("status",),
}
"""What each method is called with, by position."""


def check_logger(logger: Logger) -> None:
    """Raise :class:`ConfigurationError` where a method is missing or takes other arguments."""
    cls = type(logger)
    if cls.log_metrics is Logger.log_metrics and "log_metrics" not in vars(logger):
        raise ConfigurationError(
            f"{cls.__name__} has no log_metrics: write "
            "`def log_metrics(self, metrics, step, epoch)`, which takes a dict of numbers."
        )
    for name, arguments in _CALLS.items():
        _check_call(cls.__name__, name, getattr(logger, name), arguments)
    load: Any = logger.load_state_dict
    if not _takes(load, 1, "continue_files"):
        raise _other_arguments(cls.__name__, "load_state_dict", ("state", "continue_files"))


def _check_call(cls: str, name: str, method: Any, arguments: Tuple[str, ...]) -> None:
    if not _takes(method, len(arguments)):
        raise _other_arguments(cls, name, arguments)


def _takes(method: Any, count: int, *by_name: str) -> bool:
    """True where ``method`` can be called with so many arguments, and with others by name."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # written in C
        return True
    try:
        signature.bind(*range(count), **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def _other_arguments(cls: str, name: str, arguments: Tuple[str, ...]) -> ConfigurationError:
    called = ", ".join(("self", *arguments))
    return ConfigurationError(
        f"{cls}.{name} takes other arguments than it is called with: write `def {name}({called})`."
    )
