"""EarlyStopping: training ends where its metric no longer gets better."""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any, Dict, Optional, Tuple

from ofengine.callback import Callback
from ofengine.callbacks._monitor import hint, somebody_stops, warn_of_misspelt_monitor
from ofengine.checkpoint.checks import check_fits, flag, maybe, number, record, row, whole
from ofengine.errors import ConfigurationError, warn
from ofengine.run.arguments import check_choice, check_count, check_flag
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_STATE = record(
    {
        "best_score": number(), "last_score": maybe(number()), "stopped_epoch": maybe(whole()),
        "wait_count": whole(),
    },
    {
        "validated": flag, "waits_for_epoch_end": flag, "missed": flag,
        "stopped_by": maybe(row(number(), number(), whole())),
    },
)  # fmt: skip


class EarlyStopping(Callback):
    """Ends training where ``monitor`` has not got better for ``patience`` looks.

    It looks after each validation; in a fit without validation, and for a metric that training
    logs (an epoch's mean), at the end of each epoch. It ends training by
    ``trainer.should_stop = True``, after the batch or epoch at hand.

    A resumed run goes on counting where the run before it stopped. One that had been stopped
    stops again before its first batch, unless what is configured now (a larger ``patience``,
    another threshold) lets it go on. A stop that ``min_epochs`` or ``min_steps`` holds back stays
    one, in a resumed run too, whatever the metric does by then.

    Args:
        monitor: the metric to go by, a name in ``trainer.callback_metrics``.
        min_delta: what is better by no more than this counts as no better.
        patience: looks without anything better that are allowed: the one that makes so many
            ends training. 0 is as 1.
        mode: "min" where less of the metric is better, or "max".
        stopping_threshold: end training once the metric is better than this.
        divergence_threshold: end training once the metric is worse than this.
        check_finite: end training once the metric is NaN or infinite.
        check_on_train_epoch_end: True looks at the end of each epoch only, False after each
            validation only. Default: as said above.
        strict: a metric that nothing logs is an error; False warns once and never stops for it.
        verbose: log each new best value.

    Attributes:
        best_score: the best value so far; infinite before the first.
        wait_count: looks since the best one.
        stopped_epoch: the epoch (from 0) in which this ended training; None where it did not.

    Raises:
        ConfigurationError: at once for a wrong argument; at the first look, where no metric
            ``monitor`` was logged.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str = "min",
        stopping_threshold: Optional[float] = None,
        divergence_threshold: Optional[float] = None,
        check_finite: bool = True,
        check_on_train_epoch_end: Optional[bool] = None,
        strict: bool = True,
        verbose: bool = False,
    ) -> None:
        own = "EarlyStopping: "
        if not isinstance(monitor, str) or not monitor:
            raise ConfigurationError(
                f"{own}monitor={monitor!r}: give a metric's name, such as 'val_loss'."
            )
        self.monitor = monitor
        self.min_delta = _number("min_delta", min_delta)
        if not 0.0 <= self.min_delta < math.inf:
            raise ConfigurationError(f"{own}min_delta={min_delta!r}: give a number from 0 on.")
        what = "a whole number of looks from 0 on"
        self.patience = check_count(f"{own}patience", patience, 0, what)
        self.mode = check_choice(f"{own}mode", mode, ("min", "max"))
        self.stopping_threshold, self.divergence_threshold = (
            None if value is None else _number(name, value)
            for name, value in (
                ("stopping_threshold", stopping_threshold),
                ("divergence_threshold", divergence_threshold),
            )
        )
        self.check_finite = check_flag(f"{own}check_finite", check_finite)
        if check_on_train_epoch_end is not None:
            check_flag(f"{own}check_on_train_epoch_end", check_on_train_epoch_end)
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.strict = check_flag(f"{own}strict", strict)
        self.verbose = check_flag(f"{own}verbose", verbose)
        self._forget()

    def _forget(self) -> None:
        self.best_score = math.inf if self.mode == "min" else -math.inf
        self.wait_count = 0
        self.stopped_epoch: Optional[int] = None
        self._last_score: Optional[float] = None
        self._stopped_by: Optional[Tuple[float, float, int]] = None
        """The metric, the best value and the count at the look that ended training."""
        self._validated = False
        self._wait_for_epoch_end = False
        self._missed = False

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """How far it has counted; what is configured is no part of it."""
        return {
            "best_score": self.best_score,
            "last_score": self._last_score,
            "stopped_epoch": self.stopped_epoch,
            "wait_count": self.wait_count,
            "validated": self._validated,
            "waits_for_epoch_end": self._wait_for_epoch_end,
            "missed": self._missed,
            "stopped_by": self._stopped_by and list(self._stopped_by),
        }

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of an EarlyStopping."""
        check_fits(state, _STATE, "the state of EarlyStopping is wrong")

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on counting from ``state``."""
        check_fits(state, _STATE, "the state of EarlyStopping is wrong")
        last = state["last_score"]
        self.best_score = float(state["best_score"])
        self.wait_count = state["wait_count"]
        self.stopped_epoch = state["stopped_epoch"]
        self._last_score = None if last is None else float(last)
        self._validated = state.get("validated", True)
        self._wait_for_epoch_end = state.get("waits_for_epoch_end", False)
        self._missed = state.get("missed", False)
        by = state.get("stopped_by")
        self._stopped_by = None if by is None else (float(by[0]), float(by[1]), int(by[2]))

    # ------------------------------------------------------------------ when

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Start anew."""
        if stage == "fit":
            self._forget()

    def on_sanity_check_end(self, trainer: RunView, task: TaskModule) -> None:
        """Warn early of a ``monitor`` that looks misspelt."""
        warn_of_misspelt_monitor(self, self.monitor, trainer.callback_metrics)

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """In a resumed run: stop again, or go on where what is configured now allows it."""
        if self.check_on_train_epoch_end is False and not trainer.has_validation:
            warn(
                "EarlyStopping(check_on_train_epoch_end=False) looks after validations only, and "
                "this fit has none: it will never end training."
            )
        reason = self.reason_to_stop()
        if reason:
            trainer.should_stop = True
            log.info("EarlyStopping: the run had been stopped before: %s.", reason)
        elif self.stopped_epoch is not None:
            log.info(
                "EarlyStopping: stopped in epoch %d, training goes on: by what is configured now "
                "there is no reason to stop.",
                self.stopped_epoch,
            )
            self.stopped_epoch = self._stopped_by = None
            trainer.should_stop = somebody_stops(trainer)

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look, unless only the ends of epochs count."""
        if trainer.sanity_checking or self.check_on_train_epoch_end:
            return
        self._validated = True
        missing = self.monitor not in trainer.callback_metrics
        if missing and self.check_on_train_epoch_end is None:
            self._wait_for_epoch_end = True  # it may be an epoch's mean of training_step
        if not self._wait_for_epoch_end:
            self._look(trainer, "after this validation")

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look, where validation does not log the metric, or where only epochs count."""
        if self.check_on_train_epoch_end is None:
            if not self._validated and self.monitor in trainer.callback_metrics:
                self._wait_for_epoch_end = True  # only training can have logged it
            if trainer.has_validation and not self._wait_for_epoch_end:
                return
        elif not self.check_on_train_epoch_end:
            return
        self._look(trainer, "at the end of this epoch")

    # ------------------------------------------------------------------ what

    def _look(self, trainer: RunView, when: str) -> None:
        """Count this value of the metric; stop where that is due."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            text = (
                f"EarlyStopping(monitor={self.monitor!r}): {when} (epoch {trainer.current_epoch}, "
                f"step {trainer.global_step}) no such metric was logged."
                f"{hint(self.monitor, metrics)}"
            )
            if self.strict:
                raise ConfigurationError(text)
            if not self._missed:
                warn(text)
            self._missed = True
            return
        score = self._last_score = metrics[self.monitor]
        reason = self._reason_by_value(score, self.best_score)
        if not reason and self._is_better(score, self.best_score, self.min_delta):
            if self.verbose:
                log.info(
                    "EarlyStopping: %s = %g is the best so far%s.",
                    self.monitor,
                    score,
                    f" (before: {self.best_score:g})" if math.isfinite(self.best_score) else "",
                )
            self.best_score, self.wait_count = score, 0
        elif not reason:
            self.wait_count += 1
            reason = self._reason_by_count(self.best_score, self.wait_count)
        if reason:
            trainer.should_stop = True
            self._stopped_by = (score, self.best_score, self.wait_count)
            self.stopped_epoch = trainer.current_epoch
            log.info(
                "EarlyStopping: training stops in epoch %d at step %d: %s.",
                trainer.current_epoch,
                trainer.global_step,
                reason,
            )

    def _is_better(self, score: float, other: float, by_more_than: float = 0.0) -> bool:
        if self.mode == "min":
            return score + by_more_than < other
        return score - by_more_than > other

    def reason_to_stop(self) -> str:
        """Why the last look ends training, or the one that did; "" where neither does."""
        now = self._reason(self._last_score, self.best_score, self.wait_count)
        return now or (self._reason(*self._stopped_by) if self._stopped_by else "")

    def _reason(self, score: Optional[float], best: float, count: int) -> str:
        by_value = "" if score is None else self._reason_by_value(score, best)
        return by_value or self._reason_by_count(best, count)

    def _reason_by_value(self, score: float, best: float) -> str:
        stop, diverged = self.stopping_threshold, self.divergence_threshold
        value = f"{self.monitor} = {score:g}"
        if self.check_finite and not math.isfinite(score):
            return f"{value} is not finite (the best was {best:g})"
        if stop is not None and self._is_better(score, stop):
            return f"{value} is better than stopping_threshold={stop:g}"
        if diverged is not None and self._is_better(diverged, score):
            return f"{value} is worse than divergence_threshold={diverged:g}"
        return ""

    def _reason_by_count(self, best: float, count: int) -> str:
        if count < max(self.patience, 1):
            return ""
        return (
            f"{self.monitor} was no better{f' by {self.min_delta:g}' if self.min_delta else ''} "
            f"{count} time{'s' if count > 1 else ''} in a row than its best, {best:g}"
        )


def _number(name: str, value: Any) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or math.isnan(value):
        raise ConfigurationError(f"EarlyStopping: {name}={value!r}: give a number.")
    return float(value)
