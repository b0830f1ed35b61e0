"""Callback, the hooks in the order they fire, and what calls them.

One ``fit`` fires them in this order (tested by equality in ``tests/test_hooks.py``)::

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

import difflib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Sequence, Tuple

from ofengine.errors import ConfigurationError, warn

if TYPE_CHECKING:
    from oneflow import nn
    from oneflow.optim import Optimizer

    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer


class Callback:
    """A unit of behaviour that a Trainer runs at its hooks. Override the hooks you need.

    Every hook takes the trainer and the task first; the same hooks exist on
    :class:`~ofengine.TaskModule` without those two. A hook's return value is ignored.
    """

    fires_last: bool = False
    """True puts this callback behind all others and the task (checkpointing callbacks)."""

    @property
    def idle_hooks(self) -> Sequence[str]:
        """Names of hooks that this object overrides, but has nothing to do at in a run to come.

        They are not called, and so cost nothing. Looked at when a run begins, and for the hooks
        around a training batch at the beginning of each epoch. Default: none.
        """
        return ()

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint keeps of this callback, for :meth:`load_state_dict`.

        A dict of None, booleans, numbers, texts, OneFlow tensors and numpy arrays, and of lists,
        tuples and dicts (with texts as keys) of these. Default: empty.
        """
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, where a run is resumed.

        Called after ``setup`` and before ``on_fit_start``, where the checkpoint has a state of a
        callback of this class. Tensors and arrays come back as numpy arrays, tuples as lists.
        """

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """First of all. ``stage`` is "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Last of all, after an exception too: close files, restore what was changed."""

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """An exception, Ctrl-C (``KeyboardInterrupt``) or SIGTERM (``SystemExit(143)``)."""

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """The model is on the device, the optimizer exists, the groups are checked."""

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Training and its last validation are over."""

    def on_sanity_check_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Before the few validation batches that are tried ahead of training."""

    def on_sanity_check_end(self, trainer: Trainer, task: TaskModule) -> None:
        """After them."""

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Before the first batch of an epoch; ``trainer.current_epoch`` tells which."""

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """After the last batch of an epoch and the validation that belongs to it."""

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Before a training batch, which is on the device already."""

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a training batch. ``outputs`` is a dict with "loss" (a tensor, not read yet)."""

    def on_before_backward(self, trainer: Trainer, task: TaskModule, loss: Any) -> None:
        """Eager mode only. The loss is there, its gradient is not."""

    def on_after_backward(self, trainer: Trainer, task: TaskModule) -> None:
        """Eager mode only. The gradients of this batch were added to ``.grad``, unclipped."""

    def on_before_optimizer_step(
        self, trainer: Trainer, task: TaskModule, optimizer: Optimizer
    ) -> None:
        """Eager mode only. The gradients are complete, and not clipped yet."""

    def on_before_zero_grad(self, trainer: Trainer, task: TaskModule, optimizer: Optimizer) -> None:
        """Eager mode only. The update is done, the gradients are still there."""

    def on_before_graph_compile(self, trainer: Trainer, task: TaskModule, graph: nn.Graph) -> None:
        """Graph mode only. ``graph`` updates the weights and is about to be compiled."""

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """The task is in eval mode."""

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Validation is over and its metrics are in ``trainer.callback_metrics``."""

    def on_validation_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """After the last validation batch; the task may still ``log`` here."""

    def on_validation_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """After a validation batch. ``outputs`` is what ``validation_step`` returned."""

    def on_test_start(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_start``."""

    def on_test_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_end``."""

    def on_test_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_epoch_start``."""

    def on_test_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_epoch_end``."""

    def on_test_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """As ``on_validation_batch_start``."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """As ``on_validation_batch_end``."""

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_start``."""

    def on_predict_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_end``."""

    def on_predict_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_epoch_start``."""

    def on_predict_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As ``on_validation_epoch_end``."""

    def on_predict_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """As ``on_validation_batch_start``."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
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


class HookRunner:
    """For every hook the bound functions that override it: a hook of nobody costs nothing."""

    def __init__(self, trainer: Trainer, task: TaskModule, callbacks: Sequence[Callback]) -> None:
        self._trainer, self._task = trainer, task
        self._first = [callback for callback in callbacks if not callback.fires_last]
        self._last = [callback for callback in callbacks if callback.fires_last]
        self.calls: Dict[str, List[Callable[..., None]]] = {}
        self.look_again(*HOOKS)

    def look_again(self, *hooks: str) -> None:
        """Find the overrides of ``hooks`` anew: what was idle may have something to do now."""
        from ofengine.task import TaskModule

        for hook in hooks:
            own = [getattr(self._task, hook)] if overrides(self._task, hook, TaskModule) else []
            before, after = (
                [
                    partial(getattr(callback, hook), self._trainer, self._task)
                    for callback in group
                    if overrides(callback, hook, Callback) and hook not in callback.idle_hooks
                ]
                for group in (self._first, self._last)
            )
            self.calls[hook] = [*before, *own, *after]

    def fire(self, hook: str, *args: Any) -> None:
        """Call every override of ``hook``, in order."""
        for call in self.calls[hook]:
            call(*args)


def warn_of_misspelt_methods(task: TaskModule, callbacks: Iterable[Callback]) -> None:
    """Warn of methods with almost the name of one that the engine calls, which it would not."""
    from ofengine.task import TaskModule

    for owner in (*callbacks, task):
        for name in dir(type(owner)):
            if name.startswith("on_") and name not in HOOKS:
                close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
                if close:
                    warn(
                        f"{type(owner).__name__}.{name} is no hook, so nothing calls it: did you "
                        f"mean {close[0]}?"
                    )
    cls = type(task)
    for name in sorted(set(dir(cls)).difference(dir(TaskModule))):
        if name.startswith(("_", "on_")) or not _is_method(inspect.getattr_static(cls, name, None)):
            continue
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.9)
        if close and not overrides(task, close[0], TaskModule):
            own_groups = overrides(task, "configure_optimizers", TaskModule)
            if close[0] != "param_groups" or not own_groups:  # it may call a helper of this name
                warn(
                    f"{cls.__name__}.{name} is not what the engine calls: did you mean {close[0]}?"
                )


def _is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod))


def refuse_eager_only_hooks(task: TaskModule, callbacks: Iterable[Callback]) -> None:
    """Raise where somebody overrides a hook that graph mode cannot fire."""
    from ofengine.task import TaskModule

    owners: List[Tuple[object, type]] = [(callback, Callback) for callback in callbacks]
    owners.append((task, TaskModule))
    for owner, base in owners:
        for hook in EAGER_ONLY_HOOKS:
            if overrides(owner, hook, base):
                function = getattr(owner, hook)
                code = getattr(function, "__code__", None)
                where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
                raise ConfigurationError(
                    f"{type(owner).__name__}.{hook}{where} cannot fire in graph mode: the whole "
                    "step, backward and update included, is one compiled graph. Use "
                    'on_train_batch_start or on_train_batch_end, or Trainer(mode="eager").'
                )
