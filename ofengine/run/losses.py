"""Notices, where losses are read anyway, that they are no numbers any more; says so once.

The losses of an epoch stay on the device until one that came later is read. Where that one is
finite they are let go; where it is not, all of them are read, to tell the first.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Callable, Dict, List, Mapping, Optional

import numpy as np
import oneflow as flow

from ofengine.errors import NonFiniteError, warn
from ofengine.modes.labels import LabelWatch
from ofengine.run.state import Run

_LEAST_AHEAD, _MOST_AHEAD = 16, 128
"""Steps that are handed to the device between two waits for it, at least and at most."""
_BYTES_AHEAD = 64 * 1024 * 1024
"""The memory that batches of these steps may take where they are more than the least."""
_WAITING = "waiting: bound on steps ahead"
_MENDS = "try a lower learning rate, gradient_clip_val, or look at that batch"


class LossWatch:
    """Looks at the training losses that are read, and at the weights where one is not finite.

    Does nothing where a callback ``watches_losses``.

    Args:
        run: a run that trains.
        labels: told of the losses too; says how the next step is to be called.
    """

    def __init__(self, run: Run, labels: LabelWatch) -> None:
        self._run, self._labels = run, labels
        self._is_on = not any(getattr(each, "watches_losses", False) for each in run.callbacks)
        self.unread: List[Any] = []
        """The losses of this epoch that were not read, nor any that came later."""
        self._of_each: List[Dict[str, Any]] = getattr(run.mode, "losses", [])
        """The same of each of several optimizers."""
        self._first_step = 0
        self._noticed_in: Optional[int] = None
        self._noticed = "training is over"
        self.wait = self._wait if run.profile is None else run.profile.wrap(_WAITING, self._wait)

    def begin_epoch(self) -> None:
        """Before an epoch's batches, or before those that a resumed run has left of it."""
        progress, window = self._run.progress, self._window
        self._first_step = progress.global_step - (progress.batch_idx + 1) // window
        self.unread.clear()
        self._of_each.clear()

    @property
    def _window(self) -> int:
        return self._run.settings.accumulate_in(self._run.progress.epoch)

    def read(self, loss: Any, count: Optional[int] = None) -> Callable[..., Any]:
        """Take note of ``loss``, the last of the first ``count`` unread ones, or of all.

        Returns how the next step is to be called.
        """
        losses = self.unread[:count]
        if losses and self._is_on and self._noticed_in is None and not isfinite(loss):
            self._tell(losses, loss)
        del self.unread[:count], self._of_each[:count]
        return self._labels.read(loss)

    def _wait(self, loss: Any, count: int) -> Callable[..., Any]:
        """As :meth:`read`, of a ``loss`` that is on the device yet."""
        # Not item(): it spins, and takes the core from the device.
        return self.read(loss.numpy(), count)

    def epoch_ended(self) -> None:
        """After the hooks of an epoch's end: raise where nothing mends the weights any more."""
        noticed = self._noticed_in
        if noticed is not None and self._run.progress.epoch > noticed:
            self._check("a whole epoch later, ")

    def training_ended(self) -> None:
        """After the last hooks: raise where the weights are not finite."""
        if self._is_on and self._run.progress.batches_seen and not self._run.should_stop:
            self._check("")

    def _check(self, when: str) -> None:
        broken = self._run.broken()
        if broken is not None:
            raise NonFiniteError(
                f"{self._noticed}, and {when}after {self._run.progress.global_step} steps, "
                f"{broken}: {_MENDS}. What ModelCheckpoint has kept is finite: fit(..., "
                'ckpt_path="last") goes on from there.'
            )

    def _tell(self, losses: List[Any], last: float) -> None:
        """Warn of the first of ``losses`` that is not finite, or of the ``last`` as it was read."""
        progress, window = self._run.progress, self._window
        values = read_losses(losses)
        odd = np.flatnonzero(~np.isfinite(values))
        # None is where another rank has it, or where it was logged in the place of the loss.
        first = int(odd[0]) if len(odd) else len(losses) - 1
        batch_idx = progress.batch_idx + 1 - len(self.unread) + first
        self._noticed_in = progress.epoch
        self._run.told_not_finite = True
        value, until = (values[first], "") if len(odd) else (last, "up to ")
        self._noticed = (
            f"the loss of optimizer step {self._first_step + batch_idx // window} (from 0; epoch "
            f"{progress.epoch}, {until}batch {batch_idx}) is {value:g}"
            f"{whose(self._of_each[first]) if len(odd) and self._of_each else ''}"
        )
        broken = self._run.broken() or "all parameters are still finite"
        warn(
            f"{self._noticed}, and after {progress.global_step} steps {broken}: {_MENDS}. Training "
            "goes on, and ModelCheckpoint saves nothing that is not finite; TerminateOnNaN() would "
            "end it here."
        )


def whose(losses: Mapping[str, Any]) -> str:
    """Of several optimizers the first whose loss is not finite, as the end of a clause."""
    odd = (name for name, loss in losses.items() if not isfinite(read_losses([loss])[0]))
    name = next(odd, None)
    return "" if name is None else f", in the step of optimizer {name!r}"


def read_losses(losses: List[Any]) -> np.ndarray:
    """The losses as numbers, read in one go; some may be numbers already."""
    tensors = [loss for loss in losses if isinstance(loss, flow.Tensor)]
    numbers = [loss for loss in losses if not isinstance(loss, flow.Tensor)]
    if not tensors:
        return np.array(numbers)
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        tensors = [tensor.to(flow.float64) for tensor in tensors]
    read = flow.stack(tensors).numpy()
    return np.concatenate([numbers, read]) if numbers else read


def warn_of_metrics(run: Run, stage: str, metrics: Dict[str, float]) -> None:
    """Warn, once in a verb, where an evaluation's metrics are not finite."""
    odd = [f"{name} = {value:g}" for name, value in metrics.items() if not isfinite(value)]
    if not odd or run.told_not_finite:
        return
    run.told_not_finite = True
    some = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if odd[4:] else "")
    at = f" of epoch {run.progress.epoch}, after step {run.progress.global_step},"
    at = at if run.train is not None else ""
    warn(
        f"{stage}{at} gave what is not finite: {some}; "
        f"{run.broken() or 'all weights are finite: look at its data'}."
    )


def run_ahead(batch: Any) -> int:
    """How many steps like that of ``batch`` may be handed to the device before the next wait.

    Python runs far ahead of the device where nothing stops it, and what waits holds its batch. A
    wait costs some hundred microseconds, which is much beside the steps of a small network.
    """
    size = _bytes_of(batch)
    return min(_MOST_AHEAD, max(_LEAST_AHEAD, _BYTES_AHEAD // size)) if size else _LEAST_AHEAD


def _bytes_of(batch: Any) -> int:
    if isinstance(batch, flow.Tensor):
        return int(batch.numel() * batch.element_size())
    if isinstance(batch, dict):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return 0
    return sum(map(_bytes_of, batch))
