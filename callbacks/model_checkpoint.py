"""ModelCheckpoint: keeps the best, or the latest, moments of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from pathlib import Path
from time import monotonic
from typing import Any, Dict, List, Optional, Sequence, Union

from ofengine.callback import Callback
from ofengine.callbacks._checkpoint_arguments import check_what, check_when
from ofengine.callbacks._file_name import FileName
from ofengine.callbacks._monitor import hint, warn_of_misspelt_monitor
from ofengine.checkpoint import EXTENSION, load_weights, metadata_of, remove_leftovers, write
from ofengine.checkpoint.background import BackgroundWriter
from ofengine.errors import (
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    OFEngineError,
    OFEngineWarning,
)
from ofengine.run.arguments import MaxTime, check_flag
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")


class ModelCheckpoint(Callback):
    """Saves checkpoints while a task trains, from each of which the run can be resumed.

    With ``monitor``, after each validation (in a fit without validation, at the end of each
    epoch), where the metric is among the ``save_top_k`` best so far. Without ``monitor``, at
    the end of each epoch; the newest one is kept, or all. A file that is no longer wanted is
    removed once its successor is safely on the disk, and a file that this run did not write is
    never overwritten: the new one's name then ends in ``-v1``, ``-v2`` and so on.

    Where training ends by Ctrl-C, SIGTERM or an exception, the last whole moment is saved as
    ``last.safetensors`` besides, so that ``fit(..., ckpt_path="last")`` goes on from there.

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
        train_time_interval: look each time that so much time has passed, after a step, instead:
            a timedelta, a dict of its arguments, or "DD:HH:MM:SS".
        save_on_exception: save the last whole moment where training ends before its time.
        in_background: write files in a thread while training goes on. What is written is a
            copy of the moment; at most one file is being written at a time.
        restore_best: at the end of training, load the weights of ``best_model_path``.
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
        *,
        train_time_interval: MaxTime = None,
        save_on_exception: bool = True,
        in_background: bool = False,
        restore_best: bool = False,
    ) -> None:
        check_what(monitor, mode, save_top_k, restore_best)
        seconds = check_when(every_n_epochs, every_n_train_steps, train_time_interval)
        for name, flag in (
            ("save_on_exception", save_on_exception),
            ("in_background", in_background),
            ("restore_best", restore_best),
        ):
            check_flag(f"ModelCheckpoint({name})", flag)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_epochs = every_n_epochs or 1
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = seconds
        self.save_on_exception = save_on_exception
        self.restore_best = restore_best
        self._writer = BackgroundWriter() if in_background else None
        self._template = FileName(filename or "{epoch}-{step}", auto_insert_metric_name)
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
        self._validated = False
        self._written: List[str] = []
        self._to_remove = ""
        self._next_time = math.inf

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> Dict[str, Any]:
        """The files that are kept, and their metrics; the one being written is among them."""
        return {
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "best_k_models": dict(self.best_k_models),
            "last_model_path": self.last_model_path,
            "looked_at": self._looked_at,
            "last_saved_at": self._last_saved_at,
            "wait_for_epoch_end": self._wait_for_epoch_end,
            "validated": self._validated,
            "written": list(self._written),
            "to_remove": self._to_remove,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on with these files; remove the one whose removal was interrupted."""
        self.best_model_path = state["best_model_path"]
        self.best_model_score = state["best_model_score"]
        self.best_k_models = dict(state["best_k_models"])
        self.last_model_path = state["last_model_path"]
        self._looked_at = state["looked_at"]
        self._last_saved_at = state["last_saved_at"]
        self._wait_for_epoch_end = state["wait_for_epoch_end"]
        self._validated = state.get("validated", True)
        self._written = list(state["written"])
        self._remove(state["to_remove"])

    # ------------------------------------------------------------------ when

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
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
        remove_leftovers(self._folder)

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Start the clock of ``train_time_interval``."""
        if self.train_time_interval is not None:
            self._next_time = monotonic() + self.train_time_interval

    def on_sanity_check_end(self, trainer: RunView, task: TaskModule) -> None:
        """Warn early of a ``monitor`` that looks misspelt."""
        if self.monitor is not None:
            warn_of_misspelt_monitor(self, self.monitor, trainer.callback_metrics)

    @property
    def idle_hooks(self) -> Sequence[str]:
        """See :class:`Callback`: what looks at no single batch need not be called after each."""
        own = getattr(self.on_train_batch_end, "__func__", None) is _LOOK_AFTER_BATCH
        looks = self.every_n_train_steps is not None or self.train_time_interval is not None
        return ("on_train_batch_end",) if own and not looks else ()

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, where ``every_n_train_steps`` says so."""
        every = self.every_n_train_steps
        if every is not None and trainer.global_step % every == 0:
            if trainer.global_step in (0, self._looked_at):
                return  # no step was made: this batch's gradients were only accumulated
            self._look(trainer, "at this step")
        if self.train_time_interval is not None and monotonic() >= self._next_time:
            self._next_time = monotonic() + self.train_time_interval
            self._look(trainer, "at this time")

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look, where there is a ``monitor``."""
        if trainer.sanity_checking or self.monitor is None:
            return
        self._validated = True
        if not self._epoch_counts(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            self._wait_for_epoch_end = True  # it may be an epoch's mean of training_step
        if not self._wait_for_epoch_end:
            self._look(trainer, "after this validation")

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Look, where there is no ``monitor`` or no validation."""
        if not self._validated and self.monitor in trainer.callback_metrics:
            self._wait_for_epoch_end = True  # only training can have logged it
        if not self._epoch_counts(trainer):
            return
        if self.monitor is None or self._wait_for_epoch_end or not trainer.has_validation:
            self._look(trainer, "at the end of this epoch")

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """Save the last moment; say so where ``monitor`` never came; restore the best weights."""
        if self.save_last and self._last_saved_at != trainer.global_step:
            self._save_last(trainer)
        if self._writer is not None:
            self._writer.wait()
        if self.restore_best and self.best_model_path:
            load_weights(task, self.best_model_path)
            log.info("the best weights are back, from %s.", self.best_model_path)
        if self.monitor is not None and self._looked_at < 0 and trainer.global_step:
            warnings.warn(
                f"ModelCheckpoint(monitor={self.monitor!r}) kept no best weights: training ended "
                "before their first turn came (every_n_epochs, every_n_train_steps, and "
                "check_val_every_n_epoch of the Trainer say when that is).",
                OFEngineWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: RunView, task: TaskModule, exception: BaseException) -> None:
        """Save where training has come to, if that is a moment that can be saved."""
        first = next(each for each in trainer.callbacks if isinstance(each, ModelCheckpoint))
        unsafe = isinstance(exception, (NonFiniteError, CheckpointError))
        if first is not self or not self.save_on_exception or unsafe or not trainer.can_save:
            return
        try:
            self._save_last(trainer)
            if self._writer is not None:
                self._writer.wait()
        except OFEngineError as error:
            log.error("what was trained since the last checkpoint could not be saved: %s", error)
        else:
            log.info(
                "saved %s (epoch %d, step %d): fit(..., ckpt_path=\"last\") goes on from there.",
                self.last_model_path, trainer.current_epoch, trainer.global_step,
            )  # fmt: skip

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let the file that is being written become complete."""
        if self._writer is not None:
            self._writer.close()

    def _epoch_counts(self, trainer: RunView) -> bool:
        by_epoch = self.every_n_train_steps is None and self.train_time_interval is None
        return by_epoch and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # ------------------------------------------------------------------ what

    def _look(self, trainer: RunView, when: str) -> None:
        """Save, where this moment is worth it."""
        self._looked_at = trainer.global_step
        metrics = trainer.callback_metrics
        if self.monitor is None:
            if self.save_top_k:
                before = self.best_model_path if self.save_top_k == 1 else ""
                path = self._path(trainer, metrics, before)
                self._save(trainer, path, before, best_model_path=path)
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

    def _save_if_good(self, trainer: RunView, metrics: Dict[str, float], score: float) -> None:
        kept = dict(self.best_k_models)
        out = ""
        if self.save_top_k == 0 or (math.isnan(score) and self.save_top_k != -1):
            return
        if len(kept) == self.save_top_k:
            out = max(kept, key=lambda path: self._badness(kept[path]))
            if self._badness(score) >= self._badness(kept[out]):
                return
        path = self._path(trainer, metrics, out)
        kept.pop(out, None)
        kept[path] = score
        changes: Dict[str, Any] = {"best_k_models": kept}
        numbers = [each for each in kept if not math.isnan(kept[each])]
        if numbers:
            best = min(numbers, key=lambda each: self._badness(kept[each]))
            changes.update(best_model_path=best, best_model_score=kept[best])
        self._save(trainer, path, out, **changes)

    def _badness(self, score: float) -> float:
        return score if self.mode == "min" else -score

    # ------------------------------------------------------------------ where

    def _save(self, trainer: RunView, path: str, out: str, **changes: Any) -> None:
        """Save to ``path``, then remove the file ``out``.

        The attributes in ``changes`` are as they will be already in the state that is saved.
        """
        before = {name: getattr(self, name) for name in (*changes, "_written", "_to_remove")}
        for name, value in changes.items():
            setattr(self, name, value)
        self._written = [*dict.fromkeys([*(w for w in self._written if w != out), path])]
        self._to_remove = out if out != path else ""
        try:
            self._write(trainer, path, self._to_remove)
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise
        self._to_remove = ""

    def _write(self, trainer: RunView, path: str, out: str) -> None:
        if self._writer is None:
            trainer.save_checkpoint(path)
            self._remove(out)
            return
        self._writer.wait()
        content = trainer.checkpoint_content()

        def work() -> None:
            write(path, *content)
            self._remove(out)

        self._writer.submit(work)

    def _remove(self, path: str) -> None:
        """Remove a file of this folder that is no longer wanted."""
        if path and Path(path).parent == self._folder:
            with contextlib.suppress(OSError):  # gone already, or somebody holds it: no reason
                os.remove(path)  # to end the training

    def _save_last(self, trainer: RunView) -> None:
        path = self._unused(trainer, self._folder / f"last{EXTENSION}", self.last_model_path)
        changes = {"last_model_path": path, "_last_saved_at": trainer.global_step}
        self._save(trainer, path, self.last_model_path, **changes)

    def _path(self, trainer: RunView, metrics: Dict[str, float], out: str) -> str:
        values = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}
        return self._unused(trainer, self._folder / self._template.of(values), out)

    def _unused(self, trainer: RunView, path: Path, ours: str) -> str:
        """``path``, or ``path-v1``, ... where a file is there that is to stay.

        The file ``ours`` may go, and so may one that this run wrote before it was killed and
        resumed from an earlier moment.
        """
        candidate, version = path, 0
        while candidate.exists() and str(candidate) != ours:
            is_known = str(candidate) in self._written
            if not is_known and metadata_of(candidate).get("run") == trainer.run_id:
                break
            version += 1
            candidate = path.with_name(f"{path.name[: -len(EXTENSION)]}-v{version}{EXTENSION}")
        return str(candidate)


_LOOK_AFTER_BATCH = ModelCheckpoint.on_train_batch_end
