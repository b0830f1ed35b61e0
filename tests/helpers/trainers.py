"""Trainers that say nothing."""

from __future__ import annotations

from typing import Any

from ofengine import Trainer

MODES = ("eager", "graph")


def quiet_trainer(**arguments: Any) -> Trainer:
    """A Trainer on the CPU that prints nothing and writes no file, unless told otherwise."""
    quiet = {
        "device": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**{**quiet, **arguments})
