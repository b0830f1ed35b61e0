"""The fit loop and the evaluation loop, to be read from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional

import oneflow as flow

from ofengine import course
from ofengine.connect import STEP_OF_STAGE
from ofengine.course import Point
from ofengine.data import STEPPED, Batches

if TYPE_CHECKING:
    from ofengine.resume import Entry
    from ofengine.trainer import Trainer

_LEAST_AHEAD, _MOST_AHEAD = 16, 128
"""Steps that are handed to the device between two waits for it, at least and at most."""
_BYTES_AHEAD = 64 * 1024 * 1024
"""The memory that batches of these steps may take where they are more than the least."""


# In a step, a name costs less than a look into an enum.
_STEP, _STEPPED, _READY = Point.STEP, Point.STEPPED, Point.READY
_VALIDATION_IS_OVER = (Point.VALIDATED, Point.READY)


def fit_loop(trainer: Trainer, train: Batches, validation: List[Batches]) -> None:
    """Train ``trainer.task``: epochs, batches, validation where it is due."""
    hooks = trainer.hooks
    if trainer.resumed is None:
        _sanity_check(trainer, validation)
    trainer.metrics.begin(per_step=False)
    trainer.task.train()
    trainer.mode_runner.start(trainer.optimizer)
    if trainer.resumed is not None:
        trainer.resumed.restore_training(trainer)
    hooks.fire("on_train_start")
    entry = None
    if trainer.resumed is not None:
        entry = trainer.resumed.enter(trainer, train)
        if trainer.point is Point.EPOCH_END:
            _end_epoch(trainer)
    while entry is not None or not course.is_done(trainer):
        if entry is None:
            course.begin_epoch(trainer, train)
            hooks.fire("on_train_epoch_start")
        course.refresh_parameters(trainer)
        _train_epoch(trainer, train, validation, entry)
        entry = None
        trainer.mode_runner.settle()
        trainer.log_metrics(trainer.metrics.close_epoch())
        trainer.point = Point.EPOCH_END
        hooks.fire("on_train_epoch_end")
        _end_epoch(trainer)
    trainer.point = Point.OVER
    course.note_layers_in_eval_mode(trainer)
    hooks.fire("on_train_end")
    trainer.log_metrics(trainer.metrics.close_epoch())  # what that hook logged
    trainer.metrics.end()


def _end_epoch(trainer: Trainer) -> None:
    trainer.log_metrics(trainer.metrics.close_epoch())  # what on_train_epoch_end logged
    trainer.save_logs()
    course.observe_metric(trainer, "epoch", trainer.current_epoch + 1)
    trainer.current_epoch += 1


def _train_epoch(
    trainer: Trainer, train: Batches, validation: List[Batches], entry: Optional[Entry]
) -> None:
    # Everything that stays the same from batch to batch is looked up here, once.
    trainer.hooks.look_again("on_train_batch_start", "on_train_batch_end")
    calls = trainer.hooks.calls
    batch_start, batch_end = calls["on_train_batch_start"], calls["on_train_batch_end"]
    step, commit = trainer.mode_runner.train_step, trainer.metrics.commit
    stage = trainer.metrics.begin_batches()
    logged = stage.current
    log_every = trainer.log_every_n_steps
    observes_steps = course.observes_steps(trainer)
    is_limited = trainer.max_steps != -1 or trainer.deadline is not None
    interrupts = trainer.interrupts
    last_expected = (trainer.rates.calendar.batches_per_epoch or 0) - 1
    waiting: Any = None
    next_wait = 0
    batch_idx = -1
    steps = train.steps(trainer.accumulate_grad_batches, entry.data if entry else None)
    if entry is not None:
        entry.restore_step_state(trainer)
        batch_idx = trainer.batch_idx
    for batch_idx, batch, window, closes, is_last in steps:
        trainer.batch_idx = batch_idx
        if batch is not STEPPED:
            trainer.point = _STEP
            if batch_idx == last_expected and not is_last:
                course.epoch_outgrew(trainer)
            for call in batch_start:
                call(batch, batch_idx)
            outputs = step(batch, batch_idx, window, closes)
            trainer.steps_done += closes
            trainer.batches_seen += 1
            trainer.point = _STEPPED
            stage.batch, stage.loss = batch, outputs["loss"]
            if logged:
                commit(batch)
            for call in batch_end:
                call(outputs, batch, batch_idx)
            if logged:
                commit(batch)  # what those hooks logged
            if batch_idx >= next_wait:
                if waiting is not None:
                    waiting.numpy()  # not item(): it spins, and takes the core from the device
                waiting = outputs["loss"]
                next_wait = batch_idx + _run_ahead(batch)
        if closes and trainer.point is _STEPPED:  # a resumed run may be beyond it
            if trainer.steps_done % log_every == 0:
                trainer.log_step()
                waiting = None  # that has waited for this step
            if observes_steps:
                course.observe_metric(trainer, "step", trainer.steps_done)
        if (
            validation
            and course.validation_is_due(trainer, batch_idx, is_last)
            and trainer.point not in _VALIDATION_IS_OVER
        ):
            course.begin_validation(trainer, validation)
            evaluation_loop(trainer, "validation", validation)
        trainer.point = _READY
        if interrupts.received is not None:
            interrupts.check()
        if trainer.should_stop or (
            is_limited and closes and course.is_out_of_time_or_steps(trainer)
        ):
            course.epoch_cut_short(trainer, batch_idx + 1, is_last)
            break
    else:
        course.epoch_ended(trainer, batch_idx + 1, train.once)
    trainer.metrics.end_batches()


def _run_ahead(batch: Any) -> int:
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


def _total(loaders: List[Batches], most: Optional[int]) -> Optional[int]:
    """The batches of all ``loaders``, ``most`` of each, or None where that is not known."""
    total = 0
    for loader in loaders:
        if loader.count is None:
            return None
        total += loader.count if most is None else min(loader.count, most)
    return total


def _sanity_check(trainer: Trainer, validation: List[Batches]) -> None:
    """Try a few validation batches, so that a mistake there shows before training."""
    if not validation or not trainer.num_sanity_val_steps:
        return
    trainer.sanity_checking = True
    trainer.hooks.fire("on_sanity_check_start")
    most = None if trainer.num_sanity_val_steps == -1 else trainer.num_sanity_val_steps
    evaluation_loop(trainer, "validation", validation, most=most)
    trainer.hooks.fire("on_sanity_check_end")
    trainer.metrics.forget()
    trainer.sanity_checking = False


def evaluation_loop(
    trainer: Trainer, stage: str, loaders: List[Batches], most: Optional[int] = None
) -> List[Dict[str, float]]:
    """Run ``stage`` ("validation", "test" or "predict") over ``loaders``.

    Returns the metrics of each loader. What ``predict_step`` returns goes to
    ``trainer.predictions``.
    """
    hooks, metrics = trainer.hooks, trainer.metrics
    calls = hooks.calls
    batch_start, batch_end = calls[f"on_{stage}_batch_start"], calls[f"on_{stage}_batch_end"]
    step = trainer.eval_runner.eval_step
    step_name = STEP_OF_STAGE[stage]
    results: List[Dict[str, float]] = []
    trainer.mode_runner.settle()
    training = [module for module in trainer.task.modules() if module.training]
    trainer.task.eval()
    trainer.num_evaluation_batches = _total(loaders, most)
    metrics.begin(per_step=False)
    hooks.fire(f"on_{stage}_start")
    hooks.fire(f"on_{stage}_epoch_start")
    for loader_idx, loader in enumerate(loaders):
        suffix = f"/dataloader_idx_{loader_idx}" if len(loaders) > 1 else ""
        metrics.begin(per_step=False, suffix=suffix)
        predictions: List[Any] = []
        for batch_idx, batch in enumerate(loader):
            if most is not None and batch_idx >= most:
                break
            for call in batch_start:
                call(batch, batch_idx, loader_idx)
            outputs = step(step_name, batch, batch_idx, loader_idx)
            metrics.commit(batch)
            for call in batch_end:
                call(outputs, batch, batch_idx, loader_idx)
            metrics.commit(batch)
            if stage == "predict":
                predictions.append(outputs)
            trainer.interrupts.check()
        results.append(metrics.close_epoch())
        metrics.end()
        if stage == "predict":
            trainer.predictions.append(predictions)
    hooks.fire(f"on_{stage}_epoch_end")
    shared = metrics.close_epoch()
    for result in results:
        result.update(shared)
    metrics.end()
    if trainer.point is Point.VALIDATING:
        trainer.point = Point.VALIDATED
    if not trainer.sanity_checking:
        trainer.log_metrics({name: value for result in results for name, value in result.items()})
    hooks.fire(f"on_{stage}_end")
    for module in training:  # not task.train(): a user may keep some layers in eval mode
        module.training = True
    return results
