"""Puts together what a Trainer runs with: loggers, callbacks, dataloaders, the rate plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, List, Optional, Sequence, Union

from oneflow import nn

from ofengine.data import Batches, Limit, stage_loaders
from ofengine.errors import ConfigurationError, DataError, RateError
from ofengine.hooks import Callback, overrides, refuse_eager_only_hooks
from ofengine.loggers import CSVLogger, Logger
from ofengine.modes.graph import has_own_graph
from ofengine.optimizers import Optimization, make_schedule, writes_initial_lr
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group, check_groups
from ofengine.rates.plan import RatePlan
from ofengine.task import TaskModule

if TYPE_CHECKING:
    from ofengine.trainer import Trainer

STEP_OF_STAGE = {
    "train": "training_step",
    "validation": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}
LOADER_OF_STAGE = {
    "train": "train_dataloader",
    "validation": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
LIMIT_OF_STAGE = {
    "train": "limit_train_batches",
    "validation": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
VERB_OF_STAGE = {"train": "fit", "validation": "validate", "test": "test", "predict": "predict"}


def make_loggers(logger: Union[bool, Logger, Sequence[Logger]], root: str) -> List[Logger]:
    """The Trainer's ``logger`` argument as a list."""
    if isinstance(logger, bool):
        return [CSVLogger(root)] if logger else []
    return _as_list("logger", logger, Logger)


def _as_list(argument: str, given: Any, kind: type) -> List[Any]:
    """One object of ``kind``, or a list of them, as a list; None only for no callbacks."""
    if given is None and kind is Callback:
        return []
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    for each in listed:
        if not isinstance(each, kind):
            called = isinstance(each, type) and issubclass(each, kind)
            raise ConfigurationError(
                f"{argument}={given!r}: "
                + (
                    f"call the class first, as in {each.__name__}()."
                    if called
                    else f"give ofengine {kind.__name__} objects, one or a list of them"
                    + (", or True or False." if kind is Logger else ".")
                )
            )
    return listed


def make_callbacks(
    callbacks: Union[Callback, Iterable[Callback], None],
    progress_bar: bool,
    summary: bool,
    checkpointing: bool,
    drop_checkpoints: bool,
) -> List[Callback]:
    """The Trainer's ``callbacks`` argument as a list, and those that are on by default."""
    from ofengine.callbacks import ModelCheckpoint, ModelSummary, ProgressBar

    listed = _as_list("callbacks", callbacks, Callback)
    if drop_checkpoints:
        listed = [each for each in listed if not isinstance(each, ModelCheckpoint)]
    for wanted, add in (
        (ProgressBar, progress_bar),
        (ModelSummary, summary),
        (ModelCheckpoint, checkpointing),
    ):
        if add and not any(isinstance(callback, wanted) for callback in listed):
            listed.append(wanted())
    return listed


def add_rate_callback(callbacks: List[Callback], mode: str) -> None:
    """Each mode has a callback that carries out the rate plan; add it where it is missing."""
    from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

    wanted = GraphLRScaleCallback if mode == "graph" else LRDecayCallback
    if not any(isinstance(callback, wanted) for callback in callbacks):
        callbacks.insert(0, wanted(every_n_batches=None))


def check_graph_mode(trainer: Trainer, task: TaskModule) -> None:
    """Refuse, before training, what graph mode cannot do for this task."""
    refuse_eager_only_hooks(task, trainer.callbacks)
    if has_own_graph(task) and trainer.accumulate_grad_batches > 1:
        raise ConfigurationError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} cannot reach into "
            f"{type(task).__name__}.build_graph(): leave build_graph() as it is, or use "
            "accumulate_grad_batches=1."
        )


def check_step(task: TaskModule, stage: str) -> None:
    """Raise where ``task`` lacks the step that ``stage`` runs."""
    step = STEP_OF_STAGE[stage]
    if overrides(task, step, TaskModule):
        return
    if stage == "predict":
        return
    if stage == "train" and has_own_graph(task):
        return
    getattr(task, step)(None, 0)  # the default raises, and says what to write


def training_batches(
    trainer: Trainer, task: TaskModule, given: Any, limit: Limit, keep: bool
) -> Batches:
    """The training data of ``fit``."""
    source = given if given is not None else task.train_dataloader()
    if source is None:
        raise _no_data(task, "train")
    name = "overfit_batches" if keep else LIMIT_OF_STAGE["train"]
    return Batches(source, limit, trainer.device, "train_dataloader", name, keep, resumable=True)


def evaluation_batches(
    trainer: Trainer, task: TaskModule, stage: str, given: Any, limit: Limit, keep: bool = False
) -> List[Batches]:
    """The data of an evaluation stage; none where the task does not take part in it."""
    step = STEP_OF_STAGE[stage]
    if stage != "predict" and not overrides(task, step, TaskModule):
        if given is not None:
            raise ConfigurationError(
                f"{type(task).__name__} has no {step}, but {stage} data was given: write {step}, "
                "or give no data."
            )
        return []
    loaders = given if given is not None else getattr(task, LOADER_OF_STAGE[stage])()
    if limit is not None and limit == 0:
        return []
    name = "overfit_batches" if keep else LIMIT_OF_STAGE[stage]
    return stage_loaders(loaders, limit, trainer.device, LOADER_OF_STAGE[stage], name, keep)


def require_data(task: TaskModule, stage: str, loaders: List[Batches]) -> None:
    """Raise where a verb was called that has nothing to run over, or nothing to run."""
    if not loaders:
        raise _no_data(task, stage)
    own_step = overrides(task, STEP_OF_STAGE[stage], TaskModule)
    if not own_step and type(task).forward is nn.Module.forward:
        raise ConfigurationError(
            f"{type(task).__name__} has neither predict_step nor forward: write "
            "`def predict_step(self, batch, batch_idx)` that returns the prediction."
        )


def _no_data(task: TaskModule, stage: str) -> DataError:
    return DataError(
        f"{VERB_OF_STAGE[stage]} has no data: pass a dataloader as its second argument, or write "
        f"{type(task).__name__}.{LOADER_OF_STAGE[stage]}()."
    )


def configure_optimizers(task: TaskModule) -> Any:
    """What the task's ``configure_optimizers`` returns."""
    try:
        return task.configure_optimizers()
    except ValueError as error:
        if "different warmup configs" in str(error):
            raise RateError(
                "OneFlow's linear warm-up takes groups of equal lr only: use "
                "ofengine.rates.WarmupLR, which takes any, or scale the groups by lr_scale."
            ) from error
        raise


def make_plan(
    task: TaskModule, made: Optimization, batches: Optional[int], accumulate: int
) -> RatePlan:
    """Check the parameter groups and plan their rates."""
    scheduled = writes_initial_lr(made.scheduler)
    groups = check_groups(task, made.optimizer, scheduled)
    if not any(group.tensors for group in groups):
        raise RateError(f"{type(task).__name__} has no trainable parameter in any group.")
    return _plan(made, groups, batches, accumulate)


def plan_anew(trainer: Trainer) -> RatePlan:
    """Another plan for the run of ``trainer``, at its beginning."""
    plan = _plan(
        trainer.made,
        trainer.rates.groups,
        trainer.num_training_batches,
        trainer.accumulate_grad_batches,
    )
    plan.stop = trainer.total_steps
    return plan


def _plan(
    made: Optimization, groups: Sequence[Group], batches: Optional[int], accumulate: int
) -> RatePlan:
    schedule = make_schedule(made, [group.name for group in groups], [group.lr for group in groups])
    return RatePlan(groups, Calendar(batches, accumulate), schedule, made.interval, made.frequency)
