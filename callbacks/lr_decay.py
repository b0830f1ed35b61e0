"""LRDecayCallback: layerwise rates in eager mode, written into the live groups."""

from __future__ import annotations

from typing import Any, Callable, Optional

from ofengine.callback import Callback
from ofengine.errors import ConfigurationError
from ofengine.rates.plan import DecayEvents
from ofengine.run.arguments import is_whole
from ofengine.run.view import RunView
from ofengine.task import TaskModule


class LRDecayCallback(Callback):
    """Multiplies each group's rate by its ``lr_decay_scale`` at every decay event.

    A decay event follows the optimizer step of every batch whose index in its epoch is
    divisible by ``every_n_batches``, index 0 included, as in OneFlow's cookbook. In eager mode
    this callback writes the rates of the plan, ``lr_scale`` and schedule included, into
    ``optimizer.param_groups``. In graph mode it only tells the plan when decay happens;
    :class:`GraphLRScaleCallback` carries it out there. Both may be listed.

    Args:
        every_n_batches: batches between decay events. None leaves all to a
            :class:`GraphLRScaleCallback` in the list, or to the defaults.
        per_epoch: count batch indices anew in each epoch; False counts over the whole run.
        key: the groups' key with the factor. ``"lr_scale"`` runs the cookbook's code to the
            letter, where that key is the decay factor and no constant multiplier.

    Raises:
        RateError: at ``fit``, where a group's ``lr`` was changed by hand during training.
    """

    def __init__(
        self,
        every_n_batches: Optional[int] = 10,
        per_epoch: bool = True,
        key: str = "lr_decay_scale",
    ) -> None:
        self._decay: Optional[DecayEvents] = None
        self._write: Optional[Callable[[int], None]] = None
        if every_n_batches is not None:
            self._decay = checked_decay(type(self).__name__, every_n_batches, per_epoch, key)

    @property
    def decay_events(self) -> Optional[DecayEvents]:
        """When decay happens; None where this callback was told to leave that to another."""
        return self._decay

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Write the first step's rates."""
        self._write = None
        if trainer.mode == "eager":
            trainer.rates.watch(*trainer.optimizers.values())
            trainer.rates.write(trainer.global_step)
            self._write, self._progress = trainer.rates.write, trainer.progress

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Write again: the epoch before may have had another length than was expected."""
        if self._write is not None:
            self._write(trainer.global_step)

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the next step's rates."""
        if self._write is not None:
            self._write(self._progress.global_step)

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let go of the plan and the optimizer."""
        self._write = None


def checked_decay(owner: str, every_n_batches: int, per_epoch: bool, key: str) -> DecayEvents:
    """The arguments of a rate callback as :class:`DecayEvents`, or an error that names them."""
    if not is_whole(every_n_batches) or every_n_batches < 1:
        raise ConfigurationError(
            f"{owner}(every_n_batches={every_n_batches!r}): give a whole number from 1 on."
        )
    if key not in ("lr_decay_scale", "lr_scale"):
        raise ConfigurationError(
            f"{owner}(key={key!r}): the key of the factor is 'lr_decay_scale', or 'lr_scale' for "
            "the cookbook's code to the letter."
        )
    if not isinstance(per_epoch, bool):
        raise ConfigurationError(f"{owner}(per_epoch={per_epoch!r}): give True or False.")
    return DecayEvents(int(every_n_batches), per_epoch, key)
