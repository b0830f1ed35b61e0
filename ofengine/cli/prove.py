"""`ofengine prove FILE.py:Task`: is a task the same to the bit in both modes, and resumed?

With `--devices N`: on so many ranks and in one process that accumulates?
"""

from __future__ import annotations

import argparse
from typing import Any, Dict

from ofengine.cli.asked import Asked, Command
from ofengine.cli.tasks import call
from ofengine.cli.verbs import data_is_an_option
from ofengine.ranks.zero import rank_zero_only


def prove(arguments: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 where all is equal, 2 for wrong options, else 1."""
    return _Prove().carry_out(arguments)


class _Prove(Command):
    name = "prove"
    of_trainer = ("device", "devices", "accumulate_grad_batches", "gradient_clip_val", "seed")

    def settle(self, trainer: Dict[str, Any], own: Dict[str, Any]) -> None:
        if trainer.get("max_epochs") is None:
            trainer["max_epochs"] = -1  # the steps end it, so that nothing need be said of it

    def show(self, asked: Asked) -> int:
        def report() -> Any:
            return asked.trainer.prove(asked.task, asked.data, steps=asked.own["steps"])

        with data_is_an_option():
            made = call(asked.path, f"{type(asked.task).__name__}, run for its proof,", report)
        rank_zero_only(print)(made)
        return 0 if made.equal else 1
