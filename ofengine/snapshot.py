"""What a checkpoint keeps of a run in progress; :mod:`ofengine.resume` goes on from it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Dict, List

import numpy as np
import oneflow as flow

from ofengine import __version__
from ofengine._oneflow import synchronize
from ofengine.checkpoint import array_of
from ofengine.course import Point
from ofengine.errors import ConfigurationError
from ofengine.generators import global_states, states_in
from ofengine.rates.resume import plan_state

if TYPE_CHECKING:
    from ofengine.state import RunState

State = Dict[str, Any]


def state_of_run(trainer: RunState) -> State:
    """Everything of the run but the weights, as a nested dict of plain values and arrays.

    Raises :class:`ConfigurationError` inside a step, where half of it would be saved.
    """
    if trainer.point is Point.STEP:
        raise ConfigurationError(
            "save_checkpoint() was called between on_train_batch_start and on_train_batch_end, "
            "where a batch is half done: call it in on_train_batch_end or later."
        )
    synchronize()  # a graph's run is not waited for by reading what it writes
    task = trainer.task
    extra: State = {}
    task.on_save_checkpoint(extra)
    steps, optimizer = trainer.fit_runner.optimizer_state()
    pending = trainer.resumed
    moments = pending.moments() if pending is not None else _moments(trainer)
    return {
        **moments,
        "optimizer": {
            "class": type(trainer.optimizer).__qualname__,
            "steps": steps,
            "options": plain_options(trainer),
            "states": {name: _arrays(kept) for name, kept in optimizer.items()},
        },
        "rates": plan_state(trainer.rates, trainer.made, trainer.steps_done),
        "callbacks": _callback_states(trainer),
        "loggers": [each.state_dict() for each in trainer.loggers],
        "task": extra,
        "hparams": _plain_hparams(task),
        "run": {
            "id": trainer.run_id,
            "mode": trainer.mode,
            "seed": trainer.seed,
            "run_seed": trainer.run_seed,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "seconds": trainer.seconds_trained(),
            "saved_at": time.time(),
        },
        "versions": {
            "ofengine": __version__,
            "oneflow": flow.__version__,
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }


def _moments(trainer: RunState) -> State:
    """Where exactly the run is: loop, metrics, generators, gradients of an open window."""
    point = trainer.point
    in_epoch = point not in (Point.BEGIN, Point.EPOCH_START, Point.EPOCH_END, Point.OVER)
    epoch = trainer.current_epoch
    if point is Point.OVER:
        epoch -= 1
    train, task = trainer.train_batches, trainer.task
    before = trainer.states_before_validation
    source = train.source if train is not None else None
    after = trainer.data_states_after_fit
    states = {
        "global": global_states(),
        "data": states_in(None, source) if source is not None else after["now"],
        "task": states_in(task, None),
    }
    if point is Point.VALIDATING and before is not None:
        states.update({"global": before["global"], "validation": before["data"]})
    gradients = trainer.fit_runner.gradients() if in_epoch else {}
    return {
        "loop": {
            "point": point.value,
            "epoch": epoch,
            "batches_done": trainer.batch_idx + 1,
            "global_step": trainer.steps_done,
            "batches_seen": trainer.batches_seen,
            "should_stop": trainer.should_stop,
            "cut_short": trainer.cut_short,
            "epoch_length": trainer.num_training_batches,
            "frozen": [n for n, p in task.named_parameters() if not p.requires_grad],
            "in_eval_mode": [n for n, m in task.named_modules() if not m.training]
            if point not in (Point.VALIDATING, Point.VALIDATED, Point.OVER)
            else trainer.layers_in_eval_mode,
        },
        "metrics": trainer.metrics.state(),
        "random": states,
        "random_at_pass": train.states_at_start if train is not None else after["at_pass"],
        "random_at_validation": [each.states_at_start for each in trainer.validation_batches]
        if train is not None
        else after["at_validation"],
        "gradients": _arrays(gradients),
    }


def _arrays(tensors: Dict[str, Any]) -> Dict[str, np.ndarray]:
    return {name: array_of(tensor) for name, tensor in tensors.items()}


def plain_options(trainer: RunState) -> List[State]:
    """The plain options of each group, rates left out: they are the plan's."""
    return [
        {
            key: value
            for key, value in group.options.items()
            if key not in ("lr", "initial_lr", "params") and _is_plain(value)
        }
        for group in trainer.optimizer.param_groups
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain_hparams(task: Any) -> State:
    return {key: value for key, value in task.hparams.items() if _is_plain(value)}


def _callback_states(trainer: RunState) -> List[State]:
    return [
        {"class": type(callback).__qualname__, "state": callback.state_dict()}
        for callback in trainer.callbacks
    ]
