"""The largest batch that a training step has memory for, by trying."""

from __future__ import annotations

import logging
from typing import Any, Callable, List, Union

import oneflow as flow

from ofengine.callback import Callback
from ofengine.data.combined import together
from ofengine.data.structure import batch_size_of, flatten, unflatten
from ofengine.errors import ConfigurationError, DataError
from ofengine.run.arguments import check_choice, check_count
from ofengine.run.settings import Settings, refuse_arguments
from ofengine.task import TaskModule
from ofengine.trials.memory import free_memory, in_mb, limit_of
from ofengine.trials.prove import Fit
from ofengine.trials.restore import of_sweep
from ofengine.trials.trial_process import Outcome, Trial, carry_out, check_can_try

log = logging.getLogger("ofengine")

_found: List[int] = []
"""What this process's calls have found, in order: each is a call that a child passes by."""


class _Quiet(Callback):
    """Losses of a trial are nobody's."""

    watches_losses = True


_OPTIONS = ("mode", "steps_per_trial", "init_val", "max_trials", "max_val", "memory_limit")


def scale_batch_size(
    settings: Settings,
    task: TaskModule,
    train_dataloaders: Any,
    fit: Fit,
    *,
    mode: str = "binsearch",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    max_val: int = 8192,
    memory_limit: Union[int, float] = 0.5,
    **_unknown: Any,
) -> int:
    """The largest number of rows that a training batch may have.

    For each try the script is run again, in a process of its own, up to this call; there the first
    batch of the training data is made longer by repeating its rows, or cut, and trained on for a
    few steps in the mode of ``settings``. First with twice as many rows each time, then the
    interval is halved. A process that takes more memory than the limit is killed. In this process
    nothing is computed: task, optimizer, data and generators are as before. What stands before the
    call in the script runs again each time, without being seen.

    Args:
        settings: the Trainer's.
        task: the task.
        train_dataloaders: as in ``fit``. Of each tensor with as many rows as the first one has, the
            first dimension is changed; other tensors stay.
        fit: see :data:`ofengine.trials.prove.Fit`.
        mode: "binsearch", or "power" for the last power of two times ``init_val``.
        steps_per_trial: optimizer steps of a try.
        init_val: rows of the first try.
        max_trials: tries at most.
        max_val: rows at most.
        memory_limit: what the training process may take in RAM, without the processes of a
            DataLoader: a share of what is free now, up to 0.9, or bytes. A GPU has its own limit.

    Raises:
        ConfigurationError: an argument is wrong, the script cannot be run again, or a try fails for
            another reason than memory.
        DataError: the data has no rows, or ``init_val`` rows do not fit.
    """
    refuse_arguments("scale_batch_size", _unknown, _OPTIONS)
    if settings.world_size > 1:
        raise ConfigurationError(
            f"scale_batch_size runs in one process, and there are {settings.world_size} ranks: "
            "call it with Trainer(devices=1), and let each rank take as many rows."
        )
    _check(mode, steps_per_trial, init_val, max_trials, max_val)
    trial = Trial.of_this_process()
    if trial is not None and len(_found) < len(trial.found):
        _found.append(trial.found[len(_found)])  # a call before that which asked for this process
        return _found[-1]
    if trial is not None:
        for each in task._trainer.loggers if task._trainer is not None else ():
            each.finalize("failed")  # a fit that asks has claimed a folder, which goes again
        _train(settings, task, train_dataloaders, fit, trial.rows, steps_per_trial)
        trial.succeed()
    check_can_try()
    limit = limit_of(memory_limit, free_memory())
    found = search(lambda rows: carry_out(_found, rows, limit), mode, init_val, max_trials, max_val)
    log.info("scale_batch_size: %d rows fit into %s.", found, in_mb(limit))
    _found.append(found)
    return found


def _check(mode: str, steps: int, init_val: int, max_trials: int, max_val: int) -> None:
    own = "scale_batch_size: "
    check_choice(own + "mode", mode, ("binsearch", "power"))
    for name, value in (
        ("steps_per_trial", steps), ("init_val", init_val), ("max_trials", max_trials),
        ("max_val", max_val),
    ):  # fmt: skip
        check_count(own + name, value, 1, "a whole number from 1 on")
    if init_val > max_val:
        raise ConfigurationError(f"{own}init_val={init_val} is more than max_val={max_val}.")


def search(
    attempt: Callable[[int], Outcome], mode: str, init_val: int, max_trials: int, max_val: int
) -> int:
    """The largest number of rows that fits: doubling, then halving what is between."""
    fits, too_large, made = 0, max_val + 1, 0
    rows = init_val
    while rows < too_large and made < max_trials:
        made += 1
        outcome = attempt(rows)
        if not outcome.fits:
            too_large = rows
            break
        fits, rows = rows, 2 * rows
    if not fits:
        raise DataError(
            f"scale_batch_size(init_val={init_val}): {outcome.why}. Give a smaller init_val, or a "
            "larger memory_limit."
        )
    while mode == "binsearch" and too_large - fits > 1 and made < max_trials:
        made += 1
        middle = (fits + too_large) // 2
        if attempt(middle).fits:
            fits = middle
        else:
            too_large = middle
    return fits


def _train(
    settings: Settings, task: TaskModule, source: Any, fit: Fit, rows: int, steps: int
) -> None:
    """The steps of a try."""
    source = together(source if source is not None else task.train_dataloader())
    batch = next(iter(source), None)
    if batch is None or not batch_size_of(batch):
        raise DataError("scale_batch_size found no batch with rows in the training data.")
    settings = of_sweep(
        settings, steps, limit_train_batches=None, overfit_batches=None, limit_val_batches=0
    )
    batches = [resized(batch, rows)] * (steps * settings.windows.most)
    fit(settings, [_Quiet()], task, batches, None)


def resized(batch: Any, rows: int) -> Any:
    """``batch`` with so many rows: its own, over and over."""
    own = batch_size_of(batch)
    tensors: List[Any] = []
    structure = flatten(batch, tensors)
    index = flow.tensor([row % own for row in range(rows)])
    made = [
        flow.index_select(each, 0, index.to(each.device))
        if each.ndim and each.shape[0] == own
        else each
        for each in tensors
    ]
    return unflatten(structure, iter(made))
