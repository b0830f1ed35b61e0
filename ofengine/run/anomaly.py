"""``Trainer(detect_anomaly=True)``: each step is looked at, and replayed where it goes wrong."""

from __future__ import annotations

from math import isfinite
from typing import Any, Callable, Dict, Optional

from ofengine._oneflow.session import synchronize
from ofengine.errors import ConfigurationError, NonFiniteError
from ofengine.run.replay import Replay, gradients_odd
from ofengine.run.state import Run
from ofengine.run.undone import KeptRun, eager_step

TrainStep = Callable[[Any, int, int, bool], Dict[str, Any]]


def train_step_of(run: Run) -> TrainStep:
    """How a batch is trained on: by the mode alone, or with anomalies looked for."""
    if run.settings.detect_anomaly:
        for part in run.each().values():
            mode: Any = part.training_mode
            mode.train_step = _Detecting(run, part, mode.train_step)
    return run.training_mode.train_step


class _Detecting:
    """A training step that raises where its loss, its gradients or the weights are not finite.

    Before each step all that it may change is kept, so that it can be computed once more from
    there: eagerly, which is the same to the bit, and with everything looked at on the way.

    Args:
        run: which batch it is, it knows.
        part: of several optimizers the part of the run whose steps these are; else the run.
        step: makes them.
    """

    def __init__(self, run: Run, part: Run, step: TrainStep) -> None:
        if run.ranks is not None:
            raise ConfigurationError(
                "detect_anomaly=True replays the step of one process, and several ranks train "
                "together: leave it out, or look for the fault with devices=1."
            )
        self._run, self._part, self._step = run, part, step

    def __call__(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        kept = KeptRun(self._part, lends_gradients=False)
        outputs = self._step(batch, batch_idx, window, closes)
        wrong = self._wrong(outputs["loss"])
        if wrong is not None:
            kept.put_back()
            raise NonFiniteError(self._told(wrong, batch, batch_idx))
        return outputs

    def _wrong(self, loss: Any) -> Optional[str]:
        """What is not finite after a step, in words; None where all is."""
        synchronize()  # to read what a graph's run writes does not wait for the run
        number = float(loss.numpy().reshape(-1)[0])
        if not isfinite(number):
            return f"the loss is {number:g}"
        found = gradients_odd(list(self._part.training_mode.gradients().items()))
        broken = found or self._run.broken()
        return None if broken is None else f"the loss is {number:g}, and then {broken}"

    def _told(self, wrong: str, batch: Any, batch_idx: int) -> str:
        run = self._run
        at = f"epoch {run.progress.epoch}, batch {batch_idx}"
        replayed = KeptRun(self._part)
        try:
            found = Replay(run.task).find(eager_step(self._part), batch, batch_idx)
        finally:
            replayed.put_back()
        said = found or (
            "the loss and gradients of this batch alone are finite, so it comes from the update: "
            "look at the learning rate, at the optimizer's options, and at the batches that were "
            "accumulated before"
        )
        return (
            f"in optimizer step {run.progress.global_step} (from 0; {at}) {wrong}. Replayed "
            f"operation by operation: {said}. The task has its weights of before that step."
        )
