"""The logger of a rank other than 0: it has the place of the real one, and writes nothing."""

from __future__ import annotations

from typing import Dict, Optional

from ofengine.loggers.base import Logger


class SilentLogger(Logger):
    """Stands for ``logger``, which rank 0 writes with."""

    def __init__(self, logger: Logger) -> None:
        self._key = logger.state_key
        self.folder: Optional[str] = None
        """That of rank 0's."""

    @property
    def log_dir(self) -> Optional[str]:
        """See :class:`Logger`."""
        return self.folder

    @property
    def state_key(self) -> str:
        """See :class:`Logger`."""
        return self._key

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Nothing: rank 0 logs the same."""
