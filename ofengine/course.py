"""The course of a run: when it ends, when validation is due, what changed on the way."""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING, List

from ofengine.data import Batches
from ofengine.errors import DataError, RateError
from ofengine.generators import global_states, states_in
from ofengine.seeding import seed_epoch

if TYPE_CHECKING:
    from ofengine.state import RunState
    from ofengine.trainer import Trainer


class Point(enum.Enum):
    """How far a run is within a batch or epoch: what is done, and so where it would go on."""

    BEGIN = "begin"
    """No epoch was begun."""
    EPOCH_START = "epoch_start"
    """on_train_epoch_start; no batch was fetched."""
    STEP = "step"
    """Between on_train_batch_start and on_train_batch_end: nothing that is whole can be saved."""
    STEPPED = "stepped"
    """The step was made; on_train_batch_end; logging and validation are to come."""
    VALIDATING = "validating"
    """In the validation that follows a batch."""
    VALIDATED = "validated"
    """on_validation_end."""
    READY = "ready"
    """All that belongs to the batch is done."""
    EPOCH_END = "epoch_end"
    """on_train_epoch_end."""
    OVER = "over"
    """on_train_end, or after it."""


def is_done(trainer: Trainer) -> bool:
    """True where no further epoch is to be started."""
    epochs = trainer.max_epochs != -1 and trainer.current_epoch >= trainer.max_epochs
    return epochs or trainer.should_stop or is_out_of_time_or_steps(trainer)


def is_out_of_time_or_steps(trainer: RunState) -> bool:
    """True where ``max_steps`` or ``max_time`` is used up."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return (
        trainer.deadline is not None
        and trainer.global_step > 0
        and time.monotonic() >= trainer.deadline
    )


def validation_is_due(trainer: Trainer, batch_idx: int, is_last: bool) -> bool:
    """True where validation follows this batch."""
    if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    every = trainer.val_every_batches
    return is_last if every is None else (batch_idx + 1) % every == 0


def epoch_outgrew(trainer: Trainer) -> None:
    """Take note that the epoch has more batches than was expected."""
    trainer.rates.calendar.outgrown(trainer.current_epoch)
    if trainer.rates.depends_on_epochs():
        trainer.mode_runner.rebuild("the epoch is longer than was expected")


def epoch_ended(trainer: Trainer, batches: int, once: bool) -> None:
    """Take note of an epoch's true length; ``once`` tells of data that cannot be repeated."""
    if batches == 0:
        raise DataError(
            f"train_dataloader gave no batch in epoch {trainer.current_epoch}"
            + (": it is a generator, which can be gone through only once; give a list, a "
               "DataLoader, or an object whose __iter__ starts anew." if once else ".")
        )  # fmt: skip
    surprise = trainer.rates.calendar.epoch_ended(trainer.current_epoch, batches)
    if surprise and trainer.rates.depends_on_epochs():
        trainer.mode_runner.rebuild("the epoch had another length than was expected")


def refresh_parameters(trainer: Trainer) -> None:
    """Look which parameters train now; hooks may have frozen or unfrozen some."""
    parameters = [
        parameter
        for group in trainer.optimizer.param_groups
        for parameter in group.parameters
        if parameter.requires_grad
    ]
    others = [id(p) for p in parameters] != [id(p) for p in trainer.parameters]
    training = [module.training for module in trainer.task.modules()]
    if trainer.parameters and (others or training != trainer.layers_in_training):
        what = "parameters train" if others else "layers are in training mode"
        trainer.mode_runner.rebuild(f"other {what} from here on")
    trainer.parameters = parameters
    trainer.layers_in_training = training


def observes_steps(trainer: Trainer) -> bool:
    """True where ReduceLROnPlateau is to see its metric between epochs."""
    made = trainer.optimization
    return made is not None and made.monitor is not None and made.interval == "step"


def observe_metric(trainer: Trainer, interval: str, count: int) -> None:
    """Let ReduceLROnPlateau see its metric, where that is due after ``count`` intervals."""
    made = trainer.optimization
    if made is None or made.monitor is None or made.interval != interval:
        return
    if count % made.frequency:
        return
    metrics = trainer.callback_metrics
    if made.monitor not in metrics:
        raise RateError(
            f"ReduceLROnPlateau monitors {made.monitor!r}, which nothing has logged: there are "
            f"{sorted(metrics)}."
        )
    if trainer.rates.observe(metrics[made.monitor]):
        trainer.mode_runner.rebuild(f"ReduceLROnPlateau lowered the rates on {made.monitor}")


def begin_epoch(trainer: Trainer, train: Batches) -> None:
    """Make the epoch's randomness a function of (seed, epoch), where there is a seed."""
    if trainer.seed is not None:
        seed_epoch(trainer.seed, trainer.current_epoch, train, trainer.task)
    train.pass_seed = (trainer.run_seed, trainer.current_epoch)
    trainer.batch_idx = -1
    trainer.cut_short = None
    trainer.point = Point.EPOCH_START


def note_layers_in_eval_mode(trainer: Trainer) -> None:
    """Note which layers training has in eval mode: validation, or the user, will change it."""
    trainer.layers_in_eval_mode = [n for n, m in trainer.task.named_modules() if not m.training]


def begin_validation(trainer: Trainer, validation: List[Batches]) -> None:
    """Note the generators' states, so that a run that is cut off here can validate again."""
    trainer.states_before_validation = {
        "global": global_states(),
        "data": [states_in(None, loader.source) for loader in validation],
    }
    note_layers_in_eval_mode(trainer)
    for index, loader in enumerate(validation):
        loader.pass_seed = (trainer.run_seed, trainer.batches_seen, 1 + index)
    trainer.point = Point.VALIDATING


def epoch_cut_short(trainer: Trainer, batches: int, is_last: bool) -> None:
    """Take note that the epoch ends here because training does."""
    if is_last:
        trainer.rates.calendar.epoch_ended(trainer.current_epoch, batches)
    else:
        trainer.cut_short = trainer.metrics.state()
