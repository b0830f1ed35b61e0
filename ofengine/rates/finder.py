"""The lr finder: a short run whose rates rise from step to step, and that leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine.errors import ConfigurationError, DataError, RateError
from ofengine.hooks import Callback
from ofengine.rates.canvas import Canvas, figure, round_numbers
from ofengine.rates.dry_run import plan_run
from ofengine.rates.groups import Group
from ofengine.rates.restore import OptimizerLoan, Restorer

if TYPE_CHECKING:
    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer

_SMOOTHING = 0.98
"""The weight of the past in the smoothed loss, as in fastai and Lightning."""


class LRFinder:
    """What ``Trainer.lr_find`` found: the loss at each rate that was tried.

    Args:
        rates: see below.
        losses: see below.
        base: the ``lr`` of each group, by name.
        group: see below.
        reference: the rate of ``group`` (``lr`` times ``lr_scale``) before the sweep.
        mode: "exponential" or "linear", how the rates rose.
        stopped_early: see below.

    Attributes:
        rates: at each step the rate of the group whose rate is largest.
        losses: the training loss of each step (the mean over its batches under accumulation).
        smoothed: the losses' exponential moving average (0.98, corrected for its start), which
            early stopping and :meth:`suggestion` look at.
        group: the name of the group that ``rates`` are of.
        stopped_early: True where the loss grew too large, or was not finite, before the end.
    """

    def __init__(
        self,
        rates: Sequence[float],
        losses: Sequence[float],
        base: Dict[str, float],
        group: str,
        reference: float,
        mode: str = "exponential",
        stopped_early: bool = False,
    ) -> None:
        self.rates = list(rates)
        self.losses = list(losses)
        self.smoothed = smooth(losses)
        self.group = group
        self.mode = mode
        self.stopped_early = stopped_early
        self._base = base
        self._reference = reference

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> Optional[float]:
        """The rate at which the smoothed loss falls most steeply; None where it never falls.

        The slope is that of the loss over the logarithm of the rate (over the rate in a linear
        sweep), by central differences, as in fastai.

        Args:
            skip_begin: so many of the first steps are left out.
            skip_end: so many of the last.
        """
        stop = len(self.rates) - skip_end
        kept = [i for i in range(skip_begin, stop) if math.isfinite(self.smoothed[i])]
        if len(kept) < 2:
            return None
        rates = np.array([self.rates[i] for i in kept])
        places = rates if self.mode == "linear" else np.log(rates)
        slopes = np.gradient(np.array([self.smoothed[i] for i in kept]), places)
        steepest = int(slopes.argmin())
        return float(rates[steepest]) if slopes[steepest] < 0 else None

    def lrs(self, rate: Optional[float] = None) -> Dict[str, float]:
        """What to write as ``lr`` of each group so that ``group`` has ``rate``, ratios kept.

        Args:
            rate: default :meth:`suggestion`.

        Raises:
            RateError: there is no suggestion.
        """
        rate = self.suggestion() if rate is None else rate
        if rate is None:
            raise RateError("the loss never fell in this sweep: give lrs() a rate.")
        return {name: lr * rate / self._reference for name, lr in self._base.items()}

    def __str__(self) -> str:
        found = self.suggestion()
        text = f"lr_find: {len(self.rates)} steps"
        if self.rates:
            text += f" from {self.rates[0]:.3g} to {self.rates[-1]:.3g} (group {self.group!r})"
        if self.stopped_early:
            text += ", stopped early"
        return text + (", no suggestion" if found is None else f", suggestion {found:.3g}")

    def draw(self, width: int = 80, height: int = 16, plain: bool = False) -> str:
        """The smoothed loss over the rate as text; the suggestion is marked below.

        Args:
            width: columns in all, at least 40.
            height: rows of the field, at least 4.
            plain: draw with ASCII characters instead of braille.
        """
        if width < 40 or height < 4:
            raise ConfigurationError(
                f"draw(width={width}, height={height}): give at least 40 columns and 4 rows."
            )
        points = self._points()
        if len(points) < 2:
            return f"{self}: nothing to draw."
        losses, x = [loss for _, loss in points], (points[0][0], points[-1][0])
        canvas = Canvas(
            width - 11, height, x, (min(losses), max(losses)), log_x=self._log, plain=plain
        )
        canvas.draw(points)
        found = self.suggestion()
        ticks = round_numbers(x[0], x[1], canvas.columns // 10, self._log)
        lines = ["smoothed loss by learning rate" + (" (log scale)" if self._log else "")]
        lines += canvas.framed(x_ticks=[(rate, f"{rate:.3g}") for rate in ticks])
        if found is not None:
            margin = len(lines[-2]) - canvas.columns
            column = margin + round(canvas.x.place(found)) // 2
            mark = f"^ suggestion {found:.3g}"
            at = column if column + len(mark) <= width else column - len(mark) + 1
            lines.append(" " * at + (mark if at == column else f"suggestion {found:.3g} ^"))
        return "\n".join(lines)

    def plot(self, path: Union[str, Path], width: float = 7.0, height: float = 4.0) -> Path:
        """Write losses, smoothed losses and suggestion to ``path`` (.png, .svg, .pdf); its path.

        Raises :class:`ConfigurationError` where matplotlib is missing or the file cannot be
        written. ``width`` and ``height`` are in inches.
        """
        with figure(path, width, height) as (axes, colors):
            axes.plot(self.rates, self.losses, color="0.8", linewidth=1, label="loss")
            axes.plot(self.rates, self.smoothed, color=colors(0, 1), label="smoothed loss")
            found = self.suggestion()
            if found is not None:
                loss = self.smoothed[self.rates.index(found)]
                axes.plot([found], [loss], "o", color=colors(3, 4), label=f"suggestion {found:.3g}")
            shown = [loss for _, loss in self._points()]
            if shown:  # single steps' losses may lie far outside
                low, high = np.percentile([*shown, *self.losses[: len(shown)]], (5, 95))
                low, high = min(low, *shown), max(high, *shown)
                room = (high - low) * 0.1 or 1.0
                axes.set_ylim(low - room, high + room)
            if self._log:
                axes.set_xscale("log")
            axes.set(xlabel=f"learning rate of {self.group}", ylabel="training loss")
            axes.legend(frameon=False)
        return Path(path)

    @property
    def _log(self) -> bool:
        return self.mode == "exponential"

    def _points(self) -> List[Tuple[float, float]]:
        """The smoothed curve; what rises far above its start at the end is left out."""
        points = [(r, s) for r, s in zip(self.rates, self.smoothed) if math.isfinite(s)]
        if not points:
            return []
        low = min(loss for _, loss in points)
        most = points[0][1] + 1.0 * max(points[0][1] - low, abs(points[0][1]) * 0.1)
        while len(points) > 2 and points[-1][1] > most:
            points.pop()
        return points


def smooth(losses: Sequence[float]) -> List[float]:
    """The exponential moving average of ``losses``, corrected for its start at 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**count))
    return smoothed


class _Sweep(LRScheduler):
    """Every group's base rate times ``factors[step]``."""

    def __init__(self, optimizer: Any, factors: Sequence[float]) -> None:
        self.factors = list(factors)
        super().__init__(optimizer)

    def get_lr(self, base_lr: float, step: int) -> float:
        """The rate of a group with ``base_lr`` at ``step``."""
        return base_lr * self.factors[min(step, len(self.factors) - 1)]


class _Recorder(Callback):
    """Reads the loss at every step, and stops where it grows too large."""

    def __init__(self, threshold: Optional[float]) -> None:
        self.rates: List[float] = []
        self.losses: List[float] = []
        self.stopped = False
        self._threshold = threshold
        self._window: List[float] = []
        self._average = 0.0
        self._best = math.inf

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss; see whether to go on."""
        self._window.append(float(outputs["loss"].numpy().reshape(-1)[0]))
        if trainer.global_step == len(self.losses):
            return  # the batch was only accumulated
        self.losses.append(sum(self._window) / len(self._window))
        self._window = []
        self.rates.append(max(trainer.rates.rates(trainer.global_step - 1)))
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * self.losses[-1]
        smoothed = self._average / (1 - _SMOOTHING ** len(self.losses))
        self._best = min(self._best, smoothed)
        if self._threshold is None or trainer.max_steps == trainer.global_step:
            too_large = False
        else:  # for a positive best: smoothed > threshold * best
            too_large = smoothed > self._best + (self._threshold - 1) * abs(self._best)
        if too_large or not math.isfinite(smoothed):
            self.stopped = trainer.should_stop = True


def lr_find(
    trainer: Trainer,
    task: TaskModule,
    train_dataloaders: Any = None,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 1.0,
    num_steps: int = 100,
    mode: str = "exponential",
    early_stop_threshold: Optional[float] = 4.0,
) -> LRFinder:
    """Train for ``num_steps`` steps with rising rates, and put everything back.

    All groups' base rates are multiplied by one factor, so that their ratios stay, ``lr_scale``
    included; schedule and decay are left out. The sweep is a ``fit`` with the mode, device,
    clipping, accumulation and seed of ``trainer``, without its callbacks, loggers and
    validation; the task's own hooks run.

    Put back exactly: parameters, buffers, gradients, ``requires_grad`` and train/eval of the
    task, the attributes of its modules, an optimizer that ``configure_optimizers`` did not make
    anew, Python's and numpy's generators, and every OneFlow, numpy and Python generator that the
    task's modules, the dataloader, its sampler, dataset or ``collate_fn`` hold as an attribute:
    with ``Trainer(seed=...)`` a ``fit`` gives bit for bit the weights that it would have given.
    Not put back: what lies deeper in a dataset or in a list of the task; a OneFlow dataloader's
    workers that were kept alive start anew; OneFlow's default generator (``oneflow.rand``)
    without a seed in the Trainer, because OneFlow does not tell how far it has been used.

    Args:
        trainer: see above; it is left as it is.
        task: the task; ``configure_optimizers`` is called.
        train_dataloaders: as in ``fit``.
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
    from ofengine.trainer import Trainer

    rates = _rates(min_lr, max_lr, num_steps, mode)
    if early_stop_threshold is not None and not early_stop_threshold > 1:
        raise ConfigurationError(
            f"early_stop_threshold={early_stop_threshold!r}: give a number above 1, or None."
        )
    recorder = _Recorder(early_stop_threshold)
    device = trainer.device
    inner = Trainer(
        mode=trainer.mode,
        eval_mode=trainer.mode,
        device="cpu" if device.type == "cpu" else f"cuda:{device.index}",
        max_steps=num_steps,
        limit_train_batches=trainer._limits["train"],
        overfit_batches=trainer._overfit or 0,
        check_val_every_n_epoch=10**9,
        num_sanity_val_steps=0,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        seed=trainer.seed,
        callbacks=recorder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=trainer.default_root_dir,
    )
    source = train_dataloaders if train_dataloaders is not None else task.train_dataloader()
    if hasattr(source, "__next__"):
        raise DataError(
            f"train_dataloader is a {type(source).__name__}, which can be gone through only once: "
            "lr_find would use it up; give a DataLoader or a list of batches."
        )
    if isinstance(task, nn.Module):  # else fit says what is wrong
        task.to(trainer.device)
    with Restorer(task, source):
        sweep = _Optimizers(trainer, inner, task, rates)
        task.__dict__["configure_optimizers"] = sweep.configure
        try:
            inner.fit(task, source)
        finally:
            sweep.give_back()
    base = {group.name: group.lr for group in sweep.groups}
    return LRFinder(
        recorder.rates, recorder.losses, base, sweep.largest, sweep.reference, mode,
        recorder.stopped,
    )  # fmt: skip


class _Optimizers:
    """Stands in for ``configure_optimizers`` of the task: its optimizer, with rising rates."""

    def __init__(
        self, trainer: Trainer, inner: Trainer, task: TaskModule, rates: Sequence[float]
    ) -> None:
        self._trainer, self._inner, self._task = trainer, inner, task
        self._rates = rates
        self._loan: Optional[OptimizerLoan] = None
        self.groups: Sequence[Group] = ()
        self.largest = ""
        self.reference = 1.0

    def configure(self) -> Dict[str, Any]:
        """What ``configure_optimizers`` returns in the sweep."""
        del self._task.__dict__["configure_optimizers"]
        made, plan, _ = plan_run(self._trainer, self._task, self._inner.num_training_batches)
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
        return {"optimizer": made.optimizer, "lr_scheduler": _Sweep(made.optimizer, factors)}

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
