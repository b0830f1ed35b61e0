"""The logger of a rank other than 0: it has the place of the real one, and writes nothing."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Iterator, Optional

from ofengine.loggers.base import Logger


class _Nothing:
    """Stands for another library's object that only rank 0 has: it takes all, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing."""


class SilentLogger(Logger):
    """Stands for ``logger``, which rank 0 writes with.

    What the real one has besides is here as well: its methods and properties do nothing, other
    attributes are as they were made.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        real = self._logger
        found = inspect.getattr_static(real, name, None)
        if inspect.isfunction(found) or isinstance(found, (classmethod, staticmethod)):
            return _do_nothing
        if hasattr(type(found), "__get__"):  # to ask for it may open a file
            return _Nothing()
        return getattr(real, name)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Only rank 0 logs."""
