"""The lr finder: a short run whose rates rise from step to step, and that leaves no trace."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine.callback import Callback
from ofengine.data.combined import together
from ofengine.data.sources import is_iterator
from ofengine.errors import ConfigurationError, DataError, RateError
from ofengine.rates.finder import SMOOTHING, LRFinder
from ofengine.rates.groups import Group
from ofengine.rates.optimizers import Optimization
from ofengine.rates.plan import RatePlan
from ofengine.run.devices import move
from ofengine.run.settings import Settings, refuse_arguments
from ofengine.run.view import RunView
from ofengine.task import TaskModule
from ofengine.trials.restore import OptimizerLoan, Restorer, of_sweep

Plan = Callable[[Optional[int]], Tuple[Optional[Optimization], RatePlan]]
"""Plans the run that the task would make by itself, from the batches in an epoch."""
Fit = Callable[[Settings, List[Callback], TaskModule, Any, None], None]
"""Fits a task over training data with other settings and callbacks, from no checkpoint."""


class _Sweep(LRScheduler):
    """Every group's base rate times ``factors[step]``."""

    def __init__(self, optimizer: Any, factors: Sequence[float]) -> None:
        self.factors = list(factors)
        super().__init__(optimizer)

    def get_lr(self, base_lr: float, step: int) -> float:
        """The rate of a group with ``base_lr`` at ``step``."""
        return base_lr * self.factors[min(step, len(self.factors) - 1)]


class _Recorder(Callback):
    """Reads the loss at every step, and stops where it grows too large.

    Several ranks tell each other the losses of a step when the next one is made, for a rank without
    a batch comes to no hook of its own. What a step too many does is put back with the rest.
    """

    watches_losses = True

    def __init__(self, threshold: Optional[float]) -> None:
        self.rates: List[float] = []
        self.losses: List[float] = []
        self.stopped = False
        self._threshold = threshold
        self._step = 0
        self._of_step: Dict[int, List[float]] = {}
        """This rank's losses, by the number of the step, from 0, that their batches are part of."""
        self._average = 0.0
        self._best = math.inf

    def on_train_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which step the batch is part of."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss; one process that has made a step sees whether to go on."""
        loss = float(outputs["loss"].numpy().reshape(-1)[0])
        self._of_step.setdefault(self._step, []).append(loss)
        if trainer.world_size == 1 and trainer.global_step > self._step:
            self._record(trainer, self._step, self._of_step.pop(self._step))

    def on_after_optimizer_step(self, trainer: RunView, task: TaskModule) -> None:
        """All ranks come here: see whether they should have gone on after the step before."""
        self._record_of_all(trainer, trainer.global_step - 2)

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """No further step comes."""
        self._record_of_all(trainer, trainer.global_step - 1)

    def _record_of_all(self, trainer: RunView, step: int) -> None:
        ranks = trainer._run.ranks
        if ranks is not None and step >= 0 and not self.stopped:
            said = ranks.talk(self._of_step.pop(step, []))
            rounds = range(max(map(len, said)))
            in_order = [each[i] for i in rounds for each in said if i < len(each)]
            self._record(trainer, step, in_order)

    def _record(self, trainer: RunView, step: int, losses: Sequence[float]) -> None:
        self.losses.append(sum(losses) / len(losses))
        self.rates.append(max(trainer.rates.rates(step)))
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * self.losses[-1]
        smoothed = self._average / (1 - SMOOTHING ** len(self.losses))
        self._best = min(self._best, smoothed)
        if self._threshold is None or trainer.max_steps == step + 1:
            too_large = False
        else:  # for a positive best: smoothed > threshold * best
            too_large = smoothed > self._best + (self._threshold - 1) * abs(self._best)
        if too_large or not math.isfinite(smoothed):
            self.stopped = trainer.should_stop = True


_OPTIONS = ("min_lr", "max_lr", "num_steps", "mode", "early_stop_threshold")


def lr_find(
    settings: Settings,
    task: TaskModule,
    train_dataloaders: Any,
    plan: Plan,
    fit: Fit,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 1.0,
    num_steps: int = 100,
    mode: str = "exponential",
    early_stop_threshold: Optional[float] = 4.0,
    **_unknown: Any,
) -> LRFinder:
    """Train for ``num_steps`` steps with rising rates, and put everything back.

    All groups' base rates are multiplied by one factor, so that their ratios stay, ``lr_scale``
    included; schedule and decay are left out. The sweep is a ``fit`` with the mode, device,
    clipping, accumulation and seed of ``settings``, without callbacks, loggers and
    validation; the task's own hooks run.

    Put back exactly: parameters, buffers, gradients, ``requires_grad`` and train/eval of the
    task, the attributes of its modules, an optimizer that ``configure_optimizers`` did not make
    anew, the global generators of Python, numpy and OneFlow, and every generator of theirs that the
    task's modules, the dataloader, its sampler, dataset or ``collate_fn`` hold as an attribute:
    with ``Trainer(seed=...)`` a ``fit`` gives bit for bit the weights that it would have given.
    Not put back: what lies deeper in a dataset or in a list of the task; a OneFlow dataloader's
    workers that were kept alive start anew.

    On several ranks all of them call it, and all find the same: what one process does that takes
    their batches.

    Args:
        settings: the Trainer's.
        task: the task; ``configure_optimizers`` is called.
        train_dataloaders: as in ``fit``.
        plan: see :data:`Plan`.
        fit: see :data:`Fit`.
        min_lr: the rate of the first step, of the group whose rate is largest.
        max_lr: its rate at the last step.
        num_steps: optimizer steps; the data is repeated where it is shorter.
        mode: "exponential" (even in the logarithm) or "linear".
        early_stop_threshold: stop where the smoothed loss is larger than this many times the
            best; None goes on to the end, unless the loss is not finite.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data can be gone through only once.
        RateError: the groups are wrong, or no group has a rate above 0.
    """
    refuse_arguments("lr_find", _unknown, _OPTIONS)
    rates = _rates(min_lr, max_lr, num_steps, mode)
    if early_stop_threshold is not None and not early_stop_threshold > 1:
        raise ConfigurationError(
            f"early_stop_threshold={early_stop_threshold!r}: give a number above 1, or None."
        )
    recorder = _Recorder(early_stop_threshold)
    sweep_settings = of_sweep(
        settings,
        num_steps,
        limit_val_batches=None,
        val_check_interval=None,
        check_val_every_n_epoch=10**9,
    )
    source = train_dataloaders if train_dataloaders is not None else task.train_dataloader()
    source = together(source)
    if is_iterator(source):
        raise DataError(
            f"train_dataloader is a {type(source).__name__}, which can be gone through only once: "
            "lr_find would use it up; give a DataLoader or a list of batches."
        )
    if isinstance(task, nn.Module):  # else fit says what is wrong
        move(task, settings.device)
    with Restorer(task, source):
        sweep = _Optimizers(plan, task, rates)
        task.__dict__["configure_optimizers"] = sweep.configure
        try:
            fit(sweep_settings, [recorder], task, source, None)
        finally:
            sweep.give_back()
    base = {group.name: group.lr for group in sweep.groups}
    return LRFinder(
        recorder.rates, recorder.losses, base, sweep.largest, sweep.reference, mode,
        recorder.stopped,
    )  # fmt: skip


class _Optimizers:
    """Stands in for ``configure_optimizers`` of the task: its optimizer, with rising rates."""

    def __init__(self, plan: Plan, task: TaskModule, rates: Sequence[float]) -> None:
        self._plan, self._task, self._rates = plan, task, rates
        self._loan: Optional[OptimizerLoan] = None
        self.groups: Sequence[Group] = ()
        self.largest = ""
        self.reference = 1.0

    def configure(self) -> Dict[str, Any]:
        """What ``configure_optimizers`` returns in the sweep."""
        del self._task.__dict__["configure_optimizers"]
        made, plan = self._plan(self._task.trainer._run.epoch_length)
        if made is None:
            raise ConfigurationError(
                "lr_find raises the rates of one optimizer, and configure_optimizers() returned "
                "several: try the rates of each by hand, or return the one in question alone."
            )
        self.groups = plan.groups
        self._loan = OptimizerLoan(made.optimizer)
        tops = [group.lr * plan.scale(index) for index, group in enumerate(plan.groups)]
        self.reference = max(tops, default=0.0)
        if self.reference == 0:
            raise RateError(
                f"no group of {type(self._task).__name__} has a rate above 0: lr_find multiplies "
                "the groups' rates, so give at least one an lr."
            )
        self.largest = plan.groups[tops.index(self.reference)].name
        for index, group in enumerate(made.optimizer.param_groups):
            group["lr"] = group["initial_lr"] = plan.groups[index].lr
            group["lr_scale"], group["lr_decay_scale"] = plan.scale(index), 1.0
        factors = [rate / self.reference for rate in self._rates]
        moved = {each.key: each.given for each in made.options}
        sweep = _Sweep(made.optimizer, factors)
        return {"optimizer": made.optimizer, "lr_scheduler": sweep, **moved}

    def give_back(self) -> None:
        """Put the optimizer's own groups and states back."""
        if self._loan is not None:
            self._loan.give_back()


def _rates(min_lr: float, max_lr: float, num_steps: int, mode: str) -> List[float]:
    """The rate of each step."""
    if mode not in ("exponential", "linear"):
        raise ConfigurationError(f"lr_find(mode={mode!r}): use 'exponential' or 'linear'.")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
        raise ConfigurationError(
            f"lr_find(num_steps={num_steps!r}): give a whole number from 2 on."
        )
    if not 0 < min_lr < max_lr < math.inf:
        raise ConfigurationError(
            f"lr_find(min_lr={min_lr!r}, max_lr={max_lr!r}): give rates with 0 < min_lr < max_lr."
        )
    shares = [step / (num_steps - 1) for step in range(num_steps)]
    if mode == "linear":
        return [min_lr + (max_lr - min_lr) * share for share in shares]
    return [min_lr * (max_lr / min_lr) ** share for share in shares]
