"""What a verb runs with: is the step there, which data, what can the mode not do."""

from __future__ import annotations

import contextlib
from typing import Any, Iterable, Iterator, List, Tuple

import attrs
from oneflow import nn

from ofengine.callback import overrides
from ofengine.data.batches import Batches
from ofengine.data.sources import describe_once, is_used_up
from ofengine.data.stages import stage_loaders
from ofengine.data.structure import describe
from ofengine.data_module import DataModule
from ofengine.errors import ConfigurationError, DataError
from ofengine.modes.own_graphs import has_own_graph
from ofengine.rates.plan import DecayEvents
from ofengine.run.arguments import Limit, batches_between_validations, check_takes
from ofengine.run.hooks import refuse_eager_only_hooks, refuse_other_arguments
from ofengine.run.precision import FULL
from ofengine.run.profiling import watch_data
from ofengine.run.settings import LIMIT_OF_STAGE, Settings
from ofengine.run.state import Run
from ofengine.run.view import RunView
from ofengine.run.windows import Windows
from ofengine.task import TaskModule

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
VERB_OF_STAGE = {"train": "fit", "validation": "validate", "test": "test", "predict": "predict"}


def check_graph_mode(run: Run) -> None:
    """Refuse, before training, what graph mode cannot do for this task."""
    task, accumulate = run.task, run.settings.accumulate_grad_batches
    refuse_eager_only_hooks(task, run.callbacks)
    if has_own_graph(task) and run.settings.accumulates:
        raise ConfigurationError(
            f"accumulate_grad_batches={accumulate} cannot reach into "
            f"{type(task).__name__}.build_graph(): leave build_graph() as it is, or use "
            "accumulate_grad_batches=1."
        )
    if has_own_graph(task) and run.settings.precision != FULL:
        raise ConfigurationError(
            f'precision="{run.settings.precision}" cannot reach into '
            f"{type(task).__name__}.build_graph(): leave build_graph() as it is, or leave "
            "precision out and call config.enable_amp() and set_grad_scaler() in its __init__."
        )


def attach(run: Run, trainer: RunView, task: Any) -> None:
    """Let ``task`` be that of ``run``, which ``trainer`` shows to it."""
    check_task(task)
    if task is not run.task:
        run.weights_left = {}
    run.task, task._trainer = task, trainer
    run.metrics.attach(task, run.callbacks)
    run.metrics.forget()


def check_task(task: Any) -> None:
    """Raise where ``task`` is no task, or not a whole one."""
    if not isinstance(task, TaskModule):
        mend = "give an object of a TaskModule subclass"
        if isinstance(task, type) and issubclass(task, TaskModule):
            mend = f"call it first, as in {task.__name__}()"
        raise ConfigurationError(f"the first argument is {describe(task)}: {mend}.")
    if "_modules" not in vars(task):
        raise ConfigurationError(
            f"{type(task).__name__}.__init__ must call super().__init__() first."
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


def take_datamodule(run: Run, trainer: Any, verb: str, datamodule: Any, *data: Any) -> Any:
    """Note the ``datamodule`` of a verb, which may be given in the place of its data; that data.

    Raises :class:`ConfigurationError` for something else, and where both are given.
    """
    first = data[0]
    if isinstance(first, DataModule) and datamodule is None:
        first, datamodule = None, first
    if datamodule is not None:
        if not isinstance(datamodule, DataModule):
            mend = "give an object of an ofengine.DataModule subclass"
            if isinstance(datamodule, type) and issubclass(datamodule, DataModule):
                mend = f"call it first, as in {datamodule.__name__}()"
            raise ConfigurationError(f"{verb}: datamodule is {describe(datamodule)}: {mend}.")
        if any(each is not None for each in (first, *data[1:])):
            raise ConfigurationError(
                f"{verb} was given dataloaders and a datamodule: give one of them."
            )
        datamodule.trainer = trainer
    run.datamodule = datamodule
    return first


def own_data(run: Run, stage: str) -> Any:
    """What the DataModule has for ``stage``, or else the task."""
    name, own = LOADER_OF_STAGE[stage], run.datamodule
    owner = run.task if own is None or not overrides(own, name, DataModule) else own
    check_takes(owner, name)
    return getattr(owner, name)()


@contextlib.contextmanager
def training_source(trainer: Any, given: Any) -> Iterator[Any]:
    """What ``fit`` would train on, where only that is asked for; a DataModule is set up for it."""
    if not isinstance(given, DataModule):
        yield given
        return
    given.trainer = trainer
    refuse_other_arguments([given])
    given.prepare_data()
    given.setup("fit")
    try:
        check_takes(given, "train_dataloader")
        yield given.train_dataloader()
    finally:
        given.teardown("fit")


def training_batches(run: Run, train: Any) -> Batches:
    """The training data of ``fit``."""
    settings = run.settings
    source = train if train is not None else own_data(run, "train")
    if source is None:
        raise _no_data(run, "train")
    keep = settings.overfit_batches is not None
    limit = settings.overfit_batches if keep else settings.limit("train")
    name = "overfit_batches" if keep else LIMIT_OF_STAGE["train"]
    given = (source, limit, settings.device, "train_dataloader", name, keep)
    return Batches(*given, resumable=True, share=settings.share)


def evaluation_batches(run: Run, stage: str, data: Any, in_fit: bool = False) -> List[Batches]:
    """The data of an evaluation stage; none where the task does not take part in it."""
    settings, task = run.settings, run.task
    step = STEP_OF_STAGE[stage]
    if stage != "predict" and not overrides(task, step, TaskModule):
        if data is not None:
            raise ConfigurationError(
                f"{type(task).__name__} has no {step}, but {stage} data was given: write {step}, "
                "or give no data."
            )
        return []
    loaders = data if data is not None else own_data(run, stage)
    keep = in_fit and settings.overfit_batches is not None
    limit: Limit = settings.overfit_batches if keep else settings.limit(stage)
    if limit is not None and limit == 0:
        return []
    name = "overfit_batches" if keep else LIMIT_OF_STAGE[stage]
    given = (loaders, limit, settings.device, LOADER_OF_STAGE[stage], name, keep)
    return stage_loaders(*given, settings.share)


def decay_events(settings: Settings, callbacks: Iterable[Any]) -> List[Tuple[str, DecayEvents]]:
    """When decay happens, by the callbacks that say so; counted in batches of all ranks."""
    said = [(type(each).__name__, each.decay_events) for each in callbacks]
    ranks = settings.world_size
    return [
        (name, attrs.evolve(events, every_n_batches=events.every_n_batches * ranks))
        for name, events in said
        if events is not None
    ]


def take_data(run: Run, train: Any, validation: Any) -> Tuple[Batches, List[Batches]]:
    """The data of ``fit``, noted in ``run``."""
    settings = run.settings
    run.train = taken = training_batches(run, train)
    run.validation = evaluation_batches(run, "validation", validation, in_fit=True)
    run.has_validation = bool(run.validation)
    run.batches_per_epoch, run.epoch_length = taken.rounds, taken.count
    run.batches_between_validations = batches_between_validations(
        settings.val_check_interval, taken.rounds or None
    )
    for each in run.validation:
        _check_lasts(run, each)
    watch_data(run, [taken, *run.validation])
    return taken, run.validation


def _check_lasts(run: Run, validation: Batches) -> None:
    """Refuse a generator that the first validation will use up where others will follow."""
    if not validation.once:
        return
    if run.train is not None and run.train.source is validation.source:
        raise DataError(
            f"{validation.what} is the very iterator that train_dataloader is, and each would take "
            "batches from the other: give each its own."
        )
    if validation.count is None and is_used_up(validation.source) and _validations(run) > 1:
        raise DataError(
            f"{validation.what} cannot be validated on {_validations(run)} times: "
            f"{describe_once(validation.source)}."
        )


def _validations(run: Run) -> int:
    """The validations that are certain to come, unless something ends training early."""
    settings, batches = run.settings, run.batches_per_epoch
    epochs = settings.max_epochs
    if settings.max_steps != -1:
        if not batches:
            return 0
        whole, _ = Windows.of(settings.accumulate_grad_batches).locate(settings.max_steps, batches)
        epochs = whole if epochs == -1 else min(whole, epochs)
    begun = 0 if run.moments_resumed is None else run.moments_resumed["loop"]["epoch"]
    due = epochs // settings.check_val_every_n_epoch - begun // settings.check_val_every_n_epoch
    between = run.batches_between_validations
    if between is None or batches is None:
        return max(due, 0)
    return max(due, 0) * (batches // between)


def require_data(run: Run, stage: str, loaders: List[Batches]) -> None:
    """Raise where a verb was called that has nothing to run over, or nothing to run."""
    task = run.task
    if not loaders:
        raise _no_data(run, stage)
    own_step = overrides(task, STEP_OF_STAGE[stage], TaskModule)
    if not own_step and type(task).forward is nn.Module.forward:
        raise ConfigurationError(
            f"{type(task).__name__} has neither predict_step nor forward: write "
            "`def predict_step(self, batch, batch_idx)` that returns the prediction."
        )


def _no_data(run: Run, stage: str) -> DataError:
    owner, instead = run.task, "pass a dataloader as its second argument, or "
    if run.datamodule is not None:
        owner, instead = run.datamodule, ""
    return DataError(
        f"{VERB_OF_STAGE[stage]} has no data: {instead}write "
        f"{type(owner).__name__}.{LOADER_OF_STAGE[stage]}()."
    )
