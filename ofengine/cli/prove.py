"""`ofengine prove FILE.py:Task`: is a task the same to the bit in both modes, and resumed?

With `--devices N`: on so many ranks and in one process that accumulates?
"""

from __future__ import annotations

import argparse

from ofengine.cli.tasks import call, instance_of, load_task, report_errors
from ofengine.ranks.zero import rank_zero_only
from ofengine.trainer import Trainer


def prove(arguments: argparse.Namespace) -> int:
    """Print the report; return the exit status: 0 where all is equal, else 1."""
    return report_errors("prove", lambda: _show(arguments))


def _show(arguments: argparse.Namespace) -> int:
    path, cls = load_task(arguments.task)
    task = instance_of(path, cls, arguments.arg)
    trainer = Trainer(
        device=arguments.device,
        devices=arguments.devices or "auto",
        max_steps=arguments.steps,
        accumulate_grad_batches=arguments.accumulate_grad_batches,
        gradient_clip_val=arguments.gradient_clip_val,
        seed=arguments.seed,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    what = f"{cls.__name__}, run for its proof,"
    report = call(path, what, lambda: trainer.prove(task, steps=arguments.steps))
    rank_zero_only(print)(report)
    return 0 if report.equal else 1
