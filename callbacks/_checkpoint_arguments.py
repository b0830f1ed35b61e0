"""The arguments of ModelCheckpoint, checked: what is kept, and when it is looked at."""

from __future__ import annotations

from typing import Any, Optional

from ofengine.errors import ConfigurationError
from ofengine.run.arguments import MaxTime, seconds_of


def check_what(monitor: Optional[str], mode: str, save_top_k: int, restore_best: bool) -> None:
    """Raise :class:`ConfigurationError` where it cannot be told which files are to be kept."""
    if mode not in ("min", "max"):
        raise ConfigurationError(
            f"ModelCheckpoint(mode={mode!r}): use 'min' where less of the metric is better, "
            "else 'max'."
        )
    _check_whole("save_top_k", save_top_k, -1)
    if monitor is None and save_top_k > 1:
        raise ConfigurationError(
            f"ModelCheckpoint(save_top_k={save_top_k}) needs a metric to tell which are best: "
            "name one as monitor, or use save_top_k=-1 to keep all."
        )
    if restore_best and monitor is None:
        raise ConfigurationError(
            "ModelCheckpoint(restore_best=True) needs a metric to tell which is best: name "
            "one as monitor."
        )


def check_when(
    every_n_epochs: Optional[int],
    every_n_train_steps: Optional[int],
    train_time_interval: MaxTime,
) -> Optional[float]:
    """``train_time_interval`` in seconds; raise :class:`ConfigurationError` for two of these."""
    for name, every in (
        ("every_n_epochs", every_n_epochs),
        ("every_n_train_steps", every_n_train_steps),
    ):
        if every is not None:
            _check_whole(name, every, 1)
    seconds = seconds_of(train_time_interval, "ModelCheckpoint(train_time_interval=...)")
    whens = {
        "every_n_epochs": every_n_epochs,
        "every_n_train_steps": every_n_train_steps,
        "train_time_interval": seconds,
    }
    given = [name for name, when in whens.items() if when is not None]
    if len(given) > 1:
        raise ConfigurationError(
            f"ModelCheckpoint was given {' and '.join(given)}: give one of them, or list two "
            "ModelCheckpoints."
        )
    return seconds


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"ModelCheckpoint({name}={value!r}): give a whole number from {least} on."
        )
