"""`ofengine rates FILE.py:Task`: every group's learning rate over a run, before running it."""

from __future__ import annotations

import argparse
import shutil
import sys

from ofengine.cli.tasks import call, instance_of, load_task, report_errors
from ofengine.errors import ConfigurationError
from ofengine.trainer import Trainer


def rates(arguments: argparse.Namespace) -> int:
    """Print table and picture; return the exit status: 0, or 1 where something was wrong."""
    return report_errors("rates", lambda: _show(arguments))


def _show(arguments: argparse.Namespace) -> int:
    path, cls = load_task(arguments.task)
    task = instance_of(path, cls, arguments.arg)
    epochs, steps = arguments.max_epochs, arguments.max_steps
    trainer = Trainer(
        mode=arguments.mode,
        device="cpu",
        max_epochs=1 if epochs is None and steps is None else epochs,
        max_steps=-1 if steps is None else steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        seen = call(
            path,
            f"{cls.__name__}, asked for its rates,",
            lambda: trainer.preview(task, steps_per_epoch=arguments.steps_per_epoch),
        )
    except ConfigurationError as error:
        if "give steps_per_epoch" in str(error):
            text = str(error).replace("give steps_per_epoch", "add --steps-per-epoch N")
            raise ConfigurationError(text) from error
        raise
    print(seen.table(at=arguments.at))
    print()
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    print(seen.draw(width=max(width, 40), plain=not _can_print("⣿│┤└─┬")))
    if arguments.plot is not None:
        print(f"\nwritten: {seen.plot(arguments.plot)}")
    return 0


def _can_print(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
