"""What a checkpoint keeps of a run in progress; :mod:`.resume` goes on from it."""

from __future__ import annotations

import sys
import time
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import oneflow as flow

from ofengine import __version__
from ofengine._oneflow.optimizer_state import own_options
from ofengine._oneflow.session import synchronize
from ofengine.callback import overrides, ships
from ofengine.checkpoint.beside import (
    changed_tensors,
    digest_of,
    states_of_others,
    tensors_beside,
)
from ofengine.checkpoint.cut_short import eval_layers_in, frozen_in, part_at_cut
from ofengine.checkpoint.file import array_of
from ofengine.checkpoint.hparams import kept_hparams
from ofengine.checkpoint.hparams_given import told_to_make
from ofengine.checkpoint.hparams_restored import defaults_of
from ofengine.checkpoint.kernels import kernels_in_use
from ofengine.checkpoint.of_task import kept_by
from ofengine.checkpoint.owners import describe_owner
from ofengine.checkpoint.seen import attributes_seen, changed_since_start
from ofengine.checkpoint.weights import arrays_of
from ofengine.data.batches import Batches
from ofengine.data.generators import global_states, states_in
from ofengine.data.structure import copied
from ofengine.errors import ConfigurationError
from ofengine.processes.supervisor import supervised_by
from ofengine.rates.resume import plan_state
from ofengine.run.precision import FULL
from ofengine.run.progress import BETWEEN_EPOCHS, Point
from ofengine.run.state import Run, State
from ofengine.task import TaskModule


def content_of(run: Run) -> Tuple[State, Optional[State], State]:
    """The weights, the state of the run, and the metadata of a checkpoint of this moment."""
    if run.task is None:
        raise ConfigurationError(
            "save_checkpoint() has nothing to save before fit, validate, test or predict."
        )
    if run.mode is not None:
        run.mode.settle()
    copies = _copies(run)
    state = None if run.plan is None else state_of_run(run, copies)
    metadata: State = {"epoch": run.progress.epoch, "global_step": run.progress.global_step}
    if state is not None:
        metadata.update(run=run.id, sitting=run.sitting)
    supervisor = supervised_by()
    if supervisor:
        metadata["supervised_by"] = supervisor
    weights = arrays_of(run.task)
    for name, tensor in run.task.state_dict(keep_vars=True).items():
        if id(tensor) in copies:
            weights[name] = array_of(copies[id(tensor)])
    return weights, state, metadata


def _copies(run: Run) -> Dict[int, Any]:
    """What a checkpoint keeps in the place of tensors of the task, by their ``id``.

    Training's weights while a callback has others there; what buffers were before the validation
    that goes on, and begins anew in a resumed run. A tensor may have two names in the task.
    """
    copies: Dict[int, Any] = {}
    before = run.states_before_validation
    if run.progress.point is Point.VALIDATING and before is not None:
        copies.update((id(tensor), copy) for tensor, copy in before["tensors"])
    own = {**dict(run.task.named_buffers()), **dict(run.task.named_parameters())}
    aside = {**run.weights_aside, **run.weights_left}
    copies.update((id(own[n]), kept) for n, kept in aside.items() if n in own)
    return copies


def before_validation(run: Run, validation: List[Batches]) -> State:
    """What validation may change, so that a run that is cut off in it can validate again."""
    run.training_mode.settle()
    tensors = [*run.task.buffers(), *tensors_beside(run.task).values()]
    return {
        "global": global_states(),
        "validation": [states_in(None, loader.source) for loader in validation],
        "task": states_in(run.task, None),
        "callbacks": [states_in(None, None, callback) for callback in run.callbacks],
        "tensors": [(tensor, tensor.detach().clone()) for tensor in tensors],
        "owners": copied(_states_of_owners(run, users_only=True)),
    }


def _states_of_owners(run: Run, users_only: bool = False) -> State:
    """What callbacks, loggers and the task say is to be kept of them.

    ``users_only``: of those alone that may be others after a part of a validation. The callbacks
    that ship have changed nothing by then, and some hold a copy of all weights.
    """
    extra: State = {}
    if not users_only or overrides(run.task, "on_save_checkpoint", TaskModule):
        extra = kept_by(run.task)
    callbacks = [
        {} if users_only and ships(callback) else callback.state_dict()
        for callback in run.callbacks
    ]
    return {
        "callbacks": callbacks,
        "loggers": [each.state_dict() for each in run.loggers],
        "task": extra,
    }


def _owners_now(run: Run) -> State:
    """The same of this moment; within a validation, which begins anew, of before it."""
    now, before = _states_of_owners(run), run.states_before_validation
    if run.progress.point is not Point.VALIDATING or before is None:
        return now
    kept = before["owners"]
    callbacks = [
        state if ships(callback) else old
        for callback, state, old in zip(run.callbacks, now["callbacks"], kept["callbacks"])
    ]
    return {**now, **kept, "callbacks": callbacks}


def note_start(run: Run) -> None:
    """Take note of what is no part of a ``state_dict``, to know later what training changes."""
    run.tensors_at_start = {
        place: (tuple(tensor.shape), digest_of(tensor))
        for place, tensor in tensors_beside(run.task).items()
    }
    run.seen_at_start = attributes_seen(run)


def state_of_run(run: Run, copies: Mapping[int, Any]) -> State:
    """Everything of the run but the weights, as a nested dict of plain values and arrays.

    ``copies`` stand for tensors of the task, by ``id``.

    Raises :class:`ConfigurationError` inside a step, where half of it would be saved.
    """
    if run.progress.point is Point.STEP:
        raise ConfigurationError(
            "save_checkpoint() was called between on_train_batch_start and on_train_batch_end, "
            "where a batch is half done: call it in on_train_batch_end or later."
        )
    synchronize()  # a graph's run is not waited for by reading what it writes
    owners, windows = _owners_now(run), run.settings.windows
    optimizers = {name: _of_optimizer(each) for name, each in run.each().items()}
    moments, precision = run.moments_resumed, run.settings.precision
    first = _moments(run, copies) if moments is None else moments
    rest = {
        "callbacks": [
            {**describe_owner(callback), "state": state}
            for callback, state in zip(run.callbacks, owners["callbacks"])
        ],
        "history": run.history.state(),
        "loggers": owners["loggers"],
        "logger_keys": [describe_owner(each) for each in run.loggers],
        "task": owners["task"],
        "hparams": _plain_hparams(run.task),
        "run": {
            "id": run.id,
            "mode": run.settings.mode,
            "seed": run.seed,
            "run_seed": run.data_seed,
            "accumulate_grad_batches": windows.at(max(0, run.progress.state()["epoch"])),
            "windows": [list(change) for change in windows.changes],
            "ranks": run.settings.world_size,
            **({} if precision == FULL else {"precision": precision}),
            "seconds": run.seconds_trained,
            "saved_at": time.time(),
        },
        "versions": {
            "ofengine": __version__,
            "oneflow": flow.__version__,
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **kernels_in_use(run.settings.cpu_speedups),
        },
    }
    # Of callbacks, samplers, ...: what they hold themselves, while the file may be written later.
    of_optimizers = {"several": optimizers} if run.parts else optimizers[""]
    at_cut = part_at_cut(run.at_cut, {**first, **rest})
    return {**copied(first), **of_optimizers, **copied(rest), **at_cut}


def _of_optimizer(run: Run) -> State:
    """The optimizer of a run, or of a part, and its rates."""
    steps, states = run.training_mode.optimizer_state()
    return {
        "optimizer": {
            "class": type(run.made.optimizer).__qualname__,
            "steps": steps,
            "options": plain_options(run),
            "states": {name: _arrays(kept) for name, kept in states.items()},
        },
        "rates": copied(plan_state(run.rates, run.made, run.progress.global_step)),
        **({"every_n_batches": run.every_n_batches} if run.name else {}),
    }


MOMENTS = (
    "loop", "metrics", "random", "random_at_pass", "random_at_validation", "order", "gradients",
    "weights", "tensors", "optimizers", "seen",
)  # fmt: skip
"""The parts of a state that :func:`_moments` makes; files of earlier versions lack some."""


def _moments(run: Run, copies: Mapping[int, Any]) -> State:
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
        "validation": [states_in(None, each.source) for each in run.validation]
        if train is not None
        else after["validation"],
        "callbacks": [states_in(None, None, callback) for callback in run.callbacks],
    }
    if point is Point.VALIDATING and before is not None:
        states.update({key: before[key] for key in ("global", "validation", "task", "callbacks")})
    if point is Point.EPOCH_START and train is not None:
        states.update(train.states_if_begun)  # it has drawn for batches that never came
    in_epoch = point not in BETWEEN_EPOCHS or run.cut_short is not None
    gradients = run.training_mode.gradients() if in_epoch else {}
    own = tensors_beside(task)
    tensors, left_out = changed_tensors(
        run, {place: copies[id(each)] for place, each in own.items() if id(each) in copies}
    )
    return {
        "loop": {
            **run.progress.state(),
            "should_stop": run.should_stop,
            "cut_short": run.cut_short,
            "half_made": point is Point.READY
            and run.interrupts.ended_waiting
            and not getattr(source, "num_workers", 0),
            "untold": _untold(run),
            "epoch_length": run.epoch_length,
            "frozen": run.frozen if point is Point.OVER else frozen_in(task),
            "in_eval_mode": eval_layers_in(task)
            if point not in (Point.VALIDATING, Point.VALIDATED, Point.OVER)
            else run.layers_in_eval_mode,
        },
        "metrics": run.metrics.state(),
        "random": states,
        "random_at_pass": train.states_at_start if train is not None else after["at_pass"],
        "random_at_validation": [each.states_at_start for each in run.validation]
        if train is not None
        else after["at_validation"],
        "order": train.order.digest(run.progress.batches_done - 1) if train is not None else None,
        "gradients": _arrays(gradients),
        "weights": run.weighing.state() if in_epoch else None,
        "tensors": tensors,
        "optimizers": states_of_others(run),
        "seen": changed_since_start(run, left_out),
    }


def _untold(run: Run) -> List[int]:
    """Who is to be told yet of this moment: places among the callbacks, -1 for the task."""
    places = {id(each): place for place, each in enumerate(run.callbacks)}
    return [places.get(id(e), -1) for e in run.telling.left_for_later(run.progress.point)]


def _arrays(tensors: Dict[str, Any]) -> Dict[str, np.ndarray]:
    return {name: array_of(tensor) for name, tensor in tensors.items()}


def plain_options(run: Run) -> List[State]:
    """The plain options of each group, as a file gives them back: tuples as lists.

    Without the rates and the values by schedule, which are the plan's, and what the optimizer
    writes there itself.
    """
    optimizer = run.made.optimizer
    others = {"lr", "initial_lr", "params", *own_options(optimizer)}
    plain = [
        {k: _listed(v) for k, v in group.options.items() if k not in others and _is_plain(v)}
        for group in optimizer.param_groups
    ]
    moved = run.rates.options
    return plain if moved is None else [moved.masked(i, each) for i, each in enumerate(plain)]


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain_hparams(task: Any) -> State:
    return kept_hparams(told_to_make(task), defaults_of(type(task)))
