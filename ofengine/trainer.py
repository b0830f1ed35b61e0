"""Trainer: makes the settings, puts a run together, and carries out the four verbs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import attrs

from ofengine.callback import Callback
from ofengine.checkpoint.file import write
from ofengine.checkpoint.find import CheckpointPath, supervised, weights_file
from ofengine.checkpoint.of_task import load_checkpoint
from ofengine.checkpoint.snapshot import content_of
from ofengine.data_module import DataModule
from ofengine.defaults import (
    KnowsCallbacks,
    add_rate_callback,
    add_task_callbacks,
    configure_logging,
    make_callbacks,
    make_loggers,
)
from ofengine.errors import warn
from ofengine.loggers import Logger
from ofengine.rates.finder import LRFinder
from ofengine.rates.optimizers import Optimization
from ofengine.rates.plan import RatePlan
from ofengine.rates.planning import epoch_length, plan_run
from ofengine.rates.preview import Preview, preview
from ofengine.rates.resume import POLICIES
from ofengine.run import connect, starting, together
from ofengine.run.arguments import Limit, MaxTime, check_choice
from ofengine.run.devices import move
from ofengine.run.fitting import fit_run
from ofengine.run.hooks import HookRunner
from ofengine.run.loops import evaluation_loop
from ofengine.run.mode import Mode
from ofengine.run.profiling import watch_data
from ofengine.run.settings import CHECKS, Settings, arguments_of, refuse_arguments
from ofengine.run.state import Run
from ofengine.run.verb import alone_in_training, carry_out, refuse_within
from ofengine.run.view import Content
from ofengine.run.windows import Accumulation
from ofengine.task import TaskModule
from ofengine.trials.batch_size import scale_batch_size
from ofengine.trials.lr_find import lr_find
from ofengine.trials.proof import Report
from ofengine.trials.prove import prove
from ofengine.trials.prove_ranks import prove_ranks


class Trainer(KnowsCallbacks):
    """Trains, validates, tests and predicts with a :class:`~ofengine.TaskModule`.

    Args:
        mode: "eager" or "graph". Both compute the same thing.
        device: "auto" (a GPU where OneFlow can use one), "cpu", "cuda" or "cuda:N".
        devices: ranks on each machine, each a process: "auto" for those that this script was
            started with, or one. A script that is started plainly with more starts them itself.
        num_nodes: machines.
        strategy: "auto", "ddp", or "zero": each rank keeps a part of the optimizer's state.
        sync_batchnorm: on several ranks, let batch norms normalize by the batches of all.
        precision: "32-true", or on GPUs in graph mode "16-mixed" or "bf16-mixed".
        max_epochs: epochs to train. Default: 1000, or no limit where ``max_steps`` or
            ``max_time`` is given. -1 means no limit.
        max_steps: optimizer steps to train; -1 means no limit.
        min_epochs: epochs that are trained before ``should_stop``, which EarlyStopping sets, ends
            training; and ``min_steps``, in optimizer steps.
        max_time: time to train, as "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
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
        accumulate_grad_batches: batches whose gradients are averaged into one optimizer step; a
            dict such as {0: 1, 5: 4} says so by the epoch from which on it is so many. The last
            window of an epoch may be shorter; it is averaged over what it has.
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
        detect_anomaly: look at loss, gradients and weights after each step; where they are not
            finite, replay the step eagerly and say where that arose. Slow.
        profiler: "simple" prints where the time of each verb went, and writes a trace for Chrome.
        cpu_speedups: on a CPU, compute some layers by operators that are faster there, see
            :class:`~ofengine.cpu_speedups`. Last bits differ from those without.

    Raises:
        ConfigurationError: an argument is wrong.
        DeviceError: the device is not there.
    """

    def __init__(
        self,
        *,
        mode: str = "eager",
        device: str = "auto",
        devices: Union[int, str] = "auto",
        num_nodes: int = 1,
        strategy: str = "auto",
        sync_batchnorm: bool = False,
        precision: Union[int, str] = "32-true",
        max_epochs: Optional[int] = None,
        max_steps: int = -1,
        min_epochs: Optional[int] = None,
        min_steps: Optional[int] = None,
        max_time: MaxTime = None,
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
        accumulate_grad_batches: Accumulation = 1,
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
        detect_anomaly: bool = False,
        profiler: Optional[str] = None,
        cpu_speedups: bool = False,
        **_unknown: Any,
    ) -> None:
        configure_logging()
        given = locals()
        settings = Settings.of({name: given[name] for name, _ in CHECKS}, _unknown)
        loggers = make_loggers(logger, settings)
        self._run = Run.new(settings, make_callbacks(callbacks, settings), loggers)

    # ------------------------------------------------------------------ verbs

    @alone_in_training()
    def fit(
        self,
        task: TaskModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        ckpt_path: Union[str, Path, None] = None,
        rates_on_resume: str = "checkpoint",
        datamodule: Optional[DataModule] = None,
        **_unknown: Any,
    ) -> None:
        """Train ``task``.

        Args:
            task: the task.
            train_dataloaders: a ``oneflow.utils.data.DataLoader`` or any iterable of batches; a
                dict or list of several, see :class:`~ofengine.CombinedLoader`; or a
                :class:`~ofengine.DataModule`. Default: ``task.train_dataloader()``.
            val_dataloaders: one, or a list or dict of DataLoaders. Default:
                ``task.val_dataloader()``.
            ckpt_path: a checkpoint of a run, which goes on as if it had never stopped, in either
                mode. "last" takes the one that is furthest, by what the files say and not by
                their dates, of the run that saved last, among those of the ``ModelCheckpoint``
                callbacks, or else below ``default_root_dir``; it begins anew where there is
                none. "best" takes the ``best_model_path`` of the first ``ModelCheckpoint`` that
                has one, from the ``fit`` before.
            rates_on_resume: which rates count where those of the checkpoint and those of the
                code differ: "checkpoint" goes on with the checkpoint's schedule, rates, scales
                and decay; "config" takes the code's, as if they had been so from the start.
            datamodule: has the data, in the place of the dataloaders.

        Raises:
            OFEngineError: something does not fit together; raised before training starts.
        """
        refuse_arguments("fit", _unknown, arguments_of(self.fit))
        refuse_within(self, task, "fit")
        starting.start_missing_ranks(self.settings)
        if self.restart_on_crash:
            ckpt_path = supervised(self._run, ckpt_path)
        connect.check_task(task)
        check_choice("rates_on_resume", rates_on_resume, POLICIES)
        self._run = run = Run.new(self.settings, self.callbacks, self.loggers)
        data = connect.take_datamodule(
            run, self, "fit", datamodule, train_dataloaders, val_dataloaders
        )
        connect.attach(self._run, self, task)
        add_task_callbacks(run.callbacks, task)
        connect.check_step(task, "train")
        add_rate_callback(run.callbacks, self.mode)
        together.begin(run, "fit")
        resumed = starting.find_run(run, ckpt_path)
        together.share_folders(run)  # one that cannot be made is told before training
        if self.mode == "graph":
            connect.check_graph_mode(run)

        def body(hooks: HookRunner, eval_mode: Mode) -> None:
            fit_run(run, hooks, eval_mode, data, val_dataloaders, resumed, rates_on_resume)

        carry_out(self, self._run, "fit", body)

    def validate(
        self,
        task: TaskModule,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath = None,
        datamodule: Optional[DataModule] = None,
        **_unknown: Any,
    ) -> List[Dict[str, float]]:
        """Run ``validation_step`` of ``task``; return its metrics, a dict for each dataloader.

        ``dataloaders`` is one or several, or ``datamodule`` has them; else the task's own method is
        asked. ``ckpt_path`` names saved weights to load first; "best", "last" are as in ``fit``.
        """
        return self._evaluate("validation", task, dataloaders, ckpt_path, datamodule, _unknown)[0]

    def test(
        self,
        task: TaskModule,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath = None,
        datamodule: Optional[DataModule] = None,
        **_unknown: Any,
    ) -> List[Dict[str, float]]:
        """As :meth:`validate` with ``task, dataloaders, ckpt_path, datamodule``: ``test_step``."""
        return self._evaluate("test", task, dataloaders, ckpt_path, datamodule, _unknown)[0]

    def predict(
        self,
        task: TaskModule,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath = None,
        datamodule: Optional[DataModule] = None,
        return_predictions: bool = True,
        **_unknown: Any,
    ) -> List[Any]:
        """What ``predict_step`` returned for each batch; with several dataloaders, a list each.

        ``task, dataloaders, ckpt_path, datamodule`` are as of :meth:`validate`;
        ``return_predictions=False`` keeps none of it, as where a ``PredictionWriter`` writes it.
        """
        given = (dataloaders, ckpt_path, datamodule, _unknown, return_predictions)
        predictions = self._evaluate("predict", task, *given)[1]
        return predictions[0] if len(predictions) == 1 else predictions

    def preview(
        self, task: TaskModule, train_dataloaders: Any = None, steps_per_epoch: Optional[int] = None
    ) -> Preview:
        """Every group's rate over the run that ``fit`` of ``task`` would make, without making it.

        ``train_dataloaders`` are as in ``fit``, and only their length is asked for;
        ``steps_per_epoch`` are optimizer steps, instead of that length. See
        :func:`ofengine.rates.preview.preview`.
        """
        with connect.training_source(self, train_dataloaders) as source:
            batches = epoch_length(self.settings, task, source, steps_per_epoch)
        with self._imagining(task, batches) as decays:
            return preview(self.settings, task, batches, decays)

    def lr_find(self, task: TaskModule, train_dataloaders: Any = None, **options: Any) -> LRFinder:
        """Try rising rates on ``task`` and put everything back.

        ``train_dataloaders`` are as in ``fit``, ``options`` those of
        :func:`ofengine.trials.lr_find.lr_find`.
        """
        starting.start_missing_ranks(self.settings)

        def plan(batches: Optional[int]) -> Tuple[Optional[Optimization], RatePlan]:
            with self._imagining(task, batches) as decays:
                return plan_run(self.settings, task, batches, decays)

        with connect.training_source(self, train_dataloaders) as source:
            return lr_find(self.settings, task, source, plan, _fit_apart, **options)

    def scale_batch_size(self, task: TaskModule, train_dataloaders: Any = None, **how: Any) -> int:
        """The most rows in a batch of ``train_dataloaders`` that ``task`` can be trained on.

        ``how``: see :func:`ofengine.trials.batch_size.scale_batch_size`.
        """
        with connect.training_source(self, train_dataloaders) as source:
            return scale_batch_size(self.settings, task, source, _fit_apart, **how)

    def prove(self, task: TaskModule, train_dataloaders: Any = None, steps: int = 20) -> Report:
        """Run ``task`` in both modes, whole and resumed, compare all bits, put everything back.

        ``steps`` optimizer steps of ``train_dataloaders``; several ranks are compared with one
        process that accumulates. See ``prove`` in ``ofengine.trials.prove`` and ``prove_ranks``.
        """
        starting.start_missing_ranks(self.settings)
        proof = prove if self.settings.world is None else prove_ranks
        with connect.training_source(self, train_dataloaders) as source:
            return proof(self.settings, self.callbacks, task, source, _fit_apart, steps=steps)

    # ------------------------------------------------------------------ saving

    def save_checkpoint(self, path: Union[str, Path], **_unknown: Any) -> Path:
        """See :meth:`RunView.save_checkpoint`."""
        refuse_arguments("save_checkpoint", _unknown)
        if not self.is_global_zero:
            return Path(path)
        weights, state, metadata = content = self.checkpoint_content()
        broken = None if state is None else self.not_finite(content)
        if broken is not None:
            warn(f"save_checkpoint({str(path)!r}) saves it, though {broken}.")
        if state is not None and self._run.weights_left:
            warn(
                f"save_checkpoint({str(path)!r}) saves the weights that training ended with, and "
                "not those that a callback has left in the task: write these by "
                "ofengine.checkpoint.save_weights(task, path)."
            )
        return write(path, weights, state, metadata)

    def checkpoint_content(self) -> Content:
        """See :meth:`RunView.checkpoint_content`."""
        return content_of(self._run)

    # ------------------------------------------------------------------ all verbs

    def _evaluate(
        self,
        stage: str,
        task: TaskModule,
        dataloaders: Any,
        ckpt_path: CheckpointPath,
        datamodule: Optional[DataModule],
        unknown: Mapping[str, Any],
        keeps: bool = True,
    ) -> Tuple[List[Dict[str, float]], List[List[Any]]]:
        verb = connect.VERB_OF_STAGE[stage]
        refuse_arguments(verb, unknown, arguments_of(getattr(self, verb)))
        refuse_within(self, task, verb)
        starting.start_missing_ranks(self.settings)
        data = connect.take_datamodule(self._run, self, verb, datamodule, dataloaders)
        connect.attach(self._run, self, task)
        add_task_callbacks(self._run.callbacks, task)
        connect.check_step(task, stage)
        together.begin(self._run, verb)

        def body(hooks: HookRunner, mode: Mode) -> Tuple[List[Dict[str, float]], List[List[Any]]]:
            loaders = connect.evaluation_batches(self._run, stage, data)
            limit = self.settings.limit(stage)
            if limit is None or limit > 0:
                connect.require_data(self._run, stage, loaders)
            watch_data(self._run, loaders)
            move(task, self.device)
            if ckpt_path is not None:
                run = self._run
                path = together.of_rank_zero(run, lambda: str(weights_file(run, ckpt_path)))
                load_checkpoint(task, path)
            together.share_weights(self._run)
            return evaluation_loop(self._run, hooks, mode, stage, loaders, keeps=keeps)

        return carry_out(self, self._run, verb, body)

    @contextlib.contextmanager
    def _imagining(self, task: TaskModule, batches: Optional[int]) -> Iterator[Any]:
        """Let ``task`` ask about a run that is not made, and leave both as they were."""
        kept, of_task = self._run, task.__dict__.get("_trainer")
        self._run = Run.new(kept.settings, kept.callbacks, kept.loggers)
        self._run.task, self._run.epoch_length = task, batches
        self._run.batches_per_epoch = None if batches is None else self._run.rounds(batches)
        task._trainer = self
        try:
            yield connect.decay_events(kept.settings, kept.callbacks)
        finally:
            self._run = kept
            del task.__dict__["_trainer"]
            if of_task is not None:
                task.__dict__["_trainer"] = of_task


def _fit_apart(
    settings: Settings, callbacks: List[Callback], task: TaskModule, source: Any, *ckpt_path: Any
) -> None:
    """A ``fit`` of a Trainer of its own, without loggers."""
    trainer = Trainer.__new__(Trainer)
    trainer._tries_apart = True
    trainer._run = Run.new(attrs.evolve(settings, profiler=None), callbacks, [])
    trainer.fit(task, source, None, *ckpt_path)
