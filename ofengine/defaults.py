"""The loggers and callbacks of a Trainer: those it was given, and those that are on by default."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any, ContextManager, Iterable, List, Optional, Sequence, Union

from ofengine.callback import Callback
from ofengine.callbacks import (
    EarlyStopping,
    GraphLRScaleCallback,
    LRDecayCallback,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)
from ofengine.errors import ConfigurationError, OFEngineWarning
from ofengine.loggers import CSVLogger, Logger
from ofengine.loggers._folder import share_folders
from ofengine.loggers.checks import check_logger
from ofengine.loggers.silent import SilentLogger
from ofengine.ranks.zero import is_rank_zero
from ofengine.run.arguments import check_takes
from ofengine.run.settings import Settings
from ofengine.run.undone import leaving_no_trace
from ofengine.run.view import RunView, Step

log = logging.getLogger("ofengine")


def make_loggers(logger: Union[bool, Logger, Sequence[Logger]], settings: Settings) -> List[Logger]:
    """The Trainer's ``logger`` argument as a list; none in a ``fast_dev_run``."""
    if settings.fast_dev_run:
        return []
    if isinstance(logger, bool):
        logger = [CSVLogger(settings.default_root_dir)] if logger else []
    loggers: List[Logger] = _as_list("logger", logger, Logger)
    for each in loggers:
        check_logger(each)
    if not is_rank_zero():
        return [SilentLogger(each) for each in loggers]
    share_folders(loggers)
    return loggers


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
    callbacks: Union[Callback, Iterable[Callback], None], settings: Settings
) -> List[Callback]:
    """The Trainer's ``callbacks`` argument as a list, and those that are on by default."""
    listed = _as_list("callbacks", callbacks, Callback)
    if settings.fast_dev_run:
        listed = [each for each in listed if not isinstance(each, ModelCheckpoint)]
    for wanted, add in (
        (ProgressBar, settings.enable_progress_bar),
        (ModelSummary, settings.enable_model_summary),
        (ModelCheckpoint, settings.enable_checkpointing),
    ):
        if add and not any(isinstance(callback, wanted) for callback in listed):
            listed.append(wanted())
    return listed


def add_task_callbacks(callbacks: List[Callback], task: Any) -> None:
    """Put those of ``configure_callbacks`` behind ``callbacks``, in the place of their classes."""
    check_takes(task, "configure_callbacks")
    brought = _as_list("configure_callbacks()", task.configure_callbacks(), Callback)
    kinds = {type(each) for each in brought}
    callbacks[:] = [*(each for each in callbacks if type(each) not in kinds), *brought]


def add_rate_callback(callbacks: List[Callback], mode: str) -> None:
    """Each mode has a callback that carries out the rate plan; add it where it is missing."""
    wanted = GraphLRScaleCallback if mode == "graph" else LRDecayCallback
    if not any(isinstance(callback, wanted) for callback in callbacks):
        callbacks.insert(0, wanted(every_n_batches=None))


def configure_logging() -> None:
    """Show the engine's messages, unless the user has set up logging; those of rank 0 alone."""
    if not is_rank_zero():
        log.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=OFEngineWarning)
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)


class KnowsCallbacks(RunView):
    """A run that finds the callbacks of a kind, under Lightning's names, and serves them."""

    def leaving_no_trace(self) -> ContextManager[Step]:
        """See :meth:`RunView.leaving_no_trace`."""
        return leaving_no_trace(self._run)

    @property
    def checkpoint_callbacks(self) -> List[Callback]:
        """All ``ModelCheckpoint`` callbacks; ``checkpoint_callback`` is the first, or None."""
        return [each for each in self.callbacks if isinstance(each, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> Optional[Callback]:
        """See :attr:`checkpoint_callbacks`."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> List[Callback]:
        """All ``EarlyStopping`` callbacks; ``early_stopping_callback`` is the first, or None."""
        return [each for each in self.callbacks if isinstance(each, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Optional[Callback]:
        """See :attr:`early_stopping_callbacks`."""
        return next(iter(self.early_stopping_callbacks), None)
