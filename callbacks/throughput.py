"""Throughput: how many samples, batches and tokens a second training goes through."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Callable, Dict, Optional

from ofengine.callback import Callback
from ofengine.data.structure import batch_size_of
from ofengine.errors import ConfigurationError
from ofengine.run.view import RunView
from ofengine.task import TaskModule


class Throughput(Callback):
    """Logs ``throughput/samples_per_second``, ``batches_per_second``, and ``tokens_per_second``.

    Every ``log_every_n_steps`` optimizer steps, over the batches since the last time. The device is
    waited for then, as for the metrics of that step. Validation and other pauses between batches
    that are the engine's own count as no time; the first batch, which compiles, counts neither as
    time nor as a batch. Of several ranks, all are taken to be as fast as rank 0.

    Args:
        tokens: how many tokens a batch has, as ``lambda batch: batch["ids"].numel()``; for text,
            or anything else that a batch has some of. Without it no tokens are logged.
        samples: how many samples a batch has. Default: the first dimension of its first tensor.

    Raises:
        ConfigurationError: ``tokens`` or ``samples`` is no function.
    """

    rank_zero_only = True

    def __init__(
        self,
        tokens: Optional[Callable[[Any], int]] = None,
        samples: Optional[Callable[[Any], int]] = None,
    ) -> None:
        for name, value in (("tokens", tokens), ("samples", samples)):
            if value is not None and not callable(value):
                raise ConfigurationError(
                    f"Throughput({name}={value!r}): give a function of a batch, such as "
                    'lambda batch: batch["ids"].numel().'
                )
        self._counts: Dict[str, Callable[[Any], int]] = {"samples": samples or batch_size_of}
        if tokens is not None:
            self._counts["tokens"] = tokens
        self._done: Dict[str, int] = {}
        self._since: Optional[float] = None
        self._paused_at = 0.0
        self._step = 0

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin at the first batch's end."""
        self._since = None

    def on_validation_start(self, trainer: RunView, task: TaskModule) -> None:
        """Stop the clock."""
        self._paused_at = perf_counter()

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Go on."""
        if self._since is not None:
            self._since += perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count it; where that is due, log."""
        if self._since is None:
            outputs["loss"].numpy()
            self._begin(trainer)
            return
        for name, count in self._counts.items():
            self._done[name] += int(count(batch))
        self._done["batches"] += 1
        step = trainer.global_step
        if step != self._step and step % trainer.log_every_n_steps == 0:
            outputs["loss"].numpy()  # what was counted is done then
            seconds, ranks = perf_counter() - self._since, trainer.world_size
            trainer.log_metrics(
                {
                    f"throughput/{name}_per_second": count * ranks / seconds
                    for name, count in self._done.items()
                }
            )
            self._begin(trainer)

    def _begin(self, trainer: RunView) -> None:
        self._done = dict.fromkeys([*self._counts, "batches"], 0)
        self._step = trainer.global_step
        self._since = perf_counter()
