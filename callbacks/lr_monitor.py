"""LearningRateMonitor: the rates that were really used, in the logs."""

from __future__ import annotations

from typing import Any, Optional

from ofengine.callback import Callback
from ofengine.errors import ConfigurationError
from ofengine.run.view import RunView
from ofengine.task import TaskModule


class LearningRateMonitor(Callback):
    """Logs each parameter group's effective learning rate as ``lr/<group>``.

    The numbers are those of ``trainer.rates``, schedule, ``lr_scale`` and decay included: what
    the last optimizer step multiplied the group's update by. They are the same in both modes;
    ``optimizer.param_groups`` is not asked, because nothing changes there in graph mode. They
    are in ``trainer.callback_metrics`` too, so that a Trainer without a logger can use them.

    Args:
        logging_interval: "step" logs every ``trainer.log_every_n_steps`` optimizer steps,
            "epoch" after the last step of each epoch. Default: "step".

    Raises:
        ConfigurationError: ``logging_interval`` is something else.
    """

    def __init__(self, logging_interval: Optional[str] = None) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigurationError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): use 'step', 'epoch' "
                "or None."
            )
        self.logging_interval = logging_interval or "step"
        self._logged = 0

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Only steps of this run are logged."""
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates of the step that was just made, where its turn has come."""
        if trainer.global_step % trainer.log_every_n_steps == 0 and self.logging_interval == "step":
            self._log(trainer)

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Log the rates of the epoch's last step."""
        if self.logging_interval == "epoch":
            self._log(trainer)

    def _log(self, trainer: RunView) -> None:
        step = trainer.global_step
        if step == self._logged:
            return  # no step was made: this batch's gradients were only accumulated
        self._logged = step
        rates = trainer.rates.rates(step - 1)
        trainer.log_metrics({f"lr/{name}": rate for name, rate in zip(trainer.rates.names, rates)})
