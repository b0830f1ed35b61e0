"""ModelCheckpoint: keeps the best, or the newest, moments of a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

from ofengine.callback import Callback
from ofengine.callbacks import _checkpoint_arguments as arguments
from ofengine.callbacks._checkpoint_files import CheckpointFiles
from ofengine.callbacks._checkpoint_saving import (
    NotFinite,
    Saver,
    content_to_keep,
    restore,
    tell_of_last,
    warn_of_refusal,
)
from ofengine.callbacks._checkpoint_state import Kept, check_state, newest_of
from ofengine.callbacks._file_name import FileName
from ofengine.callbacks._monitor import no_metric, warn_of_misspelt_monitor, warn_of_no_best
from ofengine.callbacks._scores import best_of, makes_room, makes_room_as_oldest, put_in
from ofengine.checkpoint import EXTENSION, remove_leftovers
from ofengine.errors import CheckpointError, NonFiniteError, OFEngineError
from ofengine.run.arguments import MaxTime
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")


class ModelCheckpoint(Callback):
    """Saves checkpoints while a task trains, from each of which the run can be resumed.

    With ``monitor``, after each validation (in a fit without validation, at the end of each
    epoch), where the metric is among the ``save_top_k`` best so far. Without ``monitor``, at
    the end of each epoch; the ``save_top_k`` newest are kept. A file that is no longer wanted is
    removed once its successor is safely on the disk. A file that this callback of this run did not
    write is never overwritten or removed: the new one's name then ends in ``-v1``, ``-v2`` and so
    on. A resumed run looks for its files by their names, in its folder and beside the checkpoint,
    so that a run's folder may be copied, moved and renamed.

    Where training ends by Ctrl-C, SIGTERM or an exception, the last whole moment is saved as
    ``last.safetensors`` besides, so that ``fit(..., ckpt_path="last")`` goes on from there.

    A moment at which a weight, the optimizer's state or a gradient is not finite, though it was
    when training began, is not saved: the files of before stay, and a warning says so once.

    Args:
        dirpath: the folder. Default: ``checkpoints`` in ``trainer.log_dir``, where there is
            none in ``default_root_dir``.
        filename: a template of ``{epoch}`` (from 0), ``{step}`` (optimizer steps done) and
            metrics, with Python's format specs: ``"{epoch}-{val_acc:.3f}"`` gives
            ``epoch=3-val_acc=0.912.safetensors``; with a "/" in it, of a sub-folder. Default:
            ``"{epoch}-{step}"``.
        monitor: the metric to go by, a name in ``trainer.callback_metrics``. NaN is never best
            and is not saved, unless all are.
        mode: "min" where less of the metric is better, or "max".
        save_top_k: how many files are kept, the best or the newest; -1 for all, 0 for none.
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
        best_k_models: the files kept for their metric, with it; without ``monitor``, where
            ``save_top_k`` is above 1, the newest, with their optimizer steps.
        last_model_path: the file of ``save_last``; "" before the first.

    Raises:
        ConfigurationError: at once for a wrong argument; before training where ``dirpath``
            cannot be a folder; when it is first needed, where no metric ``monitor`` or of the
            template was logged.
        CheckpointError: a file cannot be written.
    """

    fires_last = rank_zero_only = True

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
        arguments.check_what(monitor, mode, save_top_k, restore_best)
        seconds = arguments.check_when(every_n_epochs, every_n_train_steps, train_time_interval)
        arguments.check_flags(
            save_last=save_last or False,  # None is Lightning's default
            save_on_exception=save_on_exception,
            in_background=in_background,
            restore_best=restore_best,
        )
        self.dirpath = arguments.check_where(dirpath)
        self.filename = filename
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_epochs = every_n_epochs or 1
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = seconds
        self.save_on_exception = save_on_exception
        self.restore_best = restore_best
        self.in_background = in_background
        self._saver = Saver(in_background)
        self._template = FileName(filename or "{epoch}-{step}", auto_insert_metric_name)
        self._forget()

    def _forget(self) -> None:
        self.best_model_path = ""
        self.best_model_score: Optional[float] = None
        self.best_k_models: Dict[str, float] = {}
        self.last_model_path = ""
        self._files = CheckpointFiles((self.dirpath or Path()).absolute())
        self._itself = self._to_remove = ""
        self._surplus: List[str] = []
        self._resumed: Optional[Dict[str, Any]] = None
        self._looked_at = self._last_saved_at = -1
        self._wait_for_epoch_end = False
        self._validated = self._has_refused = False
        self._next_time = math.inf

    # ------------------------------------------------------------------ resuming

    @property
    def file_patterns(self) -> List[str]:
        """Where its files lie below its folder, as glob patterns."""
        return [f"*{EXTENSION}", f"{self._template.folder_pattern}*{EXTENSION}"]

    def state_dict(self) -> Dict[str, Any]:
        """The files that are kept, by name, and their metrics; the one being written among them."""
        name_of = self._files.name_of
        return {
            "key": self._files.key,
            "best_model_path": name_of(self.best_model_path),
            "best_model_score": self.best_model_score,
            "best_k_models": {name_of(path): k for path, k in self.best_k_models.items()},
            "last_model_path": name_of(self.last_model_path),
            "looked_at": self._looked_at,
            "last_saved_at": self._last_saved_at,
            "wait_for_epoch_end": self._wait_for_epoch_end,
            "validated": self._validated,
            "written": list(map(name_of, self._files.kept)),
            "to_remove": name_of(self._to_remove),
            "itself": name_of(self._itself),
        }

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a ModelCheckpoint."""
        check_state(state)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on with these files; they are looked for when all of the run is there again."""
        check_state(state)
        self._files = CheckpointFiles(self._files.folder, state.get("key", ""))
        place_of = self._files.place_of
        self.best_model_path = place_of(state["best_model_path"])
        self.best_model_score = state["best_model_score"]
        self.best_k_models = {place_of(name): k for name, k in state["best_k_models"].items()}
        self.last_model_path = place_of(state["last_model_path"])
        self._looked_at = state["looked_at"]
        self._last_saved_at = state["last_saved_at"]
        self._wait_for_epoch_end = state["wait_for_epoch_end"]
        self._validated = state.get("validated", True)
        self._resumed = state

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Find the files of the run that is resumed."""
        self._files.run_id = trainer.run_id
        if self._resumed is None:
            return
        patterns, step = self.file_patterns, trainer.global_step
        kept = Kept.of(self._resumed, self._files, trainer.resumed_from, patterns, step)
        self._resumed = None
        self.best_model_path, self.last_model_path = kept.best, kept.last
        self.best_k_models, self._to_remove = kept.scored, kept.to_remove
        if self.monitor is None:
            self.best_k_models, self._surplus = newest_of(kept, self.save_top_k)
        self._note_best(kept.best)

    def _note_best(self, newest: str) -> None:
        """Which of the files kept for their metric is best; without a metric, ``newest``."""
        if self.monitor is None:
            self.best_model_path = newest
            return
        self.best_model_path = best = best_of(self.best_k_models, self.mode)
        self.best_model_score = self.best_k_models.get(best)

    # ------------------------------------------------------------------ when

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Start anew, and see whether files can be written."""
        if stage != "fit":
            return
        self._forget()
        folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        arguments.check_folder(folder.absolute())
        self._files = CheckpointFiles(folder.absolute())
        for each in (folder, *folder.glob(self._template.folder_pattern or "no sub-folders")):
            remove_leftovers(each)

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Start the clock of ``train_time_interval``; end what was interrupted; remove the rest."""
        if self.train_time_interval is not None:
            self._next_time = monotonic() + self.train_time_interval
        if trainer.resumed_from is not None and self._files.holds(trainer.resumed_from):
            self._files.remove(self._to_remove)
        self._files.drop(self._surplus)
        self._to_remove, self._surplus = "", []

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
        self._finish()
        if self.restore_best and self.best_model_path:
            restore(trainer, task, self.best_model_path)
        has_none = not self.best_model_path and trainer.global_step and not self._has_refused
        if self.monitor is not None and has_none and (self._looked_at < 0 or self.save_top_k):
            warn_of_no_best(self, self.monitor, has_looked=self._looked_at >= 0)

    def on_exception(self, trainer: RunView, task: TaskModule, exception: BaseException) -> None:
        """Save where training has come to, if that is a moment that can be saved."""
        first = next(each for each in trainer.callbacks if isinstance(each, ModelCheckpoint))
        unsafe = isinstance(exception, (NonFiniteError, CheckpointError))
        if first is not self or not self.save_on_exception or unsafe:
            return
        try:
            is_saved = self._save_last(trainer) if trainer.can_save else None
            self._finish()
        except OFEngineError as error:
            log.error("what was trained since the last checkpoint could not be saved: %s", error)
        else:
            tell_of_last(trainer, self.last_model_path, is_saved, list(self._files.kept))

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let the file that is being written become complete."""
        self._saver.close()
        self._finish()

    def _epoch_counts(self, trainer: RunView) -> bool:
        by_epoch = self.every_n_train_steps is None and self.train_time_interval is None
        return by_epoch and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # ------------------------------------------------------------------ what

    def _look(self, trainer: RunView, when: str) -> None:
        """Save, where this moment is worth it."""
        self._looked_at = trainer.global_step
        metrics, kept, most = trainer.callback_metrics, self.best_k_models, self.save_top_k
        monitor, score = self.monitor, float(trainer.global_step)
        if monitor is None:
            out = makes_room_as_oldest(kept, self.best_model_path, most)
        elif monitor not in metrics:
            raise no_metric(self, monitor, when, trainer)
        else:
            score = metrics[monitor]
            out = makes_room(kept, score, self.mode, most)

        def take(path: str, out: str) -> None:
            if monitor is not None or most > 1:
                self.best_k_models = put_in(self.best_k_models, path, out, score)
            self._note_best(path)

        if out is not None:
            self._save(trainer, self._name(trainer, metrics), out, take)
        if self.save_last:
            self._save_last(trainer)

    def _save_last(self, trainer: RunView) -> bool:
        def take(path: str, out: str) -> None:
            self.last_model_path, self._last_saved_at = path, trainer.global_step

        return self._save(trainer, f"last{EXTENSION}", self.last_model_path, take)

    def _name(self, trainer: RunView, metrics: Dict[str, float]) -> str:
        values = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}
        return self._template.of(values)

    # ------------------------------------------------------------------ how

    def _save(
        self, trainer: RunView, name: str, out: str, take: Callable[[str, str], None]
    ) -> bool:
        """Save to ``name`` in the folder, then remove the file ``out``; False where it is unsound.

        ``take`` is given the new file's path and ``out``, and sets the attributes to what they
        are from then on, and in what is saved. Where it is not saved they are as before.
        """
        out = self._finish().get(out, out)
        wanted, files = self._files.folder / name, self._files
        files.run_id = trainer.run_id
        path = files.choose(wanted, out)
        before, kept = dict(vars(self)), dict(files.kept)
        take(path, out)
        files.kept.pop(out, None)
        files.kept[path] = None
        self._itself, self._to_remove = path, out if out != path else ""
        try:
            content = content_to_keep(trainer)
            self._saver.save(files, wanted, path, self._to_remove, content)
        except BaseException as error:
            vars(self).update(before)
            files.kept = kept
            if not isinstance(error, NotFinite):
                raise
            if not self._has_refused:
                warn_of_refusal(trainer, str(error), list(files.kept))
            self._has_refused = True
            return False
        self._itself = self._to_remove = ""
        if not self.in_background:
            self._finish()
        return True

    def _finish(self) -> Dict[str, str]:
        """Wait for what is being written; note and return what is called otherwise than meant."""
        names = self._saver.finish()
        if names:
            self.best_model_path = names.get(self.best_model_path, self.best_model_path)
            self.last_model_path = names.get(self.last_model_path, self.last_model_path)
            self.best_k_models = {names.get(p, p): k for p, k in self.best_k_models.items()}
            self._files.kept = {names.get(each, each): None for each in self._files.kept}
        return names


_LOOK_AFTER_BATCH = ModelCheckpoint.on_train_batch_end
