"""The course of a run: when validation is due, what changed on the way."""

from __future__ import annotations

import contextlib
import difflib
import logging
from typing import Any, Dict, Iterator, List, Optional

from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine._oneflow.session import synchronize
from ofengine.checkpoint.cut_short import eval_layers_in, frozen_in, noted_at_cut
from ofengine.checkpoint.snapshot import before_validation
from ofengine.data.batches import Batches
from ofengine.data.generators import states_in
from ofengine.data.seeding import BatchSeeds, seed_epoch
from ofengine.data.sources import describe_once
from ofengine.data.structure import describe_shapes, is_empty, size_of
from ofengine.errors import DataError, RateError, quoted, warn
from ofengine.modes.steps import trained_parameters
from ofengine.rates.counted import is_counted
from ofengine.run.progress import Point
from ofengine.run.state import Run

log = logging.getLogger("ofengine")


def validation_is_due(run: Run, batch_idx: int, is_last: bool) -> bool:
    """True where validation follows this batch."""
    if (run.progress.epoch + 1) % run.settings.check_val_every_n_epoch:
        return False
    every = run.batches_between_validations
    return is_last if every is None else (batch_idx + 1) % every == 0


def note_batch(run: Run, what: str, batch_idx: int, batch: Any, at: str = "") -> None:
    """Note a batch of other shapes than the one before, for whoever speaks after a crash.

    Raises :class:`DataError` where it holds no sample.
    """
    shapes = describe_shapes(batch)
    if is_empty(batch):
        raise DataError(
            f"batch {batch_idx} of {what}{at} holds no sample ({shapes}): leave it out where "
            "batches are made, in the sampler, the collate_fn or the list."
        )
    run.place.note(f"of {what}{at}", shapes, size_of(batch))


def epoch_outgrew(run: Run) -> None:
    """Take note that the epoch has more batches than was expected."""
    run.rates.calendar.outgrown(run.progress.epoch)
    if run.rates.depends_on_epochs():
        run.training_mode.rebuild("the epoch is longer than was expected")


def skips_the_rest(run: Run, answers: List[Any]) -> bool:
    """True where an ``on_train_batch_start`` answered -1: the epoch ends before this batch.

    Of several ranks, all that have a batch must have answered so.
    """
    skips = any(isinstance(each, int) and each == -1 for each in answers)
    answers.clear()
    if not skips:
        return False
    if run.ranks is not None:
        run.ranks.skip()
    leave_rest_out(run)
    return True


def leave_rest_out(run: Run) -> None:
    """End the epoch before this batch.

    What an accumulation window has so far is let go, for no step is made of it, and its batches
    count for no rate.
    """
    progress = run.progress
    progress.batch_idx -= 1
    progress.point = Point.READY
    if run.training_mode.gradients():
        log.info("the window of batch %d, that is not full, is left out.", progress.batch_idx)
        run.weighing.load(None, None)  # first: ranks keep it with the gradients
        run.training_mode.load_gradients({})
    _note_length(run, run.rates.calendar.in_whole_windows(progress.epoch, progress.batches_done))


def epoch_ended(run: Run, train: Batches) -> None:
    """Take note of an epoch's true length."""
    if run.progress.batches_done == 0:
        end = f": {describe_once(train.source)}." if train.once else "."
        raise DataError(f"{train.what} gave no batch in epoch {run.progress.epoch}{end}")
    _note_length(run, run.progress.batches_done)


def _note_length(run: Run, batches: int) -> None:
    surprise = run.rates.calendar.epoch_ended(run.progress.epoch, batches)
    if surprise and run.rates.depends_on_epochs():
        run.training_mode.rebuild("the epoch had another length than was expected")


def enter_training(task: nn.Module) -> None:
    """Put ``task`` in training mode, but for the layers that somebody has put in eval mode.

    A module is made in training mode. Where the task itself is not, it was put in eval mode as a
    whole, to be used, and now all of it trains; where it is, each layer in eval mode was meant.
    """
    kept = [(n, m) for n, m in task.named_modules() if not m.training] if task.training else []
    task.train()  # of the user's own, perhaps, which puts layers in eval mode
    for _, layer in kept:
        layer.training = False
    if kept:
        names = [name for name, _ in kept]
        tops = [name for name in names if name.rpartition(".")[0] not in names]
        some = ", ".join(tops[:4]) + (", ..." if len(tops) > 4 else "")
        log.info("layers that are in eval mode stay so in training: %s.", some)


@contextlib.contextmanager
def in_eval_mode(task: nn.Module) -> Iterator[None]:
    """All layers of ``task`` in eval mode within; then each as it was, whatever happened."""
    training = [module for module in task.modules() if module.training]
    task.eval()
    try:
        yield
    finally:
        for module in training:  # not task.train(): a user may keep some layers in eval mode
            module.training = True


def check_all_train(run: Run) -> None:
    """Raise where a parameter is to train that came to the task after its optimizer was made.

    Such a layer is made in a hook or in the first step; or it was frozen, and so left out of the
    groups, and is unfrozen now.
    """
    run.rates.check_number_of_groups()
    groups = [g for each in run.each().values() for g in each.made.optimizer.param_groups]
    known = {id(p) for group in groups for p in group.parameters}
    late = [n for n, p in run.task.named_parameters() if p.requires_grad and id(p) not in known]
    if late:
        some = ", ".join(map(repr, late[:4])) + (f" and {len(late) - 4} more" if late[4:] else "")
        raise RateError(
            f"{len(late)} parameter(s) are to train and are in no group of the optimizer: {some}. "
            "They were made, or unfrozen, after configure_optimizers(): make the layer in __init__ "
            "or setup(), put frozen parameters into a group too, or call requires_grad_(False)."
        )


def check_first_batch(run: Run, outputs: Dict[str, Any]) -> None:
    """What only an epoch's first step shows: layers that it made, and what it returned.

    Warns, after the first batch of a run, of a key that is almost "weight", which nobody reads.
    """
    check_all_train(run)
    if run.progress.batches_seen > run.settings.world_size:
        return
    for returned in [outputs[name] for name in run.parts if name in outputs] or [outputs]:
        keys = [key for key in returned if isinstance(key, str) and key.startswith("w")]
        close = difflib.get_close_matches("weight", keys, n=1, cutoff=0.8)
        if "weight" not in returned and close:
            warn(
                f"{type(run.task).__name__}.training_step returned a dict with the key "
                f"{close[0]!r}: did you mean 'weight', by which batches are averaged?"
            )


def refresh_parameters(run: Run) -> None:
    """Look which parameters train now; hooks may have frozen or unfrozen some, or made others."""
    check_all_train(run)
    training = [module.training for module in run.task.modules()]
    for each in run.each().values():
        parameters = [
            parameter
            for group in each.made.optimizer.param_groups
            for parameter in group.parameters
            if parameter.requires_grad
        ]
        others = [id(p) for p in parameters] != [id(p) for p in each.parameters]
        if each.parameters and (others or training != each.layers_in_training):
            what = "parameters train" if others else "layers are in training mode"
            each.training_mode.rebuild(f"other {what} from here on")
        each.parameters = parameters
        each.layers_in_training = training


def observes_steps(run: Run) -> bool:
    """True where ReduceLROnPlateau is to see its metric between epochs."""
    made = [each.made for each in run.each().values()]
    return any(each.monitor is not None and each.interval == "step" for each in made)


def observe_metric(run: Run, interval: str, count: int) -> None:
    """Let ReduceLROnPlateau see its metric, where that is due after ``count`` intervals."""
    for name, each in run.each().items():
        if name and not trained_parameters(each):
            continue  # it is frozen, and perhaps its metric is not there
        if interval == "step" and name:
            if run.progress.batch_idx % each.every_n_batches:
                continue  # it made none
            count = each.progress.global_step
        _observe_metric(each, interval, count)


def _observe_metric(run: Run, interval: str, count: int) -> None:
    made = run.made
    if made.monitor is None or made.interval != interval or count % made.frequency:
        return
    metrics = run.metrics.values
    if made.monitor not in metrics:
        told = (
            f"ReduceLROnPlateau monitors {made.monitor!r}, which nothing has logged: there is "
            f"{quoted(sorted(metrics), most=20) if metrics else 'no metric'}"
        )
        if made.strict:
            raise RateError(f"{told}. Where it is logged later, or less often, add 'frequency'.")
        warn(f"{told}, so that it left the rates as they were ('strict': False).")
        return
    if run.rates.observe(metrics[made.monitor]):
        run.training_mode.rebuild(f"ReduceLROnPlateau lowered the rates on {made.monitor}")


def begin_epoch(run: Run, train: Batches) -> None:
    """Make the epoch's randomness a function of (seed, epoch), where there is a seed."""
    if run.seed is not None:
        seed_epoch(run.seed, run.progress.epoch, train, run.task)
    train.set_epoch(run.progress.epoch)
    train.pass_seed = (run.data_seed, run.progress.epoch)
    run.progress.batch_idx, run.progress.batches_done = -1, 0
    run.cut_short = run.at_cut = None
    run.progress.point = Point.EPOCH_START


def batch_seeds(run: Run, train: Batches) -> Optional[BatchSeeds]:
    """What seeds each batch's step, and its loading, where an optimizer step averages several."""
    train.before_load = None
    if run.seed is None or run.settings.windows.at(run.progress.epoch) == 1:
        return None
    seeds = BatchSeeds(run.seed, run.progress.epoch, run.task)
    train.before_load = seeds.load
    return seeds


def note_layers_in_eval_mode(run: Run) -> None:
    """Note which layers training has in eval mode: validation, or the user, will change it."""
    run.layers_in_eval_mode = eval_layers_in(run.task)


def note_end(run: Run) -> None:
    """Note which parameters and layers train, for what is saved when that was changed again."""
    run.frozen = frozen_in(run.task)
    note_layers_in_eval_mode(run)


def begin_validation(run: Run, validation: List[Batches]) -> None:
    """Note the generators' states, so that a run that is cut off here can validate again."""
    run.states_before_validation = before_validation(run, validation)
    note_layers_in_eval_mode(run)
    for index, loader in enumerate(validation):
        loader.pass_seed = (run.data_seed, run.progress.batches_seen, 1 + index)
    run.progress.point = Point.VALIDATING


def epoch_cut_short(run: Run, is_last: bool) -> None:
    """Take note that the epoch ends here because training does."""
    if is_last:
        run.rates.calendar.epoch_ended(run.progress.epoch, run.progress.batches_done)
    else:
        run.cut_short, run.at_cut = run.metrics.state(), noted_at_cut(run)


def note_data_states(run: Run, train: Batches, validation: List[Batches]) -> None:
    """Note where the data's generators are at the end of ``fit``, for a checkpoint after it."""
    run.data_states_after_fit = {
        "now": states_in(None, train.source),
        "validation": [states_in(None, each.source) for each in validation],
        "at_pass": train.states_at_start,
        "at_validation": [each.states_at_start for each in validation],
    }


@contextlib.contextmanager
def leaving_rates_behind(run: Run) -> Iterator[None]:
    """Leave scheduler and groups as a loop by hand would have left them, after an error too."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error counts
            _leave_rates_behind(run)
        raise
    _leave_rates_behind(run)


def _leave_rates_behind(run: Run) -> None:
    synchronize()
    for each in run.each().values():
        _leave_rates_of(each)


def _leave_rates_of(run: Run) -> None:
    made, plan, step = run.made, run.rates, run.progress.global_step
    if isinstance(made.scheduler, LRScheduler):
        for _ in range(plan.position(step)):
            made.scheduler.step()
    # A function or a table need not know the step after the last one.
    scheduler = made.scheduler
    asked = scheduler is None or isinstance(scheduler, LRScheduler) or is_counted(scheduler)
    rates = plan.unscaled(step if asked else max(step - 1, 0))
    for group, lr in zip(made.optimizer.param_groups, rates):
        group["lr"] = lr
    if plan.options is not None:
        groups = [group.options for group in made.optimizer.param_groups]
        plan.options.put(groups, max(step - 1, 0))
