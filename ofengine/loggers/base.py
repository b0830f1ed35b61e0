"""Logger: what the Trainer sends metrics to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from ofengine.constructors import ships, tells_unknown_arguments


class Logger:
    """Receives metrics. Subclass it to send them elsewhere.

    A logger of your own writes :meth:`log_metrics`; where it has a use for them,
    :meth:`log_hyperparams` and :meth:`finalize`; and, so that a resumed run goes on where it was,
    :meth:`state_dict` and :meth:`load_state_dict`.
    """

    resumed_from: Optional[Path] = None
    """The checkpoint file that the run goes on from; set before :meth:`load_state_dict`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Of ofengine's own ones, an argument that they have not is told."""
        super().__init_subclass__(**options)
        if ships(cls):
            tells_unknown_arguments(cls)

    @property
    def log_dir(self) -> Optional[str]:
        """The folder of this run's files, or None where the logger writes none."""
        return None

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Take the ``metrics`` known after ``step`` optimizer steps, in ``epoch`` (from 0)."""
        raise NotImplementedError

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        """Take ``hparams``, what the task's ``save_hyperparameters`` was told, when ``fit`` begins.

        A resumed run gives them again. Default: nothing.
        """

    def save_due(self, step: int) -> None:
        """Store what is due before ``step`` is logged, whose values nobody has waited for yet.

        The device is still computing, so what takes time costs least here. Default: nothing.
        """

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint keeps of this logger; empty where it keeps nothing."""
        return {}

    @property
    def state_key(self) -> str:
        """What tells this logger's state in a checkpoint from those of others: its class.

        Of several loggers with one key, the one with the same arguments gets a state.
        """
        return type(self).__qualname__

    def check_state_dict(self, state: Dict[str, Any]) -> None:
        """Raise where :meth:`load_state_dict` could not take ``state``; change nothing.

        Called before anything of a checkpoint is taken up. Default: content with all.
        """

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        """Go on from ``state``, which :meth:`state_dict` gave, where a run is resumed.

        ``continue_files`` says to go on in the files of that run, and to take out of them what
        came after the checkpoint; otherwise to begin files of this run with what came before.
        """

    def run_dirs(self) -> List[Path]:
        """The folders that runs with this logger have left so far."""
        return []

    def save(self) -> None:
        """Make sure that what was logged is stored. Called after each epoch."""

    def finalize(self, status: str) -> None:
        """The run is over; ``status`` is "success" or "failed"."""
