"""What ``Trainer(profiler="simple")`` times, and how: put in place before a verb, taken away after.

Data, transfer, step, hooks by whose they are, logging, checkpoints, waiting for the device.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Tuple

from ofengine.data.batches import Batches
from ofengine.run.hooks import HookRunner
from ofengine.run.mode import Mode
from ofengine.run.profile import Profile
from ofengine.run.state import Run
from ofengine.run.view import RunView

log = logging.getLogger("ofengine")

_OF_LOGGERS = ("log_metrics", "log_hyperparams", "save", "save_due", "finalize")
_OF_MODES = (
    ("train_step", "step: training"),
    ("eval_step", "step: evaluation"),
    ("settle", "step: settling"),
)


@contextlib.contextmanager
def profiling(
    trainer: RunView, run: Run, verb: str, hooks: HookRunner, modes: Iterable[Mode]
) -> Iterator[None]:
    """Time what happens within, where that was asked for; then print it and write the trace."""
    if run.settings.profiler is None:
        yield
        return
    profile = run.profile = Profile()
    wrapped: List[Tuple[Any, str]] = []

    def wrap(owner: Any, name: str, what: str) -> None:
        wrapped.append((owner, name))
        setattr(owner, name, profile.wrap(what, getattr(owner, name)))

    for mode in modes:
        for name, what in _OF_MODES:
            wrap(mode, name, what)
    for each in run.loggers:
        for name in _OF_LOGGERS:
            wrap(each, name, f"logging: {type(each).__name__}")
    for name in ("save_checkpoint", "checkpoint_content"):
        wrap(trainer, name, "checkpoint: taking the content")
    wrap(run.metrics, "flush", "waiting: metrics read")
    hooks.profile = profile
    hooks.look_again(*hooks.calls)
    try:
        yield
    finally:
        for owner, name in wrapped:
            vars(owner).pop(name, None)
        profile.finish()
        if trainer.is_global_zero:
            _tell(trainer, profile, verb)


def watch_data(run: Run, batches: Iterable[Batches]) -> None:
    """Time how long the batches take to come, and their way to the device."""
    profile = run.profile
    if profile is None or run.settings.profiler is None:
        return
    for each in batches:
        for name in ("steps", "first"):
            setattr(each, name, _timed(profile, f"data: {each.what}", getattr(each, name)))
        each.transfer = profile.wrap("data: transfer to the device", each.transfer)


def _timed(profile: Profile, name: str, begin: Any) -> Any:
    return lambda *arguments: profile.iterate(name, iter(begin(*arguments)))


def _tell(trainer: RunView, profile: Profile, verb: str) -> None:
    print(profile.text(f"Profile of {verb}"), flush=True)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    try:
        log.info("the trace for chrome://tracing is in %s.", profile.write(folder, verb))
    except OSError as error:
        log.warning("the profile's trace cannot be written to %s: %s.", folder, error)
