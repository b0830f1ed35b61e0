"""What a run was told: the Trainer's arguments, and which rank this is."""

from __future__ import annotations

from typing import Optional

import oneflow as flow

from ofengine.run.settings import Settings
from ofengine.run.state import Run
from ofengine.tracing import forbid_in_trace


class ToldView:
    """The part of :class:`~ofengine.run.view.RunView` that stays the same from run to run."""

    _run: Run

    @property
    def settings(self) -> Settings:
        """The Trainer's arguments, checked. The commonest are attributes of the trainer, too."""
        return self._run.settings

    @property
    def mode(self) -> str:
        """The mode of training, "eager" or "graph"."""
        return self._run.settings.mode

    @property
    def eval_mode(self) -> str:
        """The mode of validation, test and prediction."""
        return self._run.settings.eval_mode

    @property
    def device(self) -> flow.device:
        """The device that the task runs on."""
        return self._run.settings.device

    @property
    def seed(self) -> Optional[int]:
        """The Trainer's seed, or that of the run which is resumed; None where there is none."""
        return self._run.seed

    @property
    def max_epochs(self) -> int:
        """Epochs to train; -1 for no limit."""
        return self._run.settings.max_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps to train; -1 for no limit."""
        return self._run.settings.max_steps

    @property
    def min_epochs(self) -> int:
        """Epochs that are trained before ``should_stop`` ends training."""
        return self._run.settings.min_epochs

    @property
    def min_steps(self) -> int:
        """Optimizer steps that are made before ``should_stop`` ends training."""
        return self._run.settings.min_steps

    @property
    def fast_dev_run(self) -> int:
        """So many batches of each stage are tried; 0 where it is a run proper."""
        return self._run.settings.fast_dev_run

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches whose gradients are averaged into one optimizer step, in this epoch."""
        if len(self._run.settings.windows.changes) > 1:
            forbid_in_trace("trainer.accumulate_grad_batches")
        return self._run.settings.accumulate_in(self._run.progress.epoch)

    @property
    def gradient_clip_val(self) -> Optional[float]:
        """To what gradients are clipped; None where they are not."""
        return self._run.settings.gradient_clip_val

    @property
    def gradient_clip_algorithm(self) -> str:
        """How, "norm" or "value"."""
        return self._run.settings.gradient_clip_algorithm

    @property
    def log_every_n_steps(self) -> int:
        """How often, in optimizer steps, metrics are read and logged."""
        return self._run.settings.log_every_n_steps

    @property
    def check_val_every_n_epoch(self) -> int:
        """In every so manieth epoch validation runs."""
        return self._run.settings.check_val_every_n_epoch

    @property
    def num_sanity_val_steps(self) -> int:
        """Validation batches tried before training; -1 for all."""
        return self._run.settings.num_sanity_val_steps

    @property
    def default_root_dir(self) -> str:
        """Where logs and checkpoints go by default."""
        return self._run.settings.default_root_dir

    @property
    def restart_on_crash(self) -> int:
        """How often the script is started again where its process crashes."""
        return self._run.settings.restart_on_crash

    # ------------------------------------------------------------------ which rank this is

    @property
    def world_size(self) -> int:
        """How many ranks train together; 1 where one process is alone."""
        return self._run.settings.world_size

    @property
    def global_rank(self) -> int:
        """Which of all ranks this process is, from 0."""
        world = self._run.settings.world
        return 0 if world is None else world.rank

    @property
    def local_rank(self) -> int:
        """Which of the ranks on this machine it is, from 0."""
        world = self._run.settings.world
        return 0 if world is None else world.local_rank

    @property
    def node_rank(self) -> int:
        """Which of the machines this is, from 0."""
        world = self._run.settings.world
        return 0 if world is None else world.node_rank

    @property
    def num_nodes(self) -> int:
        """How many machines there are."""
        return self._run.settings.num_nodes

    @property
    def is_global_zero(self) -> bool:
        """True on rank 0, which writes and prints, and where one process is alone."""
        return self.global_rank == 0
