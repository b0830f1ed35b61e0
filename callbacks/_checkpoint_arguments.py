"""The arguments of ModelCheckpoint, checked: what is kept, and when it is looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Union

from ofengine.disk import why_no_path
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import MaxTime, check_flag, seconds_of


def check_what(monitor: Optional[str], mode: str, save_top_k: int, restore_best: bool) -> None:
    """Raise :class:`ConfigurationError` where it cannot be told which files are to be kept."""
    if mode not in ("min", "max"):
        raise ConfigurationError(
            f"ModelCheckpoint(mode={mode!r}): use 'min' where less of the metric is better, "
            "else 'max'."
        )
    _check_whole("save_top_k", save_top_k, -1)
    if restore_best and monitor is None:
        raise ConfigurationError(
            "ModelCheckpoint(restore_best=True) needs a metric to tell which is best: name "
            "one as monitor."
        )


def check_flags(**flags: bool) -> None:
    """Raise :class:`ConfigurationError` for one that is neither True nor False."""
    for name, flag in flags.items():
        check_flag(f"ModelCheckpoint({name})", flag)


def check_where(dirpath: Union[str, Path, None]) -> Optional[Path]:
    """``dirpath`` as a path; raise :class:`ConfigurationError` where it can be none."""
    if dirpath is None:
        return None
    if not isinstance(dirpath, (str, os.PathLike)):
        raise ConfigurationError(f"ModelCheckpoint(dirpath={dirpath!r}): give a folder's path.")
    problem = why_no_path(dirpath)
    if problem is not None:
        raise ConfigurationError(f"ModelCheckpoint(dirpath=...): the path {problem}.")
    return Path(dirpath)


def check_folder(folder: Path) -> None:
    """Raise :class:`ConfigurationError` where ``folder`` cannot be made or written to."""
    problem = why_no_path(folder)
    if problem is not None:
        raise ConfigurationError(f"ModelCheckpoint cannot write to its folder: it {problem}.")
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"ModelCheckpoint cannot write to {folder}: {there} is "
            f"{'write-protected' if there.is_dir() else 'a file'}. Give another dirpath, or "
            "Trainer(enable_checkpointing=False)."
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
