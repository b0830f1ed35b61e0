"""What callbacks share that go by a metric: the sentences where there is no such metric."""

from __future__ import annotations

import difflib
from typing import Any, Dict

from ofengine.errors import warn


def hint(name: str, metrics: Dict[str, Any]) -> str:
    """The end of a sentence that misses the metric ``name``: which one was meant, which exist."""
    close = difflib.get_close_matches(name, metrics, n=1, cutoff=0.6)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} The metrics are {sorted(metrics)}." if metrics else " Nothing was logged."


def warn_of_misspelt_monitor(callback: object, monitor: str, metrics: Dict[str, Any]) -> None:
    """Warn where ``monitor`` is not among the ``metrics`` of validation, but one much like it."""
    close = difflib.get_close_matches(monitor, metrics, n=1, cutoff=0.75)
    if close and monitor not in metrics:
        warn(
            f"{type(callback).__name__}(monitor={monitor!r}): validation logs no such metric; did "
            f"you mean {close[0]!r}?"
        )
