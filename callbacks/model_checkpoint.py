"""ModelCheckpoint: keeps the weights of the best, or the latest, moments of a run."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from pathlib import Path
from string import Formatter
from typing import Any, Dict, List, Optional, Tuple, Union

from ofengine.callbacks._monitor import hint, warn_of_misspelt_monitor
from ofengine.errors import ConfigurationError, OFEngineWarning
from ofengine.hooks import Callback
from ofengine.task import TaskModule
from ofengine.trainer import Trainer

_EXTENSION = ".safetensors"


class ModelCheckpoint(Callback):
    """Saves the task's weights while it trains, with ``trainer.save_checkpoint``.

    With ``monitor``, after each validation (in a fit without validation, at the end of each
    epoch), where the metric is among the ``save_top_k`` best so far. Without ``monitor``, at
    the end of each epoch; the newest one is kept, or all. A file that is no longer wanted is
    removed once its successor is safely on the disk, and a file that this run did not write is
    never overwritten: the new one's name then ends in ``-v1``, ``-v2`` and so on.

    Args:
        dirpath: the folder. Default: ``checkpoints`` in ``trainer.log_dir``, where there is
            none in ``default_root_dir``.
        filename: a template of ``{epoch}`` (from 0), ``{step}`` (optimizer steps done) and
            metrics, with Python's format specs: ``"{epoch}-{val_acc:.3f}"`` gives
            ``epoch=3-val_acc=0.912.safetensors``. Default: ``"{epoch}-{step}"``.
        monitor: the metric to go by, a name in ``trainer.callback_metrics``. NaN is never best
            and is not saved, unless all are.
        mode: "min" where less of the metric is better, or "max".
        save_top_k: how many files are kept; -1 for all, 0 for none. Without ``monitor`` one of
            -1, 0 and 1.
        save_last: keep ``last.safetensors`` besides: the weights at the latest such moment,
            good or bad, and at the end of training.
        every_n_epochs: look in every n-th epoch only. Default: 1, and never where
            ``every_n_train_steps`` is given.
        every_n_train_steps: look after every n-th optimizer step instead of at those moments.
        auto_insert_metric_name: False writes only the values: ``3-0.912.safetensors``.

    Attributes:
        best_model_path: the best file (without ``monitor`` the newest); "" before the first.
        best_model_score: its metric; None before the first and without ``monitor``.
        best_k_models: the files kept for their metric, with it.
        last_model_path: the file of ``save_last``; "" before the first.

    Raises:
        ConfigurationError: at once for a wrong argument; before training where ``dirpath``
            cannot be a folder; when it is first needed, where no metric ``monitor`` or of the
            template was logged.
        CheckpointError: a file cannot be written.
    """

    fires_last = True

    def __init__(
        self,
        dirpath: Union[str, Path, None] = None,
        filename: Optional[str] = None,
        monitor: Optional[str] = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_epochs: Optional[int] = None,
        every_n_train_steps: Optional[int] = None,
        auto_insert_metric_name: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigurationError(
                f"ModelCheckpoint(mode={mode!r}): use 'min' where less of the metric is better, "
                "else 'max'."
            )
        _check_whole("save_top_k", save_top_k, -1)
        if monitor is None and save_top_k > 1:
            raise ConfigurationError(
                f"ModelCheckpoint(save_top_k={save_top_k}) needs a metric to tell which are best: "
                "name one as monitor, or use save_top_k=-1 to keep all."
            )
        for name, every in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if every is not None:
                _check_whole(name, every, 1)
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ConfigurationError(
                "ModelCheckpoint was given every_n_epochs and every_n_train_steps: give one of "
                "them, or list two ModelCheckpoints."
            )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_epochs = every_n_epochs or 1
        self.every_n_train_steps = every_n_train_steps
        self._template = _parse(filename or "{epoch}-{step}")
        self._insert_names = auto_insert_metric_name
        self._forget()

    def _forget(self) -> None:
        self.best_model_path = ""
        self.best_model_score: Optional[float] = None
        self.best_k_models: Dict[str, float] = {}
        self.last_model_path = ""
        self._folder = Path()
        self._looked_at = -1
        self._last_saved_at = -1
        self._wait_for_epoch_end = False

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Start anew, and see whether files can be written."""
        if stage != "fit":
            return
        self._forget()
        folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        self._folder = there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"ModelCheckpoint cannot write to {self._folder}: {there} is "
                f"{'write-protected' if there.is_dir() else 'a file'}. Give another dirpath, or "
                "Trainer(enable_checkpointing=False)."
            )

    def on_sanity_check_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Warn early of a ``monitor`` that looks misspelt."""
        if self.monitor is not None:
            warn_of_misspelt_monitor(self, self.monitor, trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, where ``every_n_train_steps`` says so."""
        every = self.every_n_train_steps
        if every is not None and trainer.global_step % every == 0:
            if trainer.global_step in (0, self._looked_at):
                return  # no step was made: this batch's gradients were only accumulated
            self._look(trainer, "at this step")

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Look, where there is a ``monitor``."""
        if trainer.sanity_checking or self.monitor is None or not self._epoch_counts(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            self._wait_for_epoch_end = True  # it may be an epoch's mean of training_step
        if not self._wait_for_epoch_end:
            self._look(trainer, "after this validation")

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Look, where there is no ``monitor`` or no validation."""
        if not self._epoch_counts(trainer):
            return
        if self.monitor is None or self._wait_for_epoch_end or not trainer.has_validation:
            self._look(trainer, "at the end of this epoch")

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Save the last weights; say so where ``monitor`` never came."""
        if self.save_last and self._last_saved_at != trainer.global_step:
            self._save_last(trainer)
        if self.monitor is not None and self._looked_at < 0 and trainer.global_step:
            warnings.warn(
                f"ModelCheckpoint(monitor={self.monitor!r}) kept no best weights: training ended "
                "before their first turn came (every_n_epochs, every_n_train_steps, and "
                "check_val_every_n_epoch of the Trainer say when that is).",
                OFEngineWarning,
                stacklevel=2,
            )

    def _epoch_counts(self, trainer: Trainer) -> bool:
        by_epoch = self.every_n_train_steps is None
        return by_epoch and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # ------------------------------------------------------------------ what

    def _look(self, trainer: Trainer, when: str) -> None:
        """Save, where this moment is worth it."""
        self._looked_at = trainer.global_step
        metrics = trainer.callback_metrics
        if self.monitor is None:
            if self.save_top_k:
                before = self.best_model_path if self.save_top_k == 1 else ""
                self.best_model_path = self._save(trainer, metrics, before)
        else:
            if self.monitor not in metrics:
                raise ConfigurationError(
                    f"ModelCheckpoint(monitor={self.monitor!r}): {when} (epoch "
                    f"{trainer.current_epoch}, step {trainer.global_step}) no such metric was "
                    f"logged.{hint(self.monitor, metrics)}"
                )
            self._save_if_good(trainer, metrics, metrics[self.monitor])
        if self.save_last:
            self._save_last(trainer)

    def _save_if_good(self, trainer: Trainer, metrics: Dict[str, float], score: float) -> None:
        kept = self.best_k_models
        out = ""
        if self.save_top_k == 0 or (math.isnan(score) and self.save_top_k != -1):
            return
        if len(kept) == self.save_top_k:
            out = max(kept, key=lambda path: self._badness(kept[path]))
            if self._badness(score) >= self._badness(kept[out]):
                return
        path = self._save(trainer, metrics, out)
        kept.pop(out, None)
        kept[path] = score
        numbers = [each for each in kept if not math.isnan(kept[each])]
        if numbers:
            self.best_model_path = min(numbers, key=lambda each: self._badness(kept[each]))
            self.best_model_score = kept[self.best_model_path]

    def _badness(self, score: float) -> float:
        return score if self.mode == "min" else -score

    # ------------------------------------------------------------------ where

    def _save(self, trainer: Trainer, metrics: Dict[str, float], out: str) -> str:
        """Save under the template's name; then remove the file ``out``."""
        path = self._unused(self._folder / self._name(trainer, metrics), out)
        trainer.save_checkpoint(path)
        if out and out != str(path):
            with contextlib.suppress(OSError):  # gone already, or somebody holds it: no reason
                os.remove(out)  # to end the training
        return str(path)

    def _save_last(self, trainer: Trainer) -> None:
        path = self._unused(self._folder / f"last{_EXTENSION}", self.last_model_path)
        trainer.save_checkpoint(path)
        self.last_model_path = str(path)
        self._last_saved_at = trainer.global_step

    def _name(self, trainer: Trainer, metrics: Dict[str, float]) -> str:
        values = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}
        name = ""
        for text, field, spec in self._template:
            name += text
            if field is None:
                continue
            if field not in values:
                raise ConfigurationError(
                    f"ModelCheckpoint(filename=...) names {{{field}}}, and no such metric was "
                    f"logged.{hint(field, values)}"
                )
            if self._insert_names:
                name += field.replace("/", "_") + "="  # else val/acc would make a folder val
            name += format(values[field], spec)
        return name if name.endswith(_EXTENSION) else name + _EXTENSION

    @staticmethod
    def _unused(path: Path, ours: str) -> Path:
        """``path``, or ``path-v1``, ... where a file other than ``ours`` is there."""
        candidate, version = path, 0
        while candidate.exists() and str(candidate) != ours:
            version += 1
            candidate = path.with_name(f"{path.name[: -len(_EXTENSION)]}-v{version}{_EXTENSION}")
        return candidate


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"ModelCheckpoint({name}={value!r}): give a whole number from {least} on."
        )


def _parse(filename: str) -> List[Tuple[str, Optional[str], str]]:
    """The template as (text, field after it or None, the field's format spec)."""
    parts: List[Tuple[str, Optional[str], str]] = []
    wrong = f"ModelCheckpoint(filename={filename!r})"
    example = 'write it like "{epoch}-{step}-{val_acc:.3f}"'
    try:
        for text, field, spec, conversion in Formatter().parse(filename):
            if field == "" or conversion:
                raise ConfigurationError(f"{wrong} has a field without a name: {example}.")
            if field is not None:
                format(0 if field in ("epoch", "step") else 0.0, spec or "")
            parts.append((text, field, spec or ""))
    except ValueError as error:
        raise ConfigurationError(f"{wrong}: {error}; {example}.") from None
    return parts
