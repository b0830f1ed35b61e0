"""Trainer: its arguments and the four verbs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Union

from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine import arguments, connect, supervisor
from ofengine._oneflow import synchronize
from ofengine.checkpoint import load_weights
from ofengine.crash_report import CrashReport
from ofengine.culprit import culprit_of
from ofengine.data import Limit, describe
from ofengine.devices import resolve_device
from ofengine.errors import ConfigurationError, GraphModeError, OFEngineError
from ofengine.generators import states_in
from ofengine.hooks import Callback, HookRunner, warn_of_misspelt_methods
from ofengine.interrupts import InterruptGuard
from ofengine.loggers import Logger
from ofengine.loops import evaluation_loop, fit_loop
from ofengine.metrics import Metrics
from ofengine.modes.eager import EagerMode
from ofengine.modes.graph import GraphMode
from ofengine.optimizers import read_optimizers
from ofengine.rates.checks import check_rates
from ofengine.rates.resume import POLICIES
from ofengine.resume import Resumed, find_checkpoint
from ofengine.seeding import seed_everything
from ofengine.state import Runner, RunState
from ofengine.task import TaskModule

if TYPE_CHECKING:
    from ofengine.rates.finder import LRFinder
    from ofengine.rates.preview import Preview

log = logging.getLogger("ofengine")

_MODES = ("eager", "graph")


class Trainer(RunState):
    """Trains, validates, tests and predicts with a :class:`~ofengine.TaskModule`.

    Args:
        mode: "eager" or "graph". Both compute the same thing.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        max_epochs: epochs to train. Default: 1000, or no limit where ``max_steps`` or
            ``max_time`` is given. -1 means no limit.
        max_steps: optimizer steps to train; -1 means no limit.
        max_time: time to train, as "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
            Looked at after each optimizer step.
        limit_train_batches: an int for so many batches of an epoch, a float for a share of
            them, None for all. Likewise ``limit_val_batches``, ``limit_test_batches``,
            ``limit_predict_batches``.
        val_check_interval: validate every so many batches (an int), or after a share of the
            epoch (a float). Default: at the end of the epoch.
        check_val_every_n_epoch: validate in every n-th epoch only.
        num_sanity_val_steps: validation batches tried before training; -1 for all, 0 for none.
        fast_dev_run: True, or a number of batches: run so many of training and validation
            once, with no logger and no checkpoint.
        overfit_batches: train and validate on the same few batches (an int) or share of them
            (a float), held in memory.
        log_every_n_steps: how often, in optimizer steps, metrics are read and logged.
        accumulate_grad_batches: batches whose gradients are averaged into one optimizer step.
            The last window of an epoch may be shorter; it is averaged over what it has.
        gradient_clip_val: clip the gradients of all groups together to this norm (or value).
        gradient_clip_algorithm: "norm" or "value".
        seed: makes shuffling, dropout and the global generators functions of (seed, epoch)
            alone, and gives each dropout layer its own masks. None leaves OneFlow's
            randomness as it is.
        eval_mode: the mode of validation, test and prediction. Default: ``mode``.
        callbacks: what else should happen, see :class:`~ofengine.Callback`.
        logger: True for a :class:`~ofengine.loggers.CSVLogger`, False for none, or loggers.
        enable_checkpointing: add a ``ModelCheckpoint`` where ``callbacks`` has none.
        enable_progress_bar: add a ``ProgressBar`` where ``callbacks`` has none.
        enable_model_summary: add a ``ModelSummary`` where ``callbacks`` has none.
        default_root_dir: where logs and checkpoints go. Default: the current folder.
        restart_on_crash: how often the script is started again where its process dies of a
            crash (by a signal, in native code): ``fit`` then goes on from the last checkpoint.
            What stands before ``fit`` in the script runs again each time.

    Raises:
        ConfigurationError: an argument is wrong.
        DeviceError: the device is not there.
    """

    def __init__(
        self,
        *,
        mode: str = "eager",
        device: str = "auto",
        max_epochs: Optional[int] = None,
        max_steps: int = -1,
        max_time: arguments.MaxTime = None,
        limit_train_batches: Limit = None,
        limit_val_batches: Limit = None,
        limit_test_batches: Limit = None,
        limit_predict_batches: Limit = None,
        val_check_interval: Limit = None,
        check_val_every_n_epoch: int = 1,
        num_sanity_val_steps: int = 2,
        fast_dev_run: Union[bool, int] = False,
        overfit_batches: Union[int, float] = 0,
        log_every_n_steps: int = 50,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: str = "norm",
        seed: Optional[int] = None,
        eval_mode: Optional[str] = None,
        callbacks: Union[Callback, Sequence[Callback], None] = None,
        logger: Union[bool, Logger, Sequence[Logger]] = True,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        default_root_dir: Union[str, Path, None] = None,
        restart_on_crash: int = 0,
    ) -> None:
        _configure_logging()
        at_least_one = "a whole number from 1 on"
        self.mode = arguments.check_choice("mode", mode, _MODES)
        chosen = mode if eval_mode is None else eval_mode
        self.eval_mode = arguments.check_choice("eval_mode", chosen, _MODES)
        self.device = resolve_device(device)
        self.max_steps = arguments.check_count("max_steps", max_steps, -1, "a number, -1 for any")
        self._seconds = arguments.seconds_of(max_time)
        unlimited = max_steps != -1 or max_time is not None
        default_epochs = -1 if unlimited else 1000
        self.max_epochs = arguments.check_count(
            "max_epochs", default_epochs if max_epochs is None else max_epochs, -1,
            "a whole number of epochs, or -1 for no limit",
        )  # fmt: skip
        if max_epochs is None and not unlimited and not fast_dev_run:
            log.info("max_epochs was not given: training up to 1000 epochs.")
        limits = (limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches)
        self._limits: Dict[str, Limit] = {
            stage: arguments.check_limit(name, limit)
            for (stage, name), limit in zip(connect.LIMIT_OF_STAGE.items(), limits)
        }
        self._val_check_interval = val_check_interval
        arguments.batches_between_validations(val_check_interval, 10**9)
        self.check_val_every_n_epoch = arguments.check_count(
            "check_val_every_n_epoch", check_val_every_n_epoch, 1, at_least_one
        )
        self.num_sanity_val_steps = arguments.check_count(
            "num_sanity_val_steps", num_sanity_val_steps, -1, "a number of batches, or -1 for all"
        )
        self.log_every_n_steps = arguments.check_count(
            "log_every_n_steps", log_every_n_steps, 1, at_least_one
        )
        self.accumulate_grad_batches = arguments.check_count(
            "accumulate_grad_batches", accumulate_grad_batches, 1, at_least_one
        )
        self.gradient_clip_val = arguments.check_clip(gradient_clip_val)
        self.gradient_clip_algorithm = arguments.check_choice(
            "gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value")
        )
        if seed is not None:
            what = "a whole number from 0 to 2**63 - 1, or None"
            seed = arguments.check_count("seed", seed, 0, what, 2**63 - 1)
        self.seed = seed
        if not isinstance(default_root_dir, (str, Path, type(None))):
            raise ConfigurationError(
                f"default_root_dir={default_root_dir!r}: give the path of a folder."
            )
        self.default_root_dir = str(default_root_dir or os.getcwd())
        self.restart_on_crash = arguments.check_count(
            "restart_on_crash", restart_on_crash, 0, "a whole number, 0 for never"
        )
        self._overfit = arguments.check_limit("overfit_batches", overfit_batches) or None
        for name, flag in (
            ("enable_checkpointing", enable_checkpointing),
            ("enable_progress_bar", enable_progress_bar),
            ("enable_model_summary", enable_model_summary),
        ):
            arguments.check_flag(name, flag)
        self.fast_dev_run = fast_dev_run
        if fast_dev_run is True or fast_dev_run != 0:
            batches = 1 if fast_dev_run is True else fast_dev_run
            batches = arguments.check_count(
                "fast_dev_run", batches, 1, "True, False or a number of batches"
            )
            self._limits = dict.fromkeys(self._limits, batches)
            self.max_epochs, self.max_steps, self.num_sanity_val_steps = 1, -1, 0
            self._val_check_interval, self.check_val_every_n_epoch = None, 1
            logger = enable_checkpointing = False

        self.loggers = connect.make_loggers(logger, self.default_root_dir)
        self.callbacks = connect.make_callbacks(
            callbacks,
            enable_progress_bar,
            enable_model_summary,
            enable_checkpointing,
            drop_checkpoints=bool(fast_dev_run),
        )
        self.metrics = Metrics()
        self.interrupts = InterruptGuard()
        self.predictions: List[List[Any]] = []
        self._reset_progress()

    # ------------------------------------------------------------------ verbs

    def fit(
        self,
        task: TaskModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        ckpt_path: Union[str, Path, None] = None,
        rates_on_resume: str = "checkpoint",
    ) -> None:
        """Train ``task``.

        Args:
            task: the task.
            train_dataloaders: a ``oneflow.utils.data.DataLoader`` or any iterable of batches.
                Default: ``task.train_dataloader()``.
            val_dataloaders: one, or a list of DataLoaders. Default: ``task.val_dataloader()``.
            ckpt_path: a checkpoint of a run, which goes on as if it had never stopped, in either
                mode. "last" takes the newest that is whole among those of the
                ``ModelCheckpoint`` callbacks, or else below ``default_root_dir``, and begins
                anew where there is none.
            rates_on_resume: which rates count where those of the checkpoint and those of the
                code differ: "checkpoint" goes on with the checkpoint's schedule, rates, scales
                and decay; "config" takes the code's, as if they had been so from the start.

        Raises:
            OFEngineError: something does not fit together; raised before training starts.
        """
        if self.restart_on_crash:
            ckpt_path = self._supervised(ckpt_path)
        self._attach(task)
        arguments.check_choice("rates_on_resume", rates_on_resume, POLICIES)
        self._reset_progress()
        connect.check_step(task, "train")
        connect.add_rate_callback(self.callbacks, self.mode)
        self.resumed = self._find(ckpt_path)
        _ = self.log_dir  # a folder that cannot be made is told before training
        if self.mode == "graph":
            connect.check_graph_mode(self, task)
        self._run(
            "fit",
            lambda: self._fit(task, train_dataloaders, val_dataloaders, rates_on_resume),
        )

    def validate(
        self, task: TaskModule, dataloaders: Any = None, ckpt_path: Union[str, Path, None] = None
    ) -> List[Dict[str, float]]:
        """Run ``validation_step`` over the data; return its metrics, a dict for each dataloader.

        ``ckpt_path`` names saved weights to load first.
        """
        return self._evaluate("validation", task, dataloaders, ckpt_path)

    def test(
        self, task: TaskModule, dataloaders: Any = None, ckpt_path: Union[str, Path, None] = None
    ) -> List[Dict[str, float]]:
        """As :meth:`validate`, with ``test_step``."""
        return self._evaluate("test", task, dataloaders, ckpt_path)

    def predict(
        self, task: TaskModule, dataloaders: Any = None, ckpt_path: Union[str, Path, None] = None
    ) -> List[Any]:
        """What ``predict_step`` returned for each batch; with several dataloaders, a list each."""
        self._evaluate("predict", task, dataloaders, ckpt_path)
        return self.predictions[0] if len(self.predictions) == 1 else self.predictions

    def preview(
        self, task: TaskModule, train_dataloaders: Any = None, steps_per_epoch: Optional[int] = None
    ) -> Preview:
        """Every group's rate over the run that ``fit`` would make, without making it.

        See :func:`ofengine.rates.preview.preview`.
        """
        from ofengine.rates.preview import preview

        return preview(self, task, train_dataloaders, steps_per_epoch)

    def lr_find(self, task: TaskModule, train_dataloaders: Any = None, **options: Any) -> LRFinder:
        """Try rising rates on ``task`` and put everything back.

        See :func:`ofengine.rates.finder.lr_find`, which takes the same ``options``.
        """
        from ofengine.rates.finder import lr_find

        return lr_find(self, task, train_dataloaders, **options)

    # ------------------------------------------------------------------ inside

    def _fit(
        self,
        task: TaskModule,
        train_dataloaders: Any,
        val_dataloaders: Any,
        rates_on_resume: str,
    ) -> None:
        keep = self._overfit is not None
        limits = dict.fromkeys(self._limits, self._overfit) if keep else self._limits
        train = connect.training_batches(self, task, train_dataloaders, limits["train"], keep)
        validation = connect.evaluation_batches(
            self, task, "validation", val_dataloaders, limits["validation"], keep
        )
        self.train_batches, self.validation_batches = train, validation
        self.has_validation = bool(validation)
        self.num_training_batches = train.count
        self.val_every_batches = arguments.batches_between_validations(
            self._val_check_interval, train.count or None
        )
        task.to(self.device)
        if self.seed is not None:
            seed_everything(self.seed)
        made = read_optimizers(connect.configure_optimizers(task), type(task).__name__)
        self.optimization = made
        self._rates = connect.make_plan(task, made, train.count, self.accumulate_grad_batches)
        self.rates.stop = self.total_steps
        if self.resumed is not None:
            self.resumed.check(self, rates_on_resume)
            self.resumed.restore_run(self)
        self.hooks.fire("on_fit_start")
        if self.resumed is not None:
            self.resumed.restore_rates(self, rates_on_resume)
        check_rates(self.rates, made, self.total_steps, self.max_epochs, self.global_step)
        self.begun_at = time.monotonic()
        if self._seconds is not None:
            self.deadline = self.begun_at + self._seconds - self.seconds_before
        if train.count == 0:
            log.info("limit_train_batches is 0: nothing is trained.")
        else:
            fit_loop(self, train, validation)
        synchronize()
        self._leave_rates_behind()
        self.data_states_after_fit = {
            "now": states_in(None, train.source),
            "at_pass": train.states_at_start,
            "at_validation": [each.states_at_start for each in validation],
        }
        self.hooks.fire("on_fit_end")

    def _supervised(self, ckpt_path: Union[str, Path, None]) -> Union[str, Path, None]:
        """Run the script again as a child; in the child, what ``fit`` resumes from."""
        if not any(callback.fires_last for callback in self.callbacks):
            raise ConfigurationError(
                "restart_on_crash needs checkpoints to go on from: list a ModelCheckpoint, or "
                "leave enable_checkpointing on."
            )
        if supervisor.tries() is None:
            supervisor.supervise(self.restart_on_crash)
        if self._rates is not None:
            raise ConfigurationError(
                "restart_on_crash starts the whole script again, so it works for one fit() only: "
                "put the second one into a script of its own."
            )
        if supervisor.tries() == 1:
            return ckpt_path
        found = find_checkpoint(self, "last", supervisor.begun_at())
        return ckpt_path if found is None else found.path

    def _find(self, ckpt_path: Union[str, Path, None]) -> Optional[Resumed]:
        """The run of a checkpoint, where there is one to be resumed; the loggers know of it."""
        if ckpt_path is None:
            return None
        checkpoint = find_checkpoint(self, ckpt_path)
        if checkpoint is None:
            log.info("ckpt_path='last': there is no checkpoint yet, training begins anew.")
            return None
        resumed = Resumed(self, checkpoint)
        resumed.tell_loggers(
            self, continue_files=str(ckpt_path) == "last" or bool(self.restart_on_crash)
        )
        return resumed

    def _evaluate(
        self, stage: str, task: TaskModule, dataloaders: Any, ckpt_path: Union[str, Path, None]
    ) -> List[Dict[str, float]]:
        self._attach(task)
        connect.check_step(task, stage)
        self.predictions = []
        results: List[Dict[str, float]] = []

        def body() -> None:
            limit = self._limits[stage]
            loaders = connect.evaluation_batches(self, task, stage, dataloaders, limit)
            if limit is None or limit > 0:
                connect.require_data(task, stage, loaders)
            task.to(self.device)
            if ckpt_path is not None:
                load_weights(task, ckpt_path)
            results.extend(evaluation_loop(self, stage, loaders))

        self._run(connect.VERB_OF_STAGE[stage], body)
        return results

    def _run(self, stage: str, body: Any) -> None:
        """``setup``, ``body``, ``teardown``; ``on_exception`` where something is raised."""
        task = self.task
        main = threading.current_thread() is threading.main_thread()
        if self.mode == "graph" and stage == "fit" and not main:
            raise GraphModeError(
                "OneFlow trains static graphs in the main thread only: call fit() there, or use "
                'Trainer(mode="eager").'
            )
        warn_of_misspelt_methods(task, self.callbacks)
        self.hooks = HookRunner(self, task, self.callbacks)
        runners: Dict[str, Runner] = {
            name: (GraphMode if name == "graph" else EagerMode)(self, task, self.hooks)
            for name in {self.mode, self.eval_mode}
        }
        self.mode_runner = runners[self.mode]
        self.eval_runner = runners[self.eval_mode]
        if stage == "fit":
            self.fit_runner = self.mode_runner
        self.interrupts = InterruptGuard()
        status = "failed"
        with CrashReport(), self.interrupts:
            try:
                self.hooks.fire("setup", stage)
                body()
                self.interrupts.check()  # one may have come in the last hooks
                status = "success"
            except BaseException as error:
                self._tell_culprit(error)
                self.hooks.fire("on_exception", error)
                raise
            finally:
                self.metrics.reset()
                self.train_batches = None
                self.validation_batches = []
                self.sanity_checking = False
                for runner in runners.values():
                    runner.close()
                # One that fails must not keep the others from theirs.
                with contextlib.ExitStack() as stack:
                    for each in reversed(self.loggers):
                        stack.callback(each.finalize, status)
                    for call in reversed(self.hooks.calls["teardown"]):
                        stack.callback(call, stage)

    def _tell_culprit(self, error: BaseException) -> None:
        if isinstance(error, (OFEngineError, KeyboardInterrupt, SystemExit)):
            return  # they speak for themselves
        culprit = culprit_of(error)
        if culprit is not None:
            log.error(
                "%s raised %s in epoch %d, batch %d (after step %d).",
                culprit, type(error).__name__, self._current_epoch, self.batch_idx, self.steps_done,
            )  # fmt: skip

    def _attach(self, task: Any) -> None:
        if not isinstance(task, TaskModule):
            mend = "give an object of a TaskModule subclass"
            if isinstance(task, type) and issubclass(task, TaskModule):
                mend = f"call it first, as in {task.__name__}()"
            raise ConfigurationError(f"the first argument is {describe(task)}: {mend}.")
        if "_modules" not in vars(task):
            raise ConfigurationError(
                f"{type(task).__name__}.__init__ must call super().__init__() first."
            )
        self.task = task
        task._trainer = self
        self.metrics.forget()

    def _leave_rates_behind(self) -> None:
        """Leave scheduler and groups as a loop written by hand would have left them."""
        made = self.optimization
        assert made is not None
        if isinstance(made.scheduler, LRScheduler):
            for _ in range(self.rates.position(self.global_step)):
                made.scheduler.step()
        # A function or a table need not know the step after the last one.
        asked = made.scheduler is None or isinstance(made.scheduler, LRScheduler)
        step = self.global_step if asked else max(self.global_step - 1, 0)
        if self.mode == "eager":
            for group, lr in zip(made.optimizer.param_groups, self.rates.unscaled(step)):
                group["lr"] = lr


def _configure_logging() -> None:
    """Show the engine's messages, unless the user has set up logging."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO)
