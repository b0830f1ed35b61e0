"""Before a verb begins: missing ranks are started, the checkpoint is found."""

from __future__ import annotations

import logging
from typing import Optional, Tuple

from ofengine.checkpoint.file import Checkpoint, read
from ofengine.checkpoint.find import CheckpointPath, check_path, find_checkpoint, note_resumption
from ofengine.checkpoint.resume import Resumed
from ofengine.errors import ConfigurationError
from ofengine.launch import launch_self
from ofengine.run.settings import Settings
from ofengine.run.state import Run
from ofengine.run.together import of_rank_zero

log = logging.getLogger("ofengine")


def start_missing_ranks(settings: Settings) -> None:
    """Where this script was started plainly, start it in each rank; does not return.

    Raises :class:`ConfigurationError` where the ranks of other machines are missing, or where this
    command cannot be run again.
    """
    if settings.world is not None or settings.world_size == 1:
        return
    if settings.num_nodes > 1:
        raise ConfigurationError(
            f"num_nodes={settings.num_nodes}: start the script on each machine with `ofengine "
            "launch`, which tells its ranks where the others are."
        )
    launch_self(settings.devices)


def find_run(run: Run, ckpt_path: CheckpointPath) -> Optional[Resumed]:
    """The run of a checkpoint, where there is one to be resumed; the loggers know of it."""
    checkpoint, told = _find_together(run, ckpt_path)
    if told is None:
        return None
    if checkpoint is None:
        log.info("ckpt_path='last': there is no checkpoint yet, training begins anew.")
        return None
    resumed = Resumed(checkpoint)
    note_resumption(run, checkpoint)
    continues = told == "last" or bool(run.settings.restart_on_crash)
    resumed.tell_loggers(run, continue_files=continues)
    run.moments_resumed = resumed.moments()
    return resumed


def _find_together(
    run: Run, ckpt_path: CheckpointPath
) -> Tuple[Optional[Checkpoint], Optional[str]]:
    """The checkpoint that ``ckpt_path`` means on rank 0, on all ranks; and ``ckpt_path`` there."""
    check_path(ckpt_path)
    first = run.ranks is None or run.ranks.rank == 0
    own = find_checkpoint(run, ckpt_path) if first and ckpt_path is not None else None
    if run.ranks is None:
        return own, None if ckpt_path is None else str(ckpt_path)
    told, path = of_rank_zero(
        run,
        lambda: [
            None if ckpt_path is None else str(ckpt_path),
            None if own is None else str(own.path.absolute()),
        ],
    )
    return own if own is not None or path is None else read(path), told
