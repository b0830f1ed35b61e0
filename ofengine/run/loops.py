"""The fit loop and the evaluation loop, to be read from top to bottom."""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Optional, Tuple

from ofengine.checkpoint.entry import Entry
from ofengine.checkpoint.resume import Resumed
from ofengine.checkpoint.snapshot import note_start
from ofengine.data.batches import Batches
from ofengine.data.steps import STEPPED
from ofengine.data.structure import shapes_of
from ofengine.launch.heartbeat import beat
from ofengine.metrics.base import evaluating
from ofengine.modes.labels import LabelWatch, checking
from ofengine.ranks.shares import ABSENT, ALONE
from ofengine.run import course, live, report, together
from ofengine.run.anomaly import train_step_of
from ofengine.run.connect import STEP_OF_STAGE
from ofengine.run.hooks import HookRunner, only_looks
from ofengine.run.losses import LossWatch, run_ahead, warn_of_metrics
from ofengine.run.mode import Mode
from ofengine.run.progress import Point
from ofengine.run.state import Run

log = logging.getLogger("ofengine")


# In a step, a name costs less than a look into an enum.
_STEP, _STEPPED, _READY = Point.STEP, Point.STEPPED, Point.READY
_VALIDATION_IS_OVER = (Point.VALIDATED, Point.READY)
_NONE_YET = object()
"""In the place of the shapes of the batch before."""


def fit_loop(
    run: Run,
    hooks: HookRunner,
    eval_mode: Mode,
    train: Batches,
    validation: List[Batches],
    resumed: Optional[Resumed],
) -> None:
    """Train the task of ``run``: epochs, batches, validation where it is due."""
    mode, progress, metrics = run.training_mode, run.progress, run.metrics
    validate = _Validation(run, hooks, eval_mode, validation)
    labels = LabelWatch(run.task, run.settings.mode, train_step_of(run))
    losses = LossWatch(run, labels)
    note_start(run)
    if resumed is None:
        _sanity_check(validate)
    metrics.begin(per_step=False)
    metrics.count_anew(evaluation=False)
    course.enter_training(run.task)
    mode.start()
    if resumed is not None:
        resumed.restore_training(run)
    is_over = progress.point is Point.EPOCH_END and not run.resumes_within_epoch
    progress.epoch += is_over  # the epoch that is to come, as after every other resumption
    hooks.fire("on_train_start")
    progress.epoch -= is_over
    entry = None
    if resumed is not None:
        train.set_epoch(resumed.state["loop"]["epoch"])  # it may draw, before generators are set
        entry = resumed.enter(run, train)
        if progress.point in (Point.EPOCH_START, Point.EPOCH_END):
            hooks.catch_up()
        if progress.point is Point.EPOCH_END:
            _end_epoch(run)
    while entry is not None or not run.is_done():
        if entry is None:
            course.begin_epoch(run, train)
            hooks.fire("on_train_epoch_start")
        course.refresh_parameters(run)
        _train_epoch(run, hooks, train, validate, entry, labels, losses)
        entry = None
        mode.settle()
        report.log_epoch(run)
        losses.read(metrics.newest_loss)
        progress.point = Point.EPOCH_END
        hooks.fire("on_train_epoch_end")
        losses.epoch_ended()
        _end_epoch(run)
    progress.point = Point.OVER
    course.note_end(run)
    hooks.fire("on_train_end")
    report.log_epoch(run)  # what that hook logged
    losses.training_ended()
    metrics.end()


def _end_epoch(run: Run) -> None:
    report.log_epoch(run)  # what on_train_epoch_end logged
    report.save_logs(run)
    if run.cut_short is None:  # else a resumed run may come to the epoch's real end
        course.observe_metric(run, "epoch", run.progress.epoch + 1)
    run.progress.epoch += 1


def _train_epoch(
    run: Run,
    hooks: HookRunner,
    train: Batches,
    validate: _Validation,
    entry: Optional[Entry],
    labels: LabelWatch,
    losses: LossWatch,
) -> None:
    # Everything that stays the same from batch to batch is looked up here, once.
    hooks.look_again("on_train_batch_start", "on_train_batch_end", "on_after_optimizer_step")
    batch_start, batch_end = hooks.calls["on_train_batch_start"], hooks.calls["on_train_batch_end"]
    after_update = hooks.calls["on_after_optimizer_step"]
    copies_loss = not all(map(only_looks, batch_end))
    settings, progress, telling = run.settings, run.progress, run.telling
    step, commit = labels.begin_epoch(), run.metrics.commit
    stage = run.metrics.begin_batches()
    logged = stage.current
    log_every = settings.log_every_n_steps
    observes_steps = course.observes_steps(run)
    is_limited = settings.max_steps != -1 or run.deadline is not None
    interrupts, ranks, orders = run.interrupts, run.ranks, run.orders
    share = settings.share or ALONE
    last_expected = share.rounds(run.rates.calendar.batches_per_epoch or 0) - 1
    seeds = course.batch_seeds(run, train)
    waiting: Any = None
    waiting_place = next_wait = 0
    losses.begin_epoch()
    keep_loss = losses.unread.append
    shapes: Any = _NONE_YET
    place, in_epoch = run.place.batch, f" in epoch {progress.epoch}"
    batch_idx = -1
    answers: List[Any] = []
    steps = train.steps(settings.accumulate_in(progress.epoch), entry.data if entry else None)
    if entry is not None:
        entry.restore_step_state(run)
        batch_idx = progress.batch_idx
    interrupts.waiting = is_alone = ranks is None
    for batch, batch_idx, window, closes, is_last in steps:
        interrupts.waiting = False
        progress.batch_idx, progress.is_last_batch = batch_idx, is_last
        beat()
        if batch is ABSENT and ranks is not None:
            if not together.take_part(run, ranks, batch_idx, window, closes, after_update):
                course.leave_rest_out(run)
                break
        elif batch is not STEPPED:
            place[0] = batch_idx
            now = shapes_of(batch)
            if now != shapes:
                course.note_batch(run, train.what, batch_idx, batch, in_epoch)
                shapes = now
            progress.point = _STEP
            if batch_idx == last_expected and not is_last:
                course.epoch_outgrew(run)
            if seeds is not None:
                seeds.begin(batch_idx * share.size + share.rank)
            for call in batch_start:
                answer = call(batch, batch_idx)
                if answer is not None:
                    answers.append(answer)
            if answers and course.skips_the_rest(run, answers):
                break
            outputs = step(batch, batch_idx, window, closes)
            progress.global_step += closes
            if closes:
                for call in after_update:
                    call()
            progress.batches_done += train.in_round
            progress.batches_seen += train.in_round
            stage.batch, stage.batch_idx, stage.loss = batch, batch_idx, outputs["loss"]
            keep_loss(loss := stage.loss)
            if logged:
                commit(batch)
            if copies_loss:
                outputs["loss"] = loss.clone()  # hooks may write into theirs
            progress.point, telling.left = _STEPPED, iter(batch_end)
            for call in telling.left:
                call(outputs, batch, batch_idx)
            if logged:
                commit(batch)  # what those hooks logged
            if batch_idx >= next_wait:
                if next_wait == 0:
                    step = labels.step()
                    course.check_first_batch(run, outputs)
                if waiting is not None:
                    step = losses.wait(waiting, waiting_place)
                waiting, waiting_place = loss, len(losses.unread)
                next_wait = batch_idx + run_ahead(batch)
        else:
            _catch_up(run, hooks)
        if closes and progress.point is _STEPPED:  # a resumed run may be beyond it
            if progress.global_step % log_every == 0:
                report.log_step(run)
                waiting = None  # that has waited for this step
                step = losses.read(run.metrics.newest_loss)
            if observes_steps:
                course.observe_metric(run, "step", progress.global_step)
        if (
            validate.loaders
            and course.validation_is_due(run, batch_idx, is_last)
            and progress.point not in _VALIDATION_IS_OVER
        ):
            course.begin_validation(run, validate.loaders)
            validate()
            shapes = _NONE_YET  # those noted are of validation
        progress.point = _READY
        if progress.batches_seen >= orders.due:
            live.carry_out(run)
        if ranks is not None:
            ends = together.stop(run, ranks, closes, is_last)
        else:
            if interrupts.received is not None:
                interrupts.check()
            ends = run.should_stop and run.stops()
            ends = ends or (is_limited and closes and run.is_out_of_time_or_steps())
        if ends:
            course.epoch_cut_short(run, is_last)
            break
        interrupts.waiting = is_alone
    else:
        interrupts.waiting = False
        course.epoch_ended(run, train)
    run.metrics.end_batches()


def _catch_up(run: Run, hooks: HookRunner) -> None:
    """Tell the rest of a batch that is done, or of the validation behind it."""
    if run.progress.point is not Point.VALIDATED:
        hooks.catch_up()
        return
    course.note_layers_in_eval_mode(run)
    with course.in_eval_mode(run.task), evaluating():
        hooks.catch_up()


def _total(run: Run, loaders: List[Batches], most: Optional[int]) -> Optional[int]:
    """The batches of all ``loaders``, ``most`` of each, or None where that is not known."""
    total = 0
    for loader in loaders:
        limit = _least(run, loader, most)
        if limit is None and loader.rounds is None:
            return None
        total += min(each for each in (loader.rounds, limit) if each is not None)
    return total


def _least(run: Run, loader: Batches, most: Optional[int]) -> Optional[int]:
    """``most`` batches, or none where trying some would take them from the pass proper."""
    return 0 if run.sanity_checking and loader.once else most


class _Validation:
    """Validation within a fit, ready to be called."""

    def __init__(
        self, run: Run, hooks: HookRunner, eval_mode: Mode, loaders: List[Batches]
    ) -> None:
        self.run = run
        self.hooks = hooks
        self.loaders = loaders
        self._mode = eval_mode

    def __call__(self, most: Optional[int] = None) -> None:
        """Run over ``most`` batches of each loader, or all."""
        evaluation_loop(self.run, self.hooks, self._mode, "validation", self.loaders, most)


def _sanity_check(validate: _Validation) -> None:
    """Try a few validation batches, so that a mistake there shows before training."""
    run, hooks, batches = validate.run, validate.hooks, validate.run.settings.num_sanity_val_steps
    if not validate.loaders or not batches:
        return
    once = [each.what for each in validate.loaders if each.once]
    if once:
        log.info("the sanity check leaves out %s, which can be gone through only once.", once[0])
    if len(once) == len(validate.loaders):
        return
    run.sanity_checking = True
    hooks.fire("on_sanity_check_start")
    validate(most=None if batches == -1 else batches)
    hooks.fire("on_sanity_check_end")
    run.metrics.forget()
    run.sanity_checking = False


def evaluation_loop(
    run: Run,
    hooks: HookRunner,
    mode: Mode,
    stage: str,
    loaders: List[Batches],
    most: Optional[int] = None,
    keeps: bool = True,
) -> Tuple[List[Dict[str, float]], List[List[Any]]]:
    """Run ``stage`` ("validation", "test" or "predict") over ``loaders``.

    Returns the metrics of each loader, and what ``predict_step`` returned where it ``keeps`` that.
    """
    metrics = run.metrics
    results: List[Dict[str, float]] = []
    predictions: List[List[Any]] = []
    if run.mode is not None:
        run.mode.settle()
    with course.in_eval_mode(run.task), evaluating():
        metrics.count_anew(evaluation=True)
        together.share_buffers(run)
        run.evaluation_batches = _total(run, loaders, most)
        metrics.begin(per_step=False)
        for loader in loaders:
            loader.set_epoch(run.progress.epoch)
        together.share_order(run, loaders)
        hooks.fire(f"on_{stage}_start")
        hooks.fire(f"on_{stage}_epoch_start")
        for loader_idx, loader in enumerate(loaders):
            suffix = f"/dataloader_idx_{loader_idx}" if len(loaders) > 1 else ""
            metrics.begin(per_step=False, suffix=suffix)
            predicted = _evaluate(run, hooks, mode, stage, loader_idx, loader, most, keeps)
            if stage == "predict":
                predictions.append(together.all_predictions(run, predicted))
            results.append(metrics.close_epoch())
            metrics.end()
            together.check_interrupts(run)
        hooks.fire(f"on_{stage}_epoch_end")
        shared = metrics.close_epoch()
        for result in results:
            result.update(shared)
        metrics.end()
        if run.progress.point is Point.VALIDATING:
            run.progress.point = Point.VALIDATED
        if not run.sanity_checking:
            all_loaders = {name: value for result in results for name, value in result.items()}
            report.log_metrics(run, all_loaders)
            warn_of_metrics(run, stage, all_loaders)
        hooks.fire(f"on_{stage}_end")
    return results, predictions


def _evaluate(
    run: Run,
    hooks: HookRunner,
    mode: Mode,
    stage: str,
    loader_idx: int,
    loader: Batches,
    most: Optional[int],
    keeps: bool,
) -> List[Any]:
    """One pass over one of the loaders; what ``predict_step`` returned."""
    metrics, calls, interrupts = run.metrics, hooks.calls, run.interrupts
    batch_start, batch_end = calls[f"on_{stage}_batch_start"], calls[f"on_{stage}_batch_end"]
    step_name = STEP_OF_STAGE[stage]
    step = checking(run.task, run.settings.eval_mode, mode.eval_step)
    predicted: List[Any] = []
    shapes: Any = _NONE_YET
    place = run.place.batch
    batch_idx = -1
    taken = _least(run, loader, most)
    interrupts.waiting = is_alone = run.ranks is None
    for batch_idx, batch in enumerate(loader.first(taken)):
        interrupts.waiting = False
        place[0] = batch_idx
        beat()
        metrics.at_batch(batch_idx)
        now = shapes_of(batch)
        if now != shapes:
            course.note_batch(run, loader.what, batch_idx, batch)
            shapes = now
        for call in batch_start:
            call(batch, batch_idx, loader_idx)
        outputs = step(step_name, batch, batch_idx, loader_idx)
        step = mode.eval_step
        metrics.commit(batch)
        for call in batch_end:
            call(outputs, batch, batch_idx, loader_idx)
        metrics.commit(batch)
        if stage == "predict" and keeps:
            predicted.append(outputs)
        if is_alone:
            interrupts.check()
        interrupts.waiting = is_alone
    interrupts.waiting = False
    mode.evaluated(step_name, loader_idx)
    if taken is None:
        at = f" in the validation of epoch {run.progress.epoch}" if stage == "validation" else ""
        loader.check_given(batch_idx + 1, at)
    return predicted
