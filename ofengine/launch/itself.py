"""A script that was started plainly becomes the launcher of itself: ``Trainer(devices=2)``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn, Optional

from ofengine.errors import ConfigurationError
from ofengine.processes import supervisor
from ofengine.processes.signals import keep_ignored


def launch_self(
    ranks: int,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: Optional[int] = None,
    hang_timeout: float = 300.0,
) -> NoReturn:
    """Turn this process into the launcher of ranks that run the same command. It does not return.

    The launcher takes the place of the program, under the same process id, as the supervisor of
    ``restart_on_crash`` does: nothing of the program is left, neither OneFlow's memory and
    threads nor a ``finally``. What the program has done up to here, each rank does once more. The
    arguments are those of :func:`~ofengine.launch.start_ranks`.

    Raises:
        ConfigurationError: the command cannot be run again. Nothing has happened then.
    """
    problem = supervisor.why_not_again("it", "start the ranks with `ofengine launch`")
    if problem is not None:
        raise ConfigurationError(f"{ranks} ranks cannot be started from here: {problem}")
    options = {
        "ranks": ranks,
        "nodes": nodes,
        "node_rank": node_rank,
        "master_addr": master_addr,
        "master_port": master_port,
        "hang_timeout": hang_timeout,
    }
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    supervisor.close_files_on_exec()
    keep_ignored()  # exec keeps what is ignored, and makes OneFlow's handler the default
    program = str(Path(__file__).resolve().parent / "alone.py")
    command = [sys.executable, *supervisor.original_arguments()[1:]]
    arguments = [json.dumps(options), supervisor.FOLDER, *command]
    os.execv(sys.executable, [sys.executable, program, *arguments])
