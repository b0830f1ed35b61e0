"""Logger: what the Trainer sends metrics to."""

from __future__ import annotations

from typing import Dict, Optional


class Logger:
    """Receives metrics. Subclass it to send them elsewhere."""

    @property
    def log_dir(self) -> Optional[str]:
        """The folder of this run's files, or None where the logger writes none."""
        return None

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Take the ``metrics`` known after ``step`` optimizer steps, in ``epoch`` (from 0)."""
        raise NotImplementedError

    def save(self) -> None:
        """Make sure that what was logged is stored. Called after each epoch."""

    def finalize(self, status: str) -> None:
        """The run is over; ``status`` is "success" or "failed"."""
