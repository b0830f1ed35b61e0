"""What callbacks share that go by a metric: the sentences where there is no such metric."""

from __future__ import annotations

import difflib
from typing import Any, Dict

from ofengine.errors import ConfigurationError, warn
from ofengine.run.view import RunView


def hint(name: str, metrics: Dict[str, Any]) -> str:
    """The end of a sentence that misses the metric ``name``: which one was meant, which exist."""
    close = difflib.get_close_matches(name, metrics, n=1, cutoff=0.6)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} The metrics are {sorted(metrics)}." if metrics else " Nothing was logged."


def somebody_stops(trainer: RunView) -> bool:
    """True where a callback has a ``reason_to_stop()`` of its own."""
    reasons = [getattr(each, "reason_to_stop", None) for each in trainer.callbacks]
    return any(reason() for reason in reasons if reason is not None)


def warn_of_misspelt_monitor(callback: object, monitor: str, metrics: Dict[str, Any]) -> None:
    """Warn where ``monitor`` is not among the ``metrics`` of validation, but one much like it."""
    close = difflib.get_close_matches(monitor, metrics, n=1, cutoff=0.75)
    if close and monitor not in metrics:
        warn(
            f"{type(callback).__name__}(monitor={monitor!r}): validation logs no such metric; did "
            f"you mean {close[0]!r}?"
        )


def no_metric(callback: object, monitor: str, when: str, trainer: RunView) -> ConfigurationError:
    """The error where the metric ``monitor`` is needed and was not logged."""
    return ConfigurationError(
        f"{type(callback).__name__}(monitor={monitor!r}): {when} (epoch {trainer.current_epoch}, "
        f"step {trainer.global_step}) no such metric was logged."
        f"{hint(monitor, trainer.callback_metrics)}"
    )


def warn_of_no_best(callback: object, monitor: str, has_looked: bool) -> None:
    """Warn where training is over and nothing was best by the metric ``monitor``."""
    because = "training ended before their first turn came (every_n_epochs, every_n_train_steps, "
    because += "and check_val_every_n_epoch of the Trainer say when that is)"
    if has_looked:
        because = f"{monitor} was NaN each time, or the files that were kept are gone"
    warn(f"{type(callback).__name__}(monitor={monitor!r}) kept no best weights: {because}.")
