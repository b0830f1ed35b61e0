"""Callbacks and a logger that note what they see, and one that gives another its state."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from ofengine import Callback
from ofengine.loggers import Logger


class Diary(Callback):
    """What happened, in short: ``3`` for training on a batch of 3, ``|`` for the epoch's end."""

    def __init__(self) -> None:
        self.events: List[str] = []

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = float((batch[0] if isinstance(batch, list) else batch)[0, 0])
        self.events.append(f"{number:g}")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.events.append("|")

    @property
    def text(self) -> str:
        return " ".join(self.events)


class Notes(Logger):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.rows: List[Tuple[int, int, Dict[str, float]]] = []
        """(step, epoch, metrics)"""
        self.statuses: List[str] = []

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        self.rows.append((step, epoch, dict(metrics)))

    def finalize(self, status: str) -> None:
        self.statuses.append(status)

    def values(self, name: str) -> List[Tuple[int, float]]:
        """A metric's (step, value)."""
        return [(step, row[name]) for step, _, row in self.rows if name in row]


class Resume(Callback):
    """Gives a callback listed before it a state, when a resumed run would."""

    def __init__(self, callback: Callback, state: Dict[str, Any]) -> None:
        self.callback, self.state = callback, state

    def setup(self, trainer: Any, task: Any, stage: str) -> None:
        self.callback.load_state_dict(self.state)
