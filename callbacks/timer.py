"""Timer: how long the stages of a run take, and an end when the time is used up."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any, Dict, Optional, Sequence

from ofengine.callback import Callback
from ofengine.callbacks._monitor import somebody_stops
from ofengine.checkpoint.checks import check_fits, flag, number, record
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import MaxTime, check_choice, check_flag, seconds_of
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_STAGES = ("train", "validate", "test", "predict")
_STATE = record({**{stage: number(0) for stage in _STAGES}, "ended": flag})


class Timer(Callback):
    """Measures the time of each stage, and ends training when ``duration`` is used up.

    ``time_elapsed("train")`` counts from the start of training to its end, validation within it
    included; a resumed run goes on from the time of the checkpoint. ``Trainer(max_time=...)`` ends
    a run as well; a Timer tells the times, too.

    Args:
        duration: seconds, or as ``Trainer(max_time=...)`` takes it: "DD:HH:MM:SS", a timedelta or a
            dict of its arguments; None only measures.
        interval: "step" looks after each batch whether the time is used up, "epoch" after each
            epoch. A resumed run looks before it goes on, too, unless that is within an epoch
            of "epoch".
        verbose: log when it ends training.

    Raises:
        ConfigurationError: a wrong argument.
    """

    def __init__(self, duration: Any = None, interval: str = "step", verbose: bool = True) -> None:
        self.duration = _seconds(duration)
        self.interval = check_choice("Timer: interval", interval, ("step", "epoch"))
        self.verbose = check_flag("Timer: verbose", verbose)
        self._before: Dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        self._since: Dict[str, Optional[float]] = dict.fromkeys(_STAGES)
        self._ended = False

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that ``stage``, "train", "validate", "test" or "predict", has taken so far."""
        check_choice("time_elapsed(stage)", stage, _STAGES)
        since = self._since[stage]
        return self._before[stage] + (0.0 if since is None else monotonic() - since)

    def time_remaining(self, stage: str = "train") -> Optional[float]:
        """Seconds of ``duration`` that ``stage`` has left, 0.0 at least; None without duration."""
        if self.duration is None:
            return None
        return max(0.0, self.duration - self.time_elapsed(stage))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """The seconds of each stage, and whether those of training were used up at a look."""
        return {**{stage: self.time_elapsed(stage) for stage in _STAGES}, "ended": self._ended}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a Timer."""
        check_fits(state, _STATE, "the state of Timer is wrong")

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from ``state``."""
        check_fits(state, _STATE, "the state of Timer is wrong")
        self._before = {stage: float(state[stage]) for stage in _STAGES}
        self._ended = state["ended"]

    # ------------------------------------------------------------------ the run

    @property
    def idle_hooks(self) -> Sequence[str]:
        """No look at each batch where only epochs count, or no time at all."""
        looks = self.duration is not None and self.interval == "step"
        return () if looks else ("on_train_batch_end",)

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Begin anew with each ``fit``."""
        if stage == "fit":
            self._before = dict.fromkeys(_STAGES, 0.0)
            self._ended = False
        self._since = dict.fromkeys(_STAGES)

    def _begin(self, stage: str) -> None:
        self._since[stage] = monotonic()

    def _end(self, stage: str) -> None:
        self._before[stage] = self.time_elapsed(stage)
        self._since[stage] = None

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Let the clock go. A resumed run that had ended here goes on where there is time again."""
        self._begin("train")
        if self.interval == "step" or not trainer.resumes_within_epoch:
            self._look(trainer)
        if self._ended and not self._is_used_up():
            self._ended = False
            trainer.should_stop = somebody_stops(trainer)

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look."""
        self._look(trainer)

    def reason_to_stop(self) -> str:
        """Why this ends training; "" where it saw time left when it looked, or there is now."""
        if not self._ended or not self._is_used_up():
            return ""
        return f"the {self.duration:g} s for training are used up"

    def _is_used_up(self) -> bool:
        return self.duration is not None and self.time_elapsed() >= self.duration

    def _look(self, trainer: RunView) -> None:
        if not self._is_used_up():
            return
        self._ended = True
        if not trainer.should_stop and self.verbose:
            log.info("Timer: %s: it ends here.", self.reason_to_stop())
        trainer.should_stop = True

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """Stop the clock."""
        self._end("train")

    def on_validation_start(self, trainer: RunView, task: TaskModule) -> None:
        """Let the clock of this stage go; trying some batches before training does not count."""
        if not trainer.sanity_checking:
            self._begin("validate")

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Stop it."""
        self._end("validate")

    def on_test_start(self, trainer: RunView, task: TaskModule) -> None:
        """Let the clock of this stage go."""
        self._begin("test")

    def on_test_end(self, trainer: RunView, task: TaskModule) -> None:
        """Stop it."""
        self._end("test")

    def on_predict_start(self, trainer: RunView, task: TaskModule) -> None:
        """Let the clock of this stage go."""
        self._begin("predict")

    def on_predict_end(self, trainer: RunView, task: TaskModule) -> None:
        """Stop it."""
        self._end("predict")


def _seconds(duration: Any) -> Optional[float]:
    if isinstance(duration, (int, float)) and not isinstance(duration, bool):
        if not 0 <= duration < float("inf"):
            raise ConfigurationError(f"Timer: duration={duration!r}: give seconds from 0 on.")
        return float(duration)
    given: MaxTime = duration
    return seconds_of(given, "Timer: duration")
