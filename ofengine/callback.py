"""Callback, and the hooks in the order they fire.

One ``fit`` fires them in this order (tested by equality in ``tests/run/test_hooks.py``)::

    setup(stage)
    on_fit_start
        on_sanity_check_start        # validation hooks, a few batches ... on_sanity_check_end
        on_train_start
        for each epoch:
            on_train_epoch_start
            for each batch:
                on_train_batch_start
                    (eager only)     on_before_backward -> on_after_backward
                    (eager only, at the end of an accumulation window)
                                     on_before_optimizer_step -> update -> on_before_zero_grad
                on_after_optimizer_step   # after an update
                on_train_batch_end
                on_validation_start, on_validation_epoch_start,
                    on_validation_batch_start / on_validation_batch_end for each batch,
                    on_validation_epoch_end, on_validation_end     # where validation is due
            on_train_epoch_end
        on_train_end
    on_fit_end
    teardown(stage)

``validate``, ``test`` and ``predict`` fire ``setup``, the hooks of their own stage
(``on_test_start`` ...), and ``teardown``. ``on_before_graph_compile`` fires in graph mode
before each compilation.

Within one hook, callbacks fire in the order in which they are listed, then the task, then
the callbacks with ``fires_last = True``, the checkpointing ones.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence, Tuple

from ofengine import constructors
from ofengine.rates.plan import DecayEvents
from ofengine.run.view import RunView
from ofengine.task import TaskModule

if TYPE_CHECKING:
    from oneflow import nn
    from oneflow.optim import Optimizer


class Callback:
    """A unit of behaviour that a Trainer runs at its hooks. Override the hooks you need.

    Every hook takes the trainer and the task first; the same hooks exist on
    :class:`~ofengine.TaskModule` without those two. A hook's return value is ignored,
    but for -1 of ``on_train_batch_start``.

    The arguments of hooks are: ``trainer``, which tells all of the run
    (:class:`~ofengine.run.view.RunView`); ``task``, the task; ``stage``, "fit", "validate",
    "test" or "predict"; ``batch``, as the dataloader gave it, on the device; ``batch_idx``, its
    number in the epoch, from 0; ``dataloader_idx``, the number of its dataloader, from 0;
    ``outputs``, what the step returned; ``loss``, a tensor; ``optimizer``, OneFlow's;
    ``graph``, an ``nn.Graph``; ``exception``, which ends the run.
    """

    fires_last: bool = False
    """True puts this callback behind all others and the task (checkpointing callbacks)."""

    watches_losses: bool = False
    """True where it says itself what happens to a loss that is not finite: the engine then neither
    warns of one nor ends a ``fit`` for it."""

    rank_zero_only: bool = False
    """True for what writes files or prints: of several ranks, its hooks fire on rank 0 alone."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Of ofengine's own ones, an argument that they have not is told."""
        super().__init_subclass__(**options)
        if constructors.ships(cls):
            constructors.tells_unknown_arguments(cls)

    @property
    def idle_hooks(self) -> Sequence[str]:
        """Names of hooks that this object overrides, but has nothing to do at in a run to come.

        They are not called, and so cost nothing. Looked at when a run begins, and for the hooks
        around a training batch at the beginning of each epoch. Default: none.
        """
        return ()

    @property
    def decay_events(self) -> Optional[DecayEvents]:
        """When the rates decay, where this callback says so; asked before the rates are planned."""
        return None

    @property
    def state_key(self) -> str:
        """What tells this callback's state in a checkpoint from those of others.

        A resumed run gives a state to the callback with the same key, wherever it is listed; of
        several with one key, to the one with the same arguments. Default: the class, with
        ``monitor`` and ``mode`` where the callback goes by a metric. Override it where two of
        your class must not be taken for each other.
        """
        kept = vars(self)
        monitor, mode = kept.get("monitor"), kept.get("mode")
        by_metric = f"(monitor={monitor!r}, mode={mode!r})" if isinstance(monitor, str) else ""
        return f"{type(self).__qualname__}{by_metric}"

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint keeps of this callback, for :meth:`load_state_dict`.

        A dict of None, booleans, numbers, texts, OneFlow tensors and numpy arrays, and of lists,
        tuples and dicts (with texts as keys) of these. Default: empty.
        """
        return {}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise where :meth:`load_state_dict` cannot take ``state`` for ``task``; change nothing.

        Called before anything of a checkpoint is taken up. ``state`` comes from a file, which may
        hold anything. Default: content with all.
        """

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, where a run is resumed.

        Called after ``setup`` and before ``on_fit_start``, where the checkpoint has a state of
        this callback's :attr:`state_key`. Tensors and arrays come back as numpy arrays, tuples as
        lists. Where it raises, nothing of the checkpoint is taken up: the weights, the optimizer
        and the attributes of all callbacks are as they were before.
        """

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """First of all. ``stage`` is "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Last of all, after an exception too: close files, restore what was changed."""

    def on_exception(self, trainer: RunView, task: TaskModule, exception: BaseException) -> None:
        """An exception, Ctrl-C (``KeyboardInterrupt``) or SIGTERM (``SystemExit(143)``)."""

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """The model is on the device, the optimizer exists, the groups are checked."""

    def on_fit_end(self, trainer: RunView, task: TaskModule) -> None:
        """Training and its last validation are over."""

    def on_sanity_check_start(self, trainer: RunView, task: TaskModule) -> None:
        """Before the few validation batches that are tried ahead of training."""

    def on_sanity_check_end(self, trainer: RunView, task: TaskModule) -> None:
        """After them."""

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Before the first batch of an epoch; ``trainer.current_epoch`` tells which."""

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """After the last batch of an epoch and the validation that belongs to it."""

    def on_train_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Before a training batch, which is on the device already.

        Where it returns -1 the epoch ends here, before this batch.
        """

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a training batch. ``outputs`` is a dict with "loss" (a tensor, not read yet)."""

    def on_after_optimizer_step(self, trainer: RunView, task: TaskModule) -> None:
        """After each update, in both modes; ``trainer.global_step`` counts it already."""

    def on_before_backward(self, trainer: RunView, task: TaskModule, loss: Any) -> None:
        """Eager mode only. The loss is there, its gradient is not."""

    def on_after_backward(self, trainer: RunView, task: TaskModule) -> None:
        """Eager mode only. The gradients of this batch were added to ``.grad``, unclipped."""

    def on_before_optimizer_step(
        self, trainer: RunView, task: TaskModule, optimizer: Optimizer
    ) -> None:
        """Eager mode only. The gradients are complete, and not clipped yet."""

    def on_before_zero_grad(self, trainer: RunView, task: TaskModule, optimizer: Optimizer) -> None:
        """Eager mode only. The update is done, the gradients are still there."""

    def on_before_graph_compile(self, trainer: RunView, task: TaskModule, graph: nn.Graph) -> None:
        """Graph mode only. ``graph`` updates the weights and is about to be compiled.

        Where weight decay or momentum are by schedule, it ends with the gradients.
        """

    def on_validation_start(self, trainer: RunView, task: TaskModule) -> None:
        """The task is in eval mode."""

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Validation is over and its metrics are in ``trainer.callback_metrics``."""

    def on_validation_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """After the last validation batch; the task may still ``log`` here."""

    def on_validation_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(
        self,
        trainer: RunView,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """After a validation batch. ``outputs`` is what ``validation_step`` returned."""

    def on_test_start(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_start``."""

    def on_test_end(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_end``."""

    def on_test_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_epoch_start``."""

    def on_test_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_epoch_end``."""

    def on_test_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """As ``on_validation_batch_start``."""

    def on_test_batch_end(
        self,
        trainer: RunView,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """As ``on_validation_batch_end``."""

    def on_predict_start(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_start``."""

    def on_predict_end(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_end``."""

    def on_predict_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_epoch_start``."""

    def on_predict_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """As ``on_validation_epoch_end``."""

    def on_predict_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """As ``on_validation_batch_start``."""

    def on_predict_batch_end(
        self,
        trainer: RunView,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """As ``on_validation_batch_end``."""


HOOKS: Tuple[str, ...] = tuple(
    name
    for name, value in vars(Callback).items()
    if inspect.isfunction(value) and not name.endswith("state_dict")
)
"""The names of all hooks."""

METHODS: Tuple[str, ...] = (
    *("training_step", "validation_step", "test_step", "predict_step"),
    *("param_groups", "configure_optimizers", "configure_graph"),
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
)
"""The methods of a task, besides the hooks, whose names are not likely to be taken otherwise."""

EAGER_ONLY_HOOKS: Tuple[str, ...] = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)
"""The hooks that lie inside a compiled step, where nothing can be called."""


def overrides(owner: object, hook: str, base: type) -> bool:
    """True where ``owner``'s class (or ``owner`` itself) overrides ``base``'s hook."""
    own = getattr(owner, hook, None)
    return getattr(own, "__func__", own) is not getattr(base, hook)


def ships(owner: Any) -> bool:
    """True for what is of a class of ofengine's own, and of nobody's subclass."""
    return constructors.ships(type(owner))
