"""What all four verbs do around their own part: modes, signals, setup and teardown."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, TypeVar

from ofengine._oneflow.loaders import end_workers, workers_noted
from ofengine.errors import ConfigurationError, GraphModeError
from ofengine.launch import heartbeat
from ofengine.modes.eager import EagerMode
from ofengine.modes.global_graph import GlobalGraphMode
from ofengine.modes.graph import GraphMode
from ofengine.processes.crash_report import CrashReport
from ofengine.processes.interrupts import InterruptGuard
from ofengine.run import together
from ofengine.run.culprit import tell_culprit
from ofengine.run.faster_layers import faster_layers
from ofengine.run.hooks import (
    HookRunner,
    refuse_other_arguments,
    tell_of_lightning_s_names,
    warn_of_misspelt_methods,
)
from ofengine.run.mode import Mode
from ofengine.run.profiling import profiling
from ofengine.run.state import Run
from ofengine.run.view import RunView

log = logging.getLogger("ofengine")

T = TypeVar("T")


_fitting: List[int] = []
"""The thread of each ``fit`` that is running, one within another included."""
_lock = threading.Lock()


@contextlib.contextmanager
def alone_in_training() -> Iterator[None]:
    """In the block, no other thread can begin a ``fit``.

    The random generators of OneFlow, numpy and Python are one for the whole process: of two runs
    each would draw, seed and save the other's numbers.

    Raises :class:`ConfigurationError` where one is running.
    """
    own = threading.get_ident()
    with _lock:
        if any(thread != own for thread in _fitting):
            raise ConfigurationError(
                "fit() is running in another thread, and both would draw from the same random "
                "generators: call one after the other, or each in a process of its own."
            )
        _fitting.append(own)
    try:
        yield
    finally:
        with _lock:
            _fitting.remove(own)


class _Running(NamedTuple):
    trainer: RunView
    task: Any
    verb: str


_running: List[_Running] = []
"""The verbs that are running, of all threads."""


@contextlib.contextmanager
def _noted(trainer: RunView, task: Any, verb: str) -> Iterator[None]:
    own = _Running(trainer, task, verb)
    _running.append(own)
    try:
        yield
    finally:
        _running[:] = [each for each in _running if each is not own]


def refuse_within(trainer: RunView, task: Any, verb: str) -> None:
    """Refuse ``verb`` within one of the same Trainer or task, whose run it would take away.

    The engine's own ``fit`` that tries something, and puts all back, takes nothing of a task away.

    Raises :class:`ConfigurationError`.
    """
    for running in reversed(_running):
        same_trainer = running.trainer is trainer
        if not same_trainer and (trainer._tries_apart or running.task is not task):
            continue
        whose = "this Trainer" if same_trainer else "another Trainer, with the same task,"
        also = "give fit val_dataloaders, " if (running.verb, verb) == ("fit", "validate") else ""
        raise ConfigurationError(
            f"{verb}() was called while {running.verb}() of {whose} is running: call it when "
            f"{running.verb}() is over, {also}or give another Trainer a copy of the task, "
            "copy.deepcopy(task)."
        )


def carry_out(trainer: RunView, run: Run, verb: str, body: Callable[[HookRunner, Mode], T]) -> T:
    """``setup``, ``body``, ``teardown``; ``on_exception`` where something is raised."""
    settings, task = run.settings, run.task
    main = threading.current_thread() is threading.main_thread()
    if settings.mode == "graph" and verb == "fit" and not main:
        raise GraphModeError(
            "OneFlow trains static graphs in the main thread only: call fit() there, or use "
            'Trainer(mode="eager").'
        )
    _look_at_methods(run)
    first = trainer.is_global_zero
    called = [each for each in run.callbacks if first or not each.rank_zero_only]
    hooks = HookRunner(trainer, task, called, run.telling)
    modes: Dict[str, Mode] = {
        name: _mode(name, run, hooks)
        for name in ({settings.mode, settings.eval_mode} if verb == "fit" else {settings.eval_mode})
    }
    if verb == "fit":
        run.mode = modes[settings.mode]
    run.interrupts, run.told_not_finite, status = InterruptGuard(), False, "failed"
    shares, told = run.metrics.running(), profiling(trainer, run, verb, hooks, modes.values())
    noted, beats = _noted(trainer, task, verb), heartbeat.verb
    with CrashReport() as report, workers_noted(), run.interrupts, beats, shares, told, noted:
        place_before, run.place = run.place, report.place
        try:
            _set_up(run, hooks, verb)
            with faster_layers(run):
                result = body(hooks, modes[settings.eval_mode])
            if run.ranks is None:
                run.interrupts.check()  # one may have come in the last hooks
            status = "success"
            return result
        except BaseException as raised:
            error = run.interrupts.reason(raised)
            heartbeat.leaving()
            tell_culprit(error, run.progress)
            _take_note(run, error)
            _tell_of_exception(hooks, error)
            if error is not raised:
                raise error from error.__cause__
            raise
        finally:
            if run.interrupts.received is not None:
                end_workers()
            run.metrics.reset()
            run.train, run.validation, run.sanity_checking = None, [], False
            run.place = place_before
            if verb == "fit":
                modes["fit"] = run.training_mode  # which several optimizers have made another
            for mode in {id(each): each for each in modes.values()}.values():
                mode.close()
            # One that fails must not keep the others from theirs.
            with contextlib.ExitStack() as stack:
                stack.callback(together.end, run)  # comes last: all files are written by then
                for each in _data_of(run):
                    stack.callback(each.teardown, verb)
                for each in reversed(run.loggers):
                    stack.callback(each.finalize, status)
                for call in reversed(hooks.calls["teardown"]):
                    stack.callback(call, verb)


def _look_at_methods(run: Run) -> None:
    warn_of_misspelt_methods(run.task, run.callbacks)
    tell_of_lightning_s_names(run.task, run.callbacks, run.datamodule)
    refuse_other_arguments([*_data_of(run), run.task, *run.callbacks])


def _mode(name: str, run: Run, hooks: HookRunner) -> Mode:
    if name == "eager":
        return EagerMode(run, run.task, hooks.calls)
    if run.ranks is not None:
        return GlobalGraphMode(run, run.task, hooks.calls, run.ranks)
    return GraphMode(run, run.task, hooks.calls)


def _set_up(run: Run, hooks: HookRunner, verb: str) -> None:
    owners = [*_data_of(run), run.task]
    together.once_a_machine(run, [each.prepare_data for each in owners])
    for each in _data_of(run):
        each.setup(verb)
    hooks.fire("setup", verb)


def _data_of(run: Run) -> List[Any]:
    return [] if run.datamodule is None else [run.datamodule]


def _take_note(run: Run, error: BaseException) -> None:
    """Who fails has not done its part; this rank fails alone, and waits for no other.

    A signal, all know of; a callback that raises what stands for one has done its part.
    """
    signalled = isinstance(error, (KeyboardInterrupt, SystemExit))
    run.telling.failed = not signalled
    if run.ranks is not None:
        together_ = signalled and run.ranks.agreed.signal and not run.interrupts.hurried
        run.ranks.over = run.ranks.over or not together_


def _tell_of_exception(hooks: HookRunner, error: BaseException) -> None:
    """Call every ``on_exception``; what one of them raises is logged, for ``error`` came first."""
    for call in hooks.calls["on_exception"]:
        try:
            call(error)
        except Exception as another:
            log.error(
                "on_exception itself raised %s: %s. The first error is the one that is raised.",
                type(another).__name__, another, exc_info=another,
            )  # fmt: skip
