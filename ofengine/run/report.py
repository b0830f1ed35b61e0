"""Metrics on their way to the loggers."""

from __future__ import annotations

from typing import Dict

from ofengine.run.state import Run


def log_metrics(run: Run, metrics: Dict[str, float]) -> None:
    """Send ``metrics`` to the loggers and to ``callback_metrics``."""
    if not metrics:
        run.telling.sending = False
        return
    run.metrics.put(metrics)
    run.history.add(metrics, run.progress.global_step, run.progress.epoch)
    run.telling.sending = True
    for each in run.loggers:
        each.log_metrics(metrics, run.progress.global_step, run.progress.epoch)
    run.telling.sending = False  # where one raises, no checkpoint could give the others the row


def log_hyperparams(run: Run) -> None:
    """Send the task's hyper-parameters to the loggers, where it has some."""
    if run.task.hparams:
        for each in run.loggers:
            each.log_hyperparams(dict(run.task.hparams))


def log_step(run: Run) -> None:
    """Read what the last steps logged, which waits for the device, and send it on."""
    for each in run.loggers:
        each.save_due(run.progress.global_step)
    run.telling.sending = True
    log_metrics(run, run.metrics.flush())


def log_epoch(run: Run) -> None:
    """Send on what was logged for an epoch, or since its end."""
    run.telling.sending = True
    log_metrics(run, run.metrics.close_epoch())


def save_logs(run: Run) -> None:
    """Let the loggers store what they were sent."""
    for each in run.loggers:
        each.save()
