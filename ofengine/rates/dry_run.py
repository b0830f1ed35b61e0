"""The rate plan of a run that is not made."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Iterator, Optional, Tuple

from ofengine.connect import configure_optimizers, make_plan
from ofengine.optimizers import Optimization, read_optimizers
from ofengine.rates.plan import RatePlan

if TYPE_CHECKING:
    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer


def plan_run(
    trainer: Trainer, task: TaskModule, batches: Optional[int]
) -> Tuple[Optimization, RatePlan, Optional[int]]:
    """The checked plan of what ``fit`` would do with ``batches`` (or None) in an epoch.

    Returns what ``configure_optimizers`` returned, the plan with the decay of the trainer's
    callbacks, and the optimizer steps of the run (None where that is not known).
    """
    with _attached(trainer, task, batches):
        made = read_optimizers(configure_optimizers(task), type(task).__name__)
        plan = make_plan(task, made, batches, trainer.accumulate_grad_batches)
        _let_callbacks_set_decay(trainer, task, plan)
        return made, plan, trainer.total_steps


@contextlib.contextmanager
def _attached(trainer: Trainer, task: TaskModule, batches: Optional[int]) -> Iterator[None]:
    """Let ``configure_optimizers`` ask the trainer, and leave both as they were."""
    kept, of_task = dict(vars(trainer)), task.__dict__.get("_trainer")
    trainer.num_training_batches = batches
    task._trainer = trainer
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(kept)
        del task._trainer
        if of_task is not None:
            task._trainer = of_task


class _WithPlan:
    """A trainer as callbacks see it in ``on_fit_start``, with another plan."""

    def __init__(self, trainer: Trainer, plan: RatePlan) -> None:
        self._trainer = trainer
        self.rates = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _let_callbacks_set_decay(trainer: Trainer, task: TaskModule, plan: RatePlan) -> None:
    from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

    seen: Any = _WithPlan(trainer, plan)
    for callback in trainer.callbacks:
        if isinstance(callback, (GraphLRScaleCallback, LRDecayCallback)):
            callback.on_fit_start(seen, task)
