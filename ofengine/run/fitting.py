"""What ``fit`` does around its loop: data, seeds, the rate plan, a checkpoint."""

from __future__ import annotations

import logging
import time
from typing import Any, Optional

from ofengine.checkpoint.resume import Resumed
from ofengine.data.seeding import seed_everything
from ofengine.rates.checks import check_rates
from ofengine.rates.planning import plan_run
from ofengine.run import connect, course, live, report, several, together
from ofengine.run.devices import move
from ofengine.run.finite import Expected
from ofengine.run.hooks import HookRunner
from ofengine.run.loops import fit_loop
from ofengine.run.mode import Mode
from ofengine.run.state import Run

log = logging.getLogger("ofengine")


def fit_run(
    run: Run,
    hooks: HookRunner,
    eval_mode: Mode,
    train_dataloaders: Any,
    val_dataloaders: Any,
    resumed: Optional[Resumed],
    rates_on_resume: str,
) -> None:
    """Train the task of ``run``, from its beginning or from where ``resumed`` was."""
    settings, task = run.settings, run.task
    if not settings.max_epochs_given and settings.max_epochs != -1:  # as in a run that is tried
        log.info("max_epochs was not given: training up to %d epochs.", settings.max_epochs)
    train, validation = connect.take_data(run, train_dataloaders, val_dataloaders)
    move(task, settings.device)
    together.share_start(run, train, validation, resumed)
    if run.seed is not None:
        seed_everything(run.seed)
    run.optimization, run.plan = plan_run(
        settings, task, train.count, connect.decay_events(settings, run.callbacks)
    )
    several.divide(run, hooks)
    if resumed is not None:
        resumed.check(run, rates_on_resume)
        resumed.restore_run(run)
    run.expected = Expected.of(task)
    hooks.fire("on_fit_start")
    if resumed is not None:
        resumed.restore_rates(run, rates_on_resume)
    for each in run.each().values():
        step = each.progress.global_step
        check_rates(each.rates, each.made, each.total_steps, settings.max_epochs, step)
    report.log_hyperparams(run)
    run.begun_at = time.monotonic()
    if settings.max_time is not None:
        run.deadline = run.begun_at + settings.max_time - run.seconds_before
    if train.count == 0:
        log.info("limit_train_batches is 0: nothing is trained.")
    else:
        with live.listening(run, resumed, rates_on_resume), course.leaving_rates_behind(run):
            fit_loop(run, hooks, eval_mode, train, validation, resumed)
        together.check_equal(run, "at the end of training")
    course.note_data_states(run, train, validation)
    hooks.fire("on_fit_end")
