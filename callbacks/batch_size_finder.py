"""BatchSizeFinder: the largest batch that there is memory for, found when a fit begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from ofengine.callback import Callback, overrides
from ofengine.checkpoint import read
from ofengine.checkpoint.checks import check_fits, record, text, whole
from ofengine.data.structure import batch_size_of
from ofengine.data_module import DataModule
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import check_choice, check_count
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_STATE = record({"batch_size": whole(1), "name": text})


class BatchSizeFinder(Callback):
    """Sets ``batch_size`` of the DataModule or the task to the largest that can be trained on.

    When ``fit`` begins, before the dataloaders are made, it calls ``trainer.scale_batch_size``: for
    each try the script is run again up to here, in a process of its own, whose memory is bounded.
    ``train_dataloader()`` is then to make its DataLoader with ``self.batch_size``. It is never more
    than the data set has samples.

    A run that is resumed goes on with the size that its checkpoint has. A ``fast_dev_run``, and
    ``validate``, ``test`` and ``predict``, search nothing.

    Args:
        mode: "power" doubles the size as long as it fits; "binsearch" then halves the interval.
        steps_per_trial: optimizer steps of a try.
        init_val: rows of the first try.
        max_trials: tries at most.
        batch_arg_name: the attribute, of the DataModule where it has it, else of the task; where
            ``task.hparams`` has it, it is set there too.
        max_val: rows at most.
        memory_limit: what the training process may take in RAM: a share of what is free, up to
            0.9, or bytes.

    Attributes:
        optimal_batch_size: what was found, or taken from a checkpoint; None before.

    Raises:
        ConfigurationError: at once for a wrong argument; before training where nothing has the
            attribute, where ``fit`` is given a dataloader, on several ranks, and where
            ``scale_batch_size`` raises it; at the first batch where that has another size.
        DataError: ``init_val`` rows do not fit.
    """

    fires_last = True  # the task's own setup comes before it, which may make the data

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        *,
        max_val: int = 8192,
        memory_limit: Union[int, float] = 0.5,
    ) -> None:
        own = "BatchSizeFinder: "
        check_choice(own + "mode", mode, ("power", "binsearch"))
        counts = {
            "steps_per_trial": steps_per_trial, "init_val": init_val, "max_trials": max_trials,
            "max_val": max_val,
        }  # fmt: skip
        for name, value in counts.items():
            check_count(own + name, value, 1, "a whole number from 1 on")
        if init_val > max_val:
            raise ConfigurationError(f"{own}init_val={init_val} is more than max_val={max_val}.")
        if not isinstance(batch_arg_name, str) or not batch_arg_name.isidentifier():
            raise ConfigurationError(
                f"{own}batch_arg_name={batch_arg_name!r}: give the name of an attribute."
            )
        self.mode = mode
        self.steps_per_trial, self.init_val = steps_per_trial, init_val
        self.max_trials, self.max_val = max_trials, max_val
        self.batch_arg_name = batch_arg_name
        self.memory_limit = memory_limit
        self.optimal_batch_size: Optional[int] = None
        self._is_to_check = False

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """The size that was found; empty before."""
        if self.optimal_batch_size is None:
            return {}
        return {"batch_size": self.optimal_batch_size, "name": self.batch_arg_name}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a BatchSizeFinder."""
        check_fits(state, _STATE, "the state of BatchSizeFinder is wrong")

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Nothing: ``setup`` has taken the size, for the data is made before this is called."""

    # ------------------------------------------------------------------ when a fit begins

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Find the size and set it."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        self.optimal_batch_size = None
        owner = self._owner_of_data(trainer, task)
        holders = self._holders(task, owner)
        if trainer.resumed_from is not None:
            self.optimal_batch_size = self._kept_in(trainer.resumed_from)
            if self.optimal_batch_size is None:
                log.info(
                    "BatchSizeFinder searches nothing: the run is resumed, and had no size of its."
                )
        else:
            self.optimal_batch_size = self._search(trainer, task, owner)
        if self.optimal_batch_size is None:
            return
        for each in holders:
            if isinstance(each, dict):
                each[self.batch_arg_name] = self.optimal_batch_size
            else:
                setattr(each, self.batch_arg_name, self.optimal_batch_size)
        self._is_to_check = True
        log.info("BatchSizeFinder: %s = %d.", self.batch_arg_name, self.optimal_batch_size)

    def _owner_of_data(self, trainer: RunView, task: TaskModule) -> Any:
        """Whose ``train_dataloader`` it is."""
        own = trainer.datamodule
        if own is not None and overrides(own, "train_dataloader", DataModule):
            return own
        if overrides(task, "train_dataloader", TaskModule):
            return task
        raise ConfigurationError(
            "BatchSizeFinder cannot change the batches of a dataloader that fit() is given: make "
            f"it in train_dataloader() of {type(task).__name__} or of a DataModule, with "
            f"batch_size=self.{self.batch_arg_name}."
        )

    def _holders(self, task: TaskModule, owner: Any) -> List[Any]:
        """What has the attribute, ``owner`` of the data before others; ``hparams`` as a dict."""
        name = self.batch_arg_name
        found: List[Any] = [each for each in (owner, task) if _has(each, name)][:1]
        if name in task.hparams:
            found.append(task.hparams)
        if not found:
            data = "" if owner is task else f", nor has {type(owner).__name__}"
            raise ConfigurationError(
                f"BatchSizeFinder is to set {name!r}, and {type(task).__name__} has no such "
                f"attribute{data}: write self.{name} = {self.init_val} in __init__, and make the "
                "DataLoader with it."
            )
        return found

    def _search(self, trainer: RunView, task: TaskModule, owner: Any) -> int:
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"BatchSizeFinder searches in one process, and there are {trainer.world_size} "
                "ranks: find the size with Trainer(devices=1), and let each rank take as many."
            )
        loader = owner.train_dataloader()
        most = self.max_val
        if hasattr(getattr(loader, "dataset", None), "__len__"):
            most = max(1, min(most, len(loader.dataset)))
        return trainer.scale_batch_size(
            task, loader, mode=self.mode, steps_per_trial=self.steps_per_trial,
            init_val=min(self.init_val, most), max_trials=self.max_trials, max_val=most,
            memory_limit=self.memory_limit,
        )  # fmt: skip

    def _kept_in(self, path: Path) -> Optional[int]:
        """The size that the checkpoint ``path`` has under this name."""
        for each in (read(path).state or {}).get("callbacks", []):
            state = each["state"] if each["class"] == type(self).__qualname__ else {}
            if state:
                check_fits(state, _STATE, f"{path}: the state of BatchSizeFinder is wrong")
                if state["name"] == self.batch_arg_name:
                    return int(state["batch_size"])
        return None

    # ------------------------------------------------------------------ is it used?

    @property
    def idle_hooks(self) -> Sequence[str]:
        """See :class:`Callback`: after the first batch there is nothing to look at."""
        return () if self._is_to_check else ("on_train_batch_start",)

    def on_train_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Raise where the first batch has another size."""
        if not self._is_to_check:
            return
        self._is_to_check = False
        rows = batch_size_of(batch)
        if rows != self.optimal_batch_size and not trainer.is_last_batch:
            raise ConfigurationError(
                f"BatchSizeFinder has set {self.batch_arg_name} to {self.optimal_batch_size}, and "
                f"the first batch has {rows} rows: give fit() no dataloader, and make it in "
                f"train_dataloader() with batch_size=self.{self.batch_arg_name}."
            )


def _has(owner: Any, name: str) -> bool:
    return name in vars(owner) or hasattr(type(owner), name)
