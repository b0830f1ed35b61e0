"""StochasticWeightAveraging: the mean of the weights of the last epochs, which training leaves."""

from __future__ import annotations

import logging
import math
from typing import Any, Dict, Optional, Union

from ofengine.callbacks._weight_averaging import WeightAveraging
from ofengine.checkpoint.checks import check_fits, maybe, record, whole
from ofengine.errors import ConfigurationError, warn
from ofengine.run.arguments import check_count, check_flag, is_whole
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_EPOCHS = maybe(record({"first": whole(), "every": whole(1), "ended": whole()}))


class StochasticWeightAveraging(WeightAveraging):
    """Averages the weights that the last epochs end with, and leaves the mean in the task.

    At the end of epoch ``swa_epoch_start`` and of each ``every_n_epochs``-th after it the task's
    parameters, frozen ones too, go into the mean, each with the same weight. When training ends the
    mean is written into the task. Every checkpoint, one that is saved after ``fit`` too, holds the
    training weights, with which a resumed run goes on; the mean is in its state, and
    ``ofengine.checkpoint.save_weights(task, path)`` writes it to a file. Where a resumed run is of
    more epochs, so that a share of them begins later, a mean of earlier epochs alone is begun anew;
    one of both is kept, with a warning.

    The rates stay those of the task's own schedule: for a high constant rate while weights are
    averaged, declare it in ``configure_optimizers``.

    In eager and graph mode the means are the same bit for bit where the weights are.

    Args:
        swa_epoch_start: the first epoch (from 0) that counts, or the share of ``max_epochs`` that
            does not, a float from 0.0 to 1.0.
        every_n_epochs: epochs between two that count.
        include_buffers: average the floating-point buffers too, so that batch norms have running
            statistics near those of the mean; False leaves the last ones. (The paper computes them
            anew in a pass over the training data.)
        evaluate: True has validation run with the mean so far.

    Attributes:
        count: the epochs in the mean so far.

    Raises:
        ConfigurationError: at once for a wrong argument; before training where a share is of an
            unknown number of epochs, or where no epoch would count.
        CheckpointError: before training, where a resumed state is of other parameters.

    Source: Izmailov et al. (https://arxiv.org/abs/1803.05407).
    """

    averages_frozen = True

    def __init__(
        self,
        swa_epoch_start: Union[int, float] = 0.8,
        every_n_epochs: int = 1,
        include_buffers: bool = True,
        evaluate: bool = False,
    ) -> None:
        own = "StochasticWeightAveraging: "
        if isinstance(swa_epoch_start, float):
            is_right = 0.0 <= swa_epoch_start <= 1.0
        else:
            is_right = is_whole(swa_epoch_start) and swa_epoch_start >= 0
        if not is_right:
            raise ConfigurationError(
                f"{own}swa_epoch_start={swa_epoch_start!r}: give an epoch from 0 on, or a share of "
                "max_epochs such as 0.8."
            )
        self.swa_epoch_start = swa_epoch_start
        self.every_n_epochs = check_count(
            f"{own}every_n_epochs", every_n_epochs, 1, "a whole number of epochs from 1 on"
        )
        self.include_buffers = check_flag(f"{own}include_buffers", include_buffers)
        self.evaluate = check_flag(f"{own}evaluate", evaluate)
        self._first = 0
        super().__init__()

    def _forget(self) -> None:
        super()._forget()
        self._ended = 0
        """So many epochs have ended."""
        self._before: Optional[Dict[str, int]] = None
        """Which of them counted, in the run that is resumed."""

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """The averages, and which of the epochs so far have counted."""
        epochs = {"first": self._first, "every": self.every_n_epochs, "ended": self._ended}
        return {**super().state_dict(), "epochs": epochs}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` holds no averages of this ``task``."""
        super().check_state_dict(_without_epochs(state), task)
        self._check_epochs(state)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Keep ``state`` for ``on_fit_start``."""
        self._check_epochs(state)
        super().load_state_dict(_without_epochs(state))
        self._before = state.get("epochs")  # files of earlier versions do not say
        self._ended = self._before["ended"] if self._before else 0

    def _check_epochs(self, state: Dict[str, Any]) -> None:
        where = "the state of StochasticWeightAveraging is wrong: epochs"
        check_fits(state.get("epochs"), _EPOCHS, where)

    # ------------------------------------------------------------------ the run

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Find out which epoch is the first to count."""
        super().setup(trainer, task, stage)
        if stage != "fit":
            return
        epochs = trainer.max_epochs
        if isinstance(self.swa_epoch_start, float):
            if epochs < 0:
                raise ConfigurationError(
                    f"StochasticWeightAveraging(swa_epoch_start={self.swa_epoch_start}) is a share "
                    "of max_epochs, which the Trainer was not given: give the number of an epoch."
                )
            # The last epoch counts in any case.
            self._first = min(math.ceil(self.swa_epoch_start * epochs), max(epochs - 1, 0))
        else:
            self._first = self.swa_epoch_start
        if 0 <= epochs <= self._first and epochs:
            raise ConfigurationError(
                f"StochasticWeightAveraging(swa_epoch_start={self.swa_epoch_start}): the run has "
                f"{epochs} epochs, the last of which is {epochs - 1}, so none would count."
            )

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Take over the mean of the run that is resumed, if it is of epochs that still count."""
        before, self._before = self._before, None
        if before is not None:
            counted = range(before["first"], self._ended, before["every"])
            counts = range(self._first, self._ended, self.every_n_epochs)
            if counted and not counts:
                self.count, self._loaded = 0, None
                log.info(
                    "StochasticWeightAveraging: the mean begins anew: by what is configured now "
                    "the first epoch that counts is %d.",
                    self._first,
                )
            elif counted != counts:
                warn(
                    "StochasticWeightAveraging: for the mean in the checkpoint "
                    f"{_in_words(before['first'], before['every'])} has counted, and by what is "
                    f"configured now {_in_words(self._first, self.every_n_epochs)} counts, so that "
                    "the run does not go on exactly: for that, write "
                    f"swa_epoch_start={before['first']}, every_n_epochs={before['every']}."
                )
        super().on_fit_start(trainer, task)

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Take the epoch's last weights into the mean, where it is its turn."""
        self._ended = trainer.current_epoch + 1
        since = trainer.current_epoch - self._first
        if since >= 0 and since % self.every_n_epochs == 0:
            self._update(trainer, task)

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """Write the mean into the task; checkpoints keep the weights of training."""
        if self.count:
            trainer.set_weights_aside(self._clones(task), for_good=True)
            self.copy_to(task)
        super().on_train_end(trainer, task)


def _without_epochs(state: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in state.items() if key != "epochs"}


def _in_words(first: int, every: int) -> str:
    return f"{'each epoch' if every == 1 else f'one epoch in {every}'} from {first} on"
