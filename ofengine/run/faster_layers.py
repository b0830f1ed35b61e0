"""``Trainer(cpu_speedups=True)``: layers that compute by faster operators while a verb runs."""

from __future__ import annotations

import contextlib
import logging
from typing import Iterator

from ofengine.run.state import Run
from ofengine.speedups import cpu_speedups

log = logging.getLogger("ofengine")


@contextlib.contextmanager
def faster_layers(run: Run) -> Iterator[None]:
    """In the block the task's layers compute so, where that was asked for and it is on a CPU."""
    if not run.settings.cpu_speedups:
        yield
        return
    name, device = type(run.task).__name__, run.settings.device
    if device.type != "cpu":
        log.info("cpu_speedups does nothing for %s on %s: it is for CPUs.", name, device)
        yield
        return
    with cpu_speedups(run.task) as speedups:
        counts = ", ".join(f"{count} {kind}" for kind, count in speedups.layers.items())
        if counts:
            log.info("cpu_speedups: %s of %s compute by faster operators.", counts, name)
        else:
            log.info("cpu_speedups: no layer of %s has faster operators.", name)
        yield
