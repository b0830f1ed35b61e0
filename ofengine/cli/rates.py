"""`ofengine rates FILE.py:Task`: every group's learning rate over a run, before running it."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any, Collection, Dict

from ofengine.cli.asked import Asked, Command
from ofengine.cli.tasks import call
from ofengine.errors import ConfigurationError


def rates(arguments: argparse.Namespace) -> int:
    """Print table and picture; return the exit status: 0, 2 where options are wrong, else 1."""
    return _Rates().carry_out(arguments)


class _Rates(Command):
    name = "rates"
    of_trainer = ("mode", "max_epochs", "max_steps")

    def assumed(self, named: Collection[str]) -> Dict[str, Any]:
        return {} if {"max_epochs", "max_steps"} & {*named} else {"max_epochs": 1}

    def settle(self, trainer: Dict[str, Any], own: Dict[str, Any]) -> None:
        # Nothing is computed, and the rates are the same on a machine without the run's device.
        trainer.update(device="cpu", precision="32-true")

    def show(self, asked: Asked) -> int:
        own = asked.own
        seen = _preview(asked)
        print(seen.table(at=own["at"]))
        print()
        width = min(shutil.get_terminal_size((80, 24)).columns, 120)
        print(seen.draw(width=max(width, 40), plain=not _can_print("⣿│┤└─┬")))
        if own["plot"] is not None:
            print(f"\nwritten: {seen.plot(own['plot'])}")
        return 0


def _preview(asked: Asked) -> Any:
    steps = asked.own["steps_per_epoch"]
    data = asked.data if steps is None else None  # only its length is asked for
    what = f"{type(asked.task).__name__}, asked for its rates,"
    try:
        return call(asked.path, what, lambda: asked.trainer.preview(asked.task, data, steps))
    except ConfigurationError as error:
        if "give steps_per_epoch" in str(error):
            text = str(error).replace("give steps_per_epoch", "add --steps-per-epoch N")
            raise ConfigurationError(text) from error
        raise


def _can_print(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
