"""RunView: what a callback, a task or a logger may read of a run, and the little it may ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple, Union

from oneflow import nn
from oneflow.optim import Optimizer

from ofengine.errors import ConfigurationError, RankError, UnknownAttributeError
from ofengine.loggers.base import Logger
from ofengine.metrics.history import History
from ofengine.metrics.log import Metrics
from ofengine.ranks.meetings import Purpose
from ofengine.ranks.messages import pack, unpack
from ofengine.rates.plan import RatePlan
from ofengine.run import report
from ofengine.run.lightning import TRAINER_ATTRIBUTES, mend_for
from ofengine.run.profile import Profile
from ofengine.run.progress import Point, Progress
from ofengine.run.told import ToldView
from ofengine.tracing import forbid_in_trace

Content = Tuple[Dict[str, Any], Optional[Dict[str, Any]], Dict[str, Any]]
"""Weights, state of the run, and metadata of a checkpoint."""
Step = Callable[[Any, int], Any]
"""Computes the loss of a batch, given its index."""


class ByName(Dict[str, Optimizer]):
    """A dict that tells who asks it by a number, as Lightning's list of optimizers is."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int):
            raise ConfigurationError(
                f"trainer.optimizers is a dict by name: write trainer.optimizers"
                f"[{next(iter(self), 'optimizer')!r}], or trainer.optimizer where there is one."
            )
        raise KeyError(key)


class RunView(ToldView):
    """The ``trainer`` that hooks are given and ``self.trainer`` of a task.

    Everything here may be read at any time, but in a compiled step only what stays the same
    (``run.constants.CONSTANTS``); ``should_stop`` alone may be set. :class:`ofengine.Trainer`
    adds the four verbs.
    """

    _tries_apart = False
    """True where ``fit`` is the engine's own, which tries something and puts all back."""

    def __getattr__(self, name: str) -> Any:
        """Nothing is called ``name``: say what Lightning's name for it is here."""
        mend = mend_for(TRAINER_ATTRIBUTES, name)
        if mend is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UnknownAttributeError(f"trainer.{name} is Lightning's name: {mend}.")

    # ------------------------------------------------------------------ where the run is

    @property
    def progress(self) -> Progress:
        """Epoch, batch, step and point, as they are at this moment; the engine's to change."""
        return self._run.progress

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far. Not readable inside a compiled step."""
        return self._run.progress.global_step

    @property
    def current_epoch(self) -> int:
        """The epoch being run, from 0. Not readable inside a compiled step."""
        return self._run.progress.epoch

    @property
    def batch_idx(self) -> int:
        """The training batch stepped last, from 0 in each epoch. Not readable inside a trace."""
        return self._run.progress.batch_idx

    @property
    def batches_seen(self) -> int:
        """Training batches done in the whole run."""
        return self._run.progress.batches_seen

    @property
    def should_stop(self) -> bool:
        """Set it to True to end training after the batch at hand, or the epoch in its end."""
        return self._run.should_stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        forbid_in_trace("trainer.should_stop")
        self._run.should_stop = stop

    @property
    def sanity_checking(self) -> bool:
        """True in the few validation batches that are tried before training."""
        return self._run.sanity_checking

    @property
    def has_validation(self) -> bool:
        """True where ``fit`` has validation data, and the task a ``validation_step``."""
        return self._run.has_validation

    @property
    def num_training_batches(self) -> Optional[int]:
        """Batches in an epoch, or None where that is not known ahead."""
        return self._run.batches_per_epoch

    @property
    def num_evaluation_batches(self) -> Optional[int]:
        """Batches in the evaluation going on, of all its dataloaders; None where not known."""
        return self._run.evaluation_batches

    @property
    def total_steps(self) -> Optional[int]:
        """The optimizer steps that ``fit`` will make, or None where that is not known ahead."""
        return self._run.total_steps

    @property
    def is_last_batch(self) -> bool:
        """True at the last batch of an epoch, from its ``on_train_batch_start`` on."""
        return self._run.progress.is_last_batch

    @property
    def estimated_stepping_batches(self) -> Union[int, float]:
        """As ``total_steps``, and infinite where that is not known ahead; Lightning's name."""
        total = self.total_steps
        return math.inf if total is None else total

    @property
    def seconds_trained(self) -> float:
        """Seconds since training began, those before a resumption included."""
        return self._run.seconds_trained

    @property
    def run_id(self) -> str:
        """What tells this run from all others; a resumed run keeps it."""
        return self._run.id

    @property
    def resumed_from(self) -> Optional[Path]:
        """The checkpoint file that this ``fit`` goes on from; None where it begins anew."""
        return self._run.resumed_from

    @property
    def resumes_within_epoch(self) -> bool:
        """True in ``on_train_start`` where a resumed run goes on in the middle of an epoch."""
        return self._run.resumes_within_epoch

    @property
    def can_save(self) -> bool:
        """True in a ``fit`` that has trained, at a moment that can be resumed from exactly."""
        run = self._run
        return (
            run.plan is not None
            and run.train is not None
            and run.progress.batches_seen > 0
            and run.progress.point is not Point.STEP
            and not run.telling.is_lost(run.progress.point)
            and not run.interrupts.hurried
            and run.moments_resumed is None
            and (run.ranks is None or not run.ranks.over)
        )

    # ------------------------------------------------------------------ what it consists of

    @property
    def callbacks(self) -> List[Any]:
        """All callbacks, those that are there by default included."""
        return self._run.callbacks

    @property
    def task(self) -> Any:
        """The task of the verb that is running, or ran last."""
        return self._run.task

    @property
    def datamodule(self) -> Any:
        """The ``DataModule`` that the verb was given; None where it was given none."""
        return self._run.datamodule

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the running or last ``fit``; of several see ``optimizers``."""
        return self._run.made.optimizer

    @property
    def optimizers(self) -> Dict[str, Optimizer]:
        """The optimizers of the running or last ``fit`` by name; a single one's is "optimizer"."""
        of_each = self._run.each().items()
        return ByName({n or "optimizer": each.made.optimizer for n, each in of_each})

    @property
    def param_groups(self) -> List[Any]:
        """The parameter groups of all optimizers, in the order of ``rates.names``."""
        return [group for each in self.optimizers.values() for group in each.param_groups]

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler of the running or last ``fit``, or None."""
        run = self._run
        return None if run.optimization is None and not run.parts else run.made.scheduler

    @property
    def parameters(self) -> List[Any]:
        """The parameters that train, of all groups, in this epoch."""
        return [each for run in self._run.each().values() for each in run.parameters]

    @property
    def rates(self) -> RatePlan:
        """The plan of all rates, of the running or last ``fit``."""
        return self._run.rates

    @property
    def metrics(self) -> Metrics:
        """What ``log`` records."""
        return self._run.metrics

    @property
    def callback_metrics(self) -> Dict[str, float]:
        """The latest value of every logged metric. Waits for the device where one is pending."""
        return self._run.metrics.values

    @property
    def logged_metrics(self) -> Dict[str, float]:
        """The latest value of every metric that the loggers were sent. Waits for nothing."""
        return dict(self._run.metrics.logged)

    @property
    def history(self) -> History:
        """What the loggers were sent in this run: rows by epoch and step, the newest last."""
        return self._run.history

    @property
    def progress_bar_metrics(self) -> Dict[str, float]:
        """The values read last of the metrics for the progress bar. Waits for nothing."""
        return self._run.metrics.progress_bar

    @property
    def loggers(self) -> List[Logger]:
        """All loggers."""
        return self._run.loggers

    @property
    def logger(self) -> Optional[Logger]:
        """The first logger, or None."""
        return self._run.loggers[0] if self._run.loggers else None

    @property
    def log_dir(self) -> Optional[str]:
        """The folder of the first logger that has one, or None."""
        return next((each.log_dir for each in self._run.loggers if each.log_dir), None)

    # ------------------------------------------------------------------ what may be asked for

    def print(self, *values: Any, **options: Any) -> None:
        """Python's ``print(*values, **options)``, on rank 0 alone."""
        if self.is_global_zero:
            print(*values, **options)

    def gather(self, value: Any) -> List[Any]:
        """Each rank's ``value``, in the order of ranks, on all of them; one process gets its own.

        Tensors, arrays, numbers, texts, and lists, tuples and dicts of these. All ranks call it at
        the same point of the run, or all raise :class:`RankError`; a rank that has no batch comes
        to no hook of a batch. Not to be called inside a compiled step.
        """
        ranks = self._run.ranks
        if ranks is None:
            return [value]
        if ranks.over:
            raise RankError("trainer.gather() was called after an error, when no rank waits.")
        said = ranks.talk(pack(value), Purpose.GATHER)
        return [unpack(each, self.device) for each in said]

    def log_metrics(self, metrics: Dict[str, float]) -> None:
        """Send ``metrics`` to the loggers and to ``callback_metrics``, with step and epoch."""
        report.log_metrics(self._run, metrics)

    def set_lr(self, group: str, lr: float) -> None:
        """Give the parameter group called ``group`` the base rate ``lr`` from the next step on.

        A schedule goes on over the new rate; ``lr_scale`` and decay keep multiplying. In graph
        mode the graph is compiled anew. Raises :class:`RateError` for an unknown group or a
        rate that is negative or not finite.
        """
        self._run.rates.set_lr(group, lr, self.global_step)
        self._run.training_mode.rebuild(f"set_lr({group!r}, {lr:g})")

    def scale_batch_size(self, task: Any, train_dataloaders: Any = None, **how: Any) -> int:
        """The most rows in a batch of ``train_dataloaders`` that ``task`` can be trained on.

        The script is run again for each try: see :meth:`ofengine.Trainer.scale_batch_size`.
        """
        raise ConfigurationError("this run cannot try others.")

    def set_weights_aside(self, weights: Dict[str, Any], for_good: bool = False) -> None:
        """While a callback has other weights in the task, let checkpoints hold these, by name.

        ``for_good``, where the others stay in the task: up to the next ``fit``. Of several
        callbacks that do so, the first has what training ended with, which counts.
        """
        if for_good:
            self._run.weights_left = {**weights, **self._run.weights_left}
        else:
            self._run.weights_aside = weights

    def settle(self) -> None:
        """Bring the task up to date: compiled steps leave ``num_batches_tracked`` for later."""
        if self._run.mode is not None:
            self._run.mode.settle()

    def not_finite(self, content: Optional[Content] = None) -> Optional[str]:
        """What of the task's weights is not finite, in words; None where all are as they should be.

        Or of ``content``, which :meth:`checkpoint_content` gave, the optimizer's state included.
        What was infinite when training began, such as a mask, may be so. Waits for the device.
        """
        if content is None:
            return self._run.broken()
        return self._run.broken(content[0], content[1])

    def leaving_no_trace(self) -> ContextManager[Step]:
        """A block that may compute steps of the task; all that they do is undone at its end.

        ::

            with trainer.leaving_no_trace() as step:
                loss = step(batch, batch_idx)  # that of training_step, computed eagerly
                loss.backward()  # each .grad was None, and is this batch's alone
                norm = task.head.weight.grad.norm()

        In ``on_train_batch_start``, it is the step to come, in both modes to the bit: the same
        weights, and the same random numbers. Of several optimizers it is the sum of the losses of
        those whose turn it is, all with the weights of before the batch, and each parameter has the
        gradient of its own optimizer's. At the end of the block, put back are parameters,
        buffers and gradients, the attributes of all modules (down to dicts and lists, and the
        hooks among them), the sums of metrics, what was logged, and where all generators stand.
        Takes a copy of the model, and the time of the steps; waits for the device.

        Raises :class:`ConfigurationError` outside of training, and on several ranks.
        """
        raise ConfigurationError("this run cannot compute a step on the side.")

    @property
    def profile(self) -> Optional[Profile]:
        """Where the time of the verb that runs, or ran last, went; None without a profiler."""
        return self._run.profile

    def default_train_graph(self) -> nn.Graph:
        """What ``TaskModule.build_graph`` returns unless it is overridden."""
        return self._run.training_mode.default_train_graph()

    def lower_rates(self, graph: nn.Graph) -> None:
        """Compile the plan's rates, from this step on, into ``graph``, not compiled yet."""
        self._run.training_mode.lower_rates(graph)

    def save_checkpoint(self, path: Union[str, Path]) -> Path:
        """Write a checkpoint to ``path`` (safetensors), from which a run can be resumed.

        From a callback, save in ``on_train_batch_end`` or later, and with ``fires_last = True``:
        what callbacks behind it do for the same batch is not in the checkpoint. A Trainer that
        did not train saves the weights only. Where a callback has left others in the task than
        training ended with, as StochasticWeightAveraging does, it saves the latter, and warns.

        Raises :class:`CheckpointError` where the file cannot be written; the training, and the
        file that was there, are as before. :class:`ConfigurationError` where there is no run.
        """
        raise ConfigurationError("this run cannot be saved.")

    def checkpoint_content(self) -> Content:
        """The weights, the state of the run, and the metadata of a checkpoint of this moment.

        Raises :class:`ConfigurationError` where there is no run.
        """
        raise ConfigurationError("this run cannot be saved.")
