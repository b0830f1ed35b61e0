"""What a checkpoint keeps of a run in progress; :mod:`.resume` goes on from it."""

from __future__ import annotations

import sys
import time
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import oneflow as flow

from ofengine import __version__
from ofengine._oneflow.session import synchronize
from ofengine.checkpoint.file import array_of
from ofengine.checkpoint.weights import arrays_of
from ofengine.data.generators import global_states, states_in
from ofengine.errors import ConfigurationError
from ofengine.rates.resume import plan_state
from ofengine.run.progress import BETWEEN_EPOCHS, Point
from ofengine.run.state import Run, State


def content_of(run: Run) -> Tuple[State, Optional[State], State]:
    """The weights, the state of the run, and the metadata of a checkpoint of this moment."""
    if run.task is None:
        raise ConfigurationError(
            "save_checkpoint() has nothing to save before fit, validate, test or predict."
        )
    if run.mode is not None:
        run.mode.settle()
    state = None if run.plan is None else state_of_run(run)
    metadata: State = {"epoch": run.progress.epoch, "global_step": run.progress.global_step}
    if state is not None:
        metadata["run"] = run.id
    weights = arrays_of(run.task)
    weights.update((name, array_of(kept)) for name, kept in run.weights_aside.items())
    return weights, state, metadata


def state_of_run(run: Run) -> State:
    """Everything of the run but the weights, as a nested dict of plain values and arrays.

    Raises :class:`ConfigurationError` inside a step, where half of it would be saved.
    """
    if run.progress.point is Point.STEP:
        raise ConfigurationError(
            "save_checkpoint() was called between on_train_batch_start and on_train_batch_end, "
            "where a batch is half done: call it in on_train_batch_end or later."
        )
    synchronize()  # a graph's run is not waited for by reading what it writes
    extra: State = {}
    run.task.on_save_checkpoint(extra)
    steps, optimizer = run.training_mode.optimizer_state()
    moments = run.moments_resumed
    return {
        **(_moments(run) if moments is None else moments),
        "optimizer": {
            "class": type(run.made.optimizer).__qualname__,
            "steps": steps,
            "options": plain_options(run),
            "states": {name: _arrays(kept) for name, kept in optimizer.items()},
        },
        "rates": plan_state(run.rates, run.made, run.progress.global_step),
        "callbacks": _callback_states(run),
        "loggers": [each.state_dict() for each in run.loggers],
        "task": extra,
        "hparams": _plain_hparams(run.task),
        "run": {
            "id": run.id,
            "mode": run.settings.mode,
            "seed": run.seed,
            "run_seed": run.data_seed,
            "accumulate_grad_batches": run.settings.accumulate_grad_batches,
            "seconds": run.seconds_trained,
            "saved_at": time.time(),
        },
        "versions": {
            "ofengine": __version__,
            "oneflow": flow.__version__,
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }


def _moments(run: Run) -> State:
    """Where exactly the run is: loop, metrics, generators, gradients of an open window."""
    point = run.progress.point
    train, task = run.train, run.task
    before = run.states_before_validation
    source = train.source if train is not None else None
    after = run.data_states_after_fit
    states = {
        "global": global_states(),
        "data": states_in(None, source) if source is not None else after["now"],
        "task": states_in(task, None),
    }
    if point is Point.VALIDATING and before is not None:
        states.update({"global": before["global"], "validation": before["data"]})
    in_epoch = point not in BETWEEN_EPOCHS
    gradients = run.training_mode.gradients() if in_epoch else {}
    return {
        "loop": {
            **run.progress.state(),
            "should_stop": run.should_stop,
            "cut_short": run.cut_short,
            "epoch_length": run.batches_per_epoch,
            "frozen": [n for n, p in task.named_parameters() if not p.requires_grad],
            "in_eval_mode": [n for n, m in task.named_modules() if not m.training]
            if point not in (Point.VALIDATING, Point.VALIDATED, Point.OVER)
            else run.layers_in_eval_mode,
        },
        "metrics": run.metrics.state(),
        "random": states,
        "random_at_pass": train.states_at_start if train is not None else after["at_pass"],
        "random_at_validation": [each.states_at_start for each in run.validation]
        if train is not None
        else after["at_validation"],
        "gradients": _arrays(gradients),
    }


def _arrays(tensors: Dict[str, Any]) -> Dict[str, np.ndarray]:
    return {name: array_of(tensor) for name, tensor in tensors.items()}


def plain_options(run: Run) -> List[State]:
    """The plain options of each group, rates left out: they are the plan's."""
    return [
        {
            key: value
            for key, value in group.options.items()
            if key not in ("lr", "initial_lr", "params") and _is_plain(value)
        }
        for group in run.made.optimizer.param_groups
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain_hparams(task: Any) -> State:
    return {key: value for key, value in task.hparams.items() if _is_plain(value)}


def _callback_states(run: Run) -> List[State]:
    return [
        {"class": type(callback).__qualname__, "state": callback.state_dict()}
        for callback in run.callbacks
    ]
