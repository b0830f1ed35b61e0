"""Whether a logger of the user's own can be called as the Trainer calls it, before it trains."""

from __future__ import annotations

from typing import Dict, Tuple

from ofengine.errors import ConfigurationError
from ofengine.loggers.base import Logger
from ofengine.run.arguments import refused_by

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
        if refused_by(getattr(logger, name), arguments) is not None:
            raise _other_arguments(cls.__name__, name, arguments)
    if refused_by(logger.load_state_dict, ("state",), ("continue_files",)) is not None:
        raise _other_arguments(cls.__name__, "load_state_dict", ("state", "continue_files"))


def _other_arguments(cls: str, name: str, arguments: Tuple[str, ...]) -> ConfigurationError:
    called = ", ".join(("self", *arguments))
    return ConfigurationError(
        f"{cls}.{name} takes other arguments than it is called with: write `def {name}({called})`."
    )
