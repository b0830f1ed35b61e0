"""LearningRateMonitor: the rates that were really used, in the logs."""

from __future__ import annotations

from typing import Any, Dict, Optional

from ofengine.callback import Callback
from ofengine.checkpoint.checks import check_fits, record, whole
from ofengine.errors import ConfigurationError
from ofengine.rates.options import standing
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_STATE = record({"logged": whole()})


class LearningRateMonitor(Callback):
    """Logs each parameter group's effective learning rate as ``lr/<group>``.

    The numbers are those of ``trainer.rates``, schedule, ``lr_scale`` and decay included: what
    the last optimizer step multiplied the group's update by. They are the same in both modes;
    ``optimizer.param_groups`` is not asked, because nothing changes there in graph mode. They
    are in ``trainer.callback_metrics`` too, so that a Trainer without a logger can use them.

    The same way ``momentum/<group>`` (of Adam and its like the first beta) and
    ``weight_decay/<group>`` can be had, by schedule or not, of each group that has one.

    Args:
        logging_interval: "step" logs every ``trainer.log_every_n_steps`` optimizer steps,
            "epoch" after the last step of each epoch. Default: "step".
        log_momentum: log the momentum too.
        log_weight_decay: log the weight decay too.

    Raises:
        ConfigurationError: an argument is something else.
    """

    def __init__(
        self,
        logging_interval: Optional[str] = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigurationError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): use 'step', 'epoch' "
                "or None."
            )
        both = {"momentum": log_momentum, "weight_decay": log_weight_decay}
        for option, logs in both.items():
            if not isinstance(logs, bool):
                raise ConfigurationError(
                    f"LearningRateMonitor(log_{option}={logs!r}): give True or False."
                )
        self.logging_interval = logging_interval or "step"
        self._options = [option for option, logs in both.items() if logs]
        self._logged: Optional[int] = None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """The optimizer steps that were done when rates were logged last."""
        return {} if self._logged is None else {"logged": self._logged}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a LearningRateMonitor."""
        check_fits(state, _STATE, "the state of LearningRateMonitor is wrong")

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from ``state``: a step of before is logged where that was still to come."""
        check_fits(state, _STATE, "the state of LearningRateMonitor is wrong")
        self._logged = state["logged"]

    # ------------------------------------------------------------------ the run

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Begin anew with each ``fit``."""
        if stage == "fit":
            self._logged = None

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Without a state, log only steps that are made from here on."""
        if self._logged is None:
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
        numbers = {f"lr/{name}": rate for name, rate in zip(trainer.rates.names, rates)}
        moved = trainer.rates.scheduled(step - 1) if self._options else {}
        for option in self._options:
            by_schedule = moved.get(option, [None] * len(rates))
            groups = zip(trainer.rates.names, trainer.param_groups, by_schedule)
            for name, group, value in groups:
                value = standing(group.options, option) if value is None else value
                if value is not None:
                    numbers[f"{option}/{name}"] = value
        trainer.log_metrics(numbers)
