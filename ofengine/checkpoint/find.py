"""Which file ``ckpt_path`` means."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Union

from ofengine.checkpoint.file import EXTENSION, Checkpoint, read
from ofengine.errors import CheckpointError, ConfigurationError, warn
from ofengine.processes import supervisor
from ofengine.run.state import Run

CheckpointPath = Union[str, Path, None]
"""A file, "last", or None for a run that begins anew."""


def find_checkpoint(
    run: Run, ckpt_path: Union[str, Path], since: float = 0.0
) -> Optional[Checkpoint]:
    """Read the file ``ckpt_path``; for "last" the newest whole one, None where there is none.

    "last" looks only at files written after ``since`` (seconds since 1970).
    """
    if str(ckpt_path) != "last":
        return read(ckpt_path)
    folders = checkpoint_folders(run)
    found = [path for folder in folders for path in folder.glob(f"*{EXTENSION}")]
    found = [path for path in found if _written_at(path) >= since]
    for path in sorted(found, key=_written_at, reverse=True):
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            warn(f"ckpt_path='last' passes over a checkpoint: {error}")
            continue
        if checkpoint.state is not None:
            return checkpoint
    return None


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def checkpoint_folders(run: Run) -> List[Path]:
    """Where "last" looks: the callbacks' own folders, else those below ``default_root_dir``."""
    own = [getattr(callback, "dirpath", None) for callback in run.callbacks]
    folders = [Path(folder) for folder in own if folder is not None]
    if not folders or len(folders) < len([c for c in run.callbacks if hasattr(c, "dirpath")]):
        roots = [Path(run.settings.default_root_dir)]
        roots += [root for each in run.loggers for root in each.run_dirs()]
        folders += [root / "checkpoints" for root in roots]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def supervised(run: Run, ckpt_path: CheckpointPath) -> CheckpointPath:
    """Run the script again as a child; in the child, what ``fit`` resumes from."""
    if not any(callback.fires_last for callback in run.callbacks):
        raise ConfigurationError(
            "restart_on_crash needs checkpoints to go on from: list a ModelCheckpoint, or "
            "leave enable_checkpointing on."
        )
    if supervisor.tries() is None:
        supervisor.supervise(run.settings.restart_on_crash)
    if run.plan is not None:
        raise ConfigurationError(
            "restart_on_crash starts the whole script again, so it works for one fit() only: "
            "put the second one into a script of its own."
        )
    if supervisor.tries() == 1:
        return ckpt_path
    found = find_checkpoint(run, "last", supervisor.begun_at())
    return ckpt_path if found is None else found.path
