"""Who is called when: the overrides of each hook, found once; names that nobody would call."""

from __future__ import annotations

import difflib
import inspect
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ofengine.callback import EAGER_ONLY_HOOKS, HOOKS, METHODS, Callback, overrides, ships
from ofengine.data_module import DATA_MODULE_HOOKS, DataModule
from ofengine.errors import ConfigurationError, warn
from ofengine.run.arguments import check_takes
from ofengine.run.lightning import HOOKS as HOOKS_OF_LIGHTNING, TASK_ATTRIBUTES
from ofengine.run.profile import Profile
from ofengine.run.telling import HOOK_AT, Telling
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_OF_UPDATES = ("on_before_optimizer_step", "on_before_zero_grad", "on_after_optimizer_step")


def only_looks(call: Callable[..., Any]) -> bool:
    """True for a hook of ofengine's own callbacks, which change nothing that they are given."""
    return ships(getattr(getattr(call, "func", call), "__self__", None))


class HookRunner:
    """For every hook the bound functions that override it: a hook of nobody costs nothing."""

    def __init__(
        self,
        trainer: RunView,
        task: TaskModule,
        callbacks: Sequence[Callback],
        telling: Telling,
    ) -> None:
        self._trainer, self._task, self._telling = trainer, task, telling
        self._first = [callback for callback in callbacks if not callback.fires_last]
        self._last = [callback for callback in callbacks if callback.fires_last]
        self.profile: Optional[Profile] = None
        self.calls: Dict[str, List[Callable[..., Any]]] = {}
        self.look_again(*HOOKS)

    def look_again(self, *hooks: str) -> None:
        """Find the overrides of ``hooks`` anew: what was idle may have something to do now."""
        for hook in hooks:
            own = [self._task] if overrides(self._task, hook, TaskModule) else []
            before, after = (
                [
                    callback
                    for callback in group
                    if overrides(callback, hook, Callback) and hook not in callback.idle_hooks
                ]
                for group in (self._first, self._last)
            )
            owners = self._telling.owners[hook] = [*before, *own, *after]
            self.calls[hook] = [self._call_of(each, hook) for each in owners]
            if self.profile is not None:
                self.calls[hook] = [_timed(self.profile, hook, c) for c in self.calls[hook]]
            if hook in _OF_UPDATES:
                self.calls[hook] = list(map(self._trainer.metrics.around_update, self.calls[hook]))

    def _call_of(self, owner: Any, hook: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(owner, hook)
        return method if owner is self._task else partial(method, self._trainer, self._task)

    def fire(self, hook: str, *args: Any) -> None:
        """Call every override of ``hook``, in order."""
        self._telling.left = iter(self.calls[hook])
        for call in self._telling.left:
            call(*args)

    def catch_up(self) -> None:
        """Tell those who had not been told of this moment when it was saved, in order."""
        telling, progress = self._telling, self._trainer.progress
        owed, telling.owed = telling.owed, []
        hook = HOOK_AT.get(progress.point)
        if hook is None or not owed:
            return
        ids = set(map(id, owed))
        owners, calls = telling.owners[hook], self.calls[hook]
        telling.owners[hook] = [each for each in owners if id(each) in ids]
        # Of a batch those alone are owed it who look at the run, and not at what they are given.
        at_batch = hook == "on_train_batch_end"
        args: Tuple[Any, ...] = ({}, None, progress.batch_idx) if at_batch else ()
        telling.left = iter([call for each, call in zip(owners, calls) if id(each) in ids])
        for call in telling.left:
            call(*args)
        telling.owners[hook] = owners


def _timed(profile: Profile, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
    method: Any = call.func if isinstance(call, partial) else call
    return profile.wrap(f"hook: {type(method.__self__).__name__}.{hook}", call)


def warn_of_misspelt_methods(task: TaskModule, callbacks: Iterable[Callback]) -> None:
    """Warn of methods with almost the name of one that the engine calls, which it would not."""
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


_CALLED: Mapping[type, Sequence[str]] = {
    TaskModule: (*HOOKS, "prepare_data", "on_save_checkpoint", "on_load_checkpoint"),
    Callback: (*HOOKS, "state_dict", "check_state_dict", "load_state_dict"),
    DataModule: ("prepare_data", "setup", "teardown"),
}
"""What the engine calls, by position, of each kind of thing that users write."""


def refuse_other_arguments(owners: Iterable[object]) -> None:
    """Raise :class:`ConfigurationError` for a hook that takes other arguments than it is given."""
    for owner in owners:
        for base, names in _CALLED.items():
            for name in names if isinstance(owner, base) else ():
                if overrides(owner, name, base):
                    _, *given = inspect.signature(getattr(base, name)).parameters
                    check_takes(owner, name, *given)


def refuse_eager_only_hooks(task: TaskModule, callbacks: Iterable[Callback]) -> None:
    """Raise where somebody overrides a hook that graph mode cannot fire."""
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


_TURNED_OFF = ("automatic_optimization", "strict_loading")
"""Attributes of a task that ask for something by being False."""


def tell_of_lightning_s_names(
    task: TaskModule, callbacks: Iterable[Callback], datamodule: Optional[DataModule] = None
) -> None:
    """Warn of hooks that Lightning would call and nothing here does; refuse what turns things off.

    Raises :class:`ConfigurationError` where the task sets ``automatic_optimization = False`` or
    the like.
    """
    owners: List[Tuple[object, type]] = [(each, Callback) for each in callbacks]
    owners.append((task, TaskModule))
    for owner, base in owners:
        _tell_of_methods(owner, base, HOOKS_OF_LIGHTNING)
    if datamodule is not None:
        _tell_of_methods(datamodule, DataModule, DATA_MODULE_HOOKS)
    for name in _TURNED_OFF:
        if name in vars(task) or hasattr(type(task), name):
            value = getattr(task, name)
            if value is False or isinstance(inspect.getattr_static(type(task), name, 0), property):
                raise ConfigurationError(
                    f"{type(task).__name__}.{name} is Lightning's name: {TASK_ATTRIBUTES[name]}."
                )


def _tell_of_methods(owner: object, base: type, table: Mapping[str, str]) -> None:
    """Warn of methods of ``owner`` in a ``table`` of Lightning's, which ``base`` has not."""
    for name, mend in table.items():
        own = inspect.getattr_static(type(owner), name, None)
        if _is_method(own) and not hasattr(base, name):
            warn(
                f"{type(owner).__name__}.{name} is a hook of Lightning's that nothing here calls: "
                f"{mend}."
            )
