"""TerminateOnNaN: training ends with an error where its loss is no number any more."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import oneflow as flow

from ofengine.callback import Callback
from ofengine.callbacks.model_checkpoint import ModelCheckpoint
from ofengine.checkpoint import load_weights
from ofengine.checkpoint.checks import anything, check_fits, listed, number, record, row, whole
from ofengine.checkpoint.find import newest_first
from ofengine.errors import CheckpointError, NonFiniteError
from ofengine.run.arguments import check_count, check_flag
from ofengine.run.losses import read_losses, whose
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_STATE = record({"losses": listed(number()), "places": listed(row(whole(), whole()))})
_WRONG = "the state of TerminateOnNaN is wrong"
_MOST_PENDING = 1000
"""So many losses wait on the device before they are read, to bound the memory."""


class TerminateOnNaN(Callback):
    """Ends training with a :class:`NonFiniteError` where a loss is NaN or infinite.

    The losses stay on the device, and are read together every so many steps and at the end of
    each epoch: no step waits for the device, and training ends at most so many steps late. The
    error names the very step whose loss was the first that was not finite, that loss, and the
    first parameter (in the order of ``named_parameters``) that is not finite by now. Without this
    callback, a warning says so and training goes on.

    Args:
        check_every_n_steps: optimizer steps between two looks at the losses. Default: the
            Trainer's ``log_every_n_steps``, which waits for the device anyway.
        restore: load the newest file with finite weights that a :class:`ModelCheckpoint` of this
            run keeps into the task before the error is raised. The optimizer's state is not
            restored. Where there is no such file, the weights stay as they are.

    Raises:
        ConfigurationError: at once for a wrong argument.
        NonFiniteError: during training, as said above.
    """

    watches_losses = True

    def __init__(self, check_every_n_steps: Optional[int] = None, restore: bool = False) -> None:
        if check_every_n_steps is not None:
            check_count(
                "TerminateOnNaN: check_every_n_steps",
                check_every_n_steps,
                1,
                "a whole number of steps from 1 on, or None for the Trainer's log_every_n_steps",
            )
        self.check_every_n_steps = check_every_n_steps
        self.restore = check_flag("TerminateOnNaN: restore", restore)
        self._every = 1
        self._step = 0
        self._names: List[str] = []
        self._losses: List[Any] = []
        self._places: List[Tuple[int, int]] = []
        self._of_each: List[Dict[str, Any]] = []
        """Of each of several optimizers, as far as they are of this process."""

    def state_dict(self) -> Dict[str, Any]:
        """The losses that nobody has looked at yet, and where they come from."""
        if not self._losses:
            return {}
        self._losses = read_losses(self._losses).tolist()
        return {"losses": list(self._losses), "places": [list(each) for each in self._places]}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a TerminateOnNaN."""
        check_fits(state, _STATE, _WRONG)
        check_fits(state["places"], listed(anything, len(state["losses"])), _WRONG)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Look at these losses, too, when it is time."""
        self._losses = list(state["losses"])
        self._of_each = [{} for _ in self._losses]
        self._places = [(step, batch_idx) for step, batch_idx in state["places"]]

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Begin with no losses."""
        self._losses, self._places, self._of_each = [], [], []

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Count steps from here."""
        self._every = self.check_every_n_steps or trainer.log_every_n_steps
        self._step = trainer.global_step
        names = list(trainer.optimizers)
        self._names = names if len(names) > 1 else []

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at all that were kept, where it is time."""
        self._losses.append(outputs["loss"])
        if self._names:
            self._of_each.append({n: outputs[n]["loss"] for n in self._names if n in outputs})
        self._places.append((self._step, batch_idx))
        step = trainer.global_step
        made = step != self._step  # else this batch's gradients were only accumulated
        self._step = step
        if (made and step % self._every == 0) or len(self._losses) >= _MOST_PENDING:
            self._look(trainer, task)

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look at the losses since the last look."""
        self._look(trainer, task)

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let go of the losses."""
        self._losses, self._places, self._of_each = [], [], []

    def _look(self, trainer: RunView, task: TaskModule) -> None:
        losses, self._losses = self._losses, []
        places, self._places = self._places, []
        of_each, self._of_each = self._of_each, []
        if not losses:
            return
        values = read_losses(losses)
        bad = np.flatnonzero(~np.isfinite(values))
        if not bad.size:
            return
        first = int(bad[0])
        step, batch_idx = places[first]
        message = (
            f"the loss of optimizer step {step} (from 0; epoch {trainer.current_epoch}, batch "
            f"{batch_idx}) is {values[first]:g}{whose(of_each[first]) if self._names else ''}, and "
            f"after {trainer.global_step} steps "
            f"{trainer.not_finite() or 'all parameters are still finite'}"
        )
        if self.restore:
            message += f"; {_restore(trainer, task)}"
        raise NonFiniteError(
            f"{message}: try a lower learning rate, gradient_clip_val, or look at that batch."
        )


def _restore(trainer: RunView, task: TaskModule) -> str:
    """Load the newest checkpoint of this run with finite weights; say which, in words."""
    trainer.settle()  # what steps left pending is not to be added to what is loaded
    own = task.state_dict()
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    for path in _checkpoints(trainer):
        try:
            load_weights(task, path)
        except CheckpointError:
            continue  # removed or damaged since: perhaps an older one is there
        if trainer.not_finite() is None:
            return f"the task has the weights of {path} again"
    with flow.no_grad():
        for name, tensor in own.items():
            tensor.copy_(before[name])
    return "no checkpoint of this run has finite weights to go back to"


def _checkpoints(trainer: RunView) -> List[str]:
    """The files that the run's checkpoint callbacks keep, the newest first, by what they say."""
    paths: List[str] = []
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            # Of files of the same moment, the one named first here is not older.
            scored = reversed(list(callback.best_k_models))
            paths += [callback.last_model_path, *scored, callback.best_model_path]
    return newest_first(dict.fromkeys(filter(None, paths)))
