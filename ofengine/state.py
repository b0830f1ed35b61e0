"""RunState: what a Trainer knows of its run, and what callbacks, loops and modes ask it."""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine.checkpoint import array_of, arrays_of, write
from ofengine.course import Point
from ofengine.errors import ConfigurationError
from ofengine.hooks import Callback, HookRunner
from ofengine.interrupts import InterruptGuard
from ofengine.loggers import Logger
from ofengine.metrics import Metrics
from ofengine.modes.eager import EagerMode
from ofengine.modes.graph import GraphMode
from ofengine.modes.steps import clip_gradients
from ofengine.optimizers import Optimization
from ofengine.rates.calendar import ceil_div
from ofengine.rates.plan import RatePlan
from ofengine.snapshot import state_of_run
from ofengine.tracing import forbid_in_trace

if TYPE_CHECKING:
    from ofengine.data import Batches
    from ofengine.resume import Resumed
    from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_TABLE_STEPS = 10_000
"""How many steps of rates are compiled in at first where the run's length is not known."""

Runner = Union[EagerMode, GraphMode]


class RunState:
    """The part of a :class:`~ofengine.Trainer` that callbacks, loops and modes look at.

    The Trainer adds the arguments and the four verbs.
    """

    # Set by the Trainer's arguments.
    mode: str
    seed: Optional[int]
    device: flow.device
    max_epochs: int
    max_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: Optional[float]
    gradient_clip_algorithm: str
    callbacks: List[Callback]
    loggers: List[Logger]
    metrics: Metrics
    interrupts: InterruptGuard
    # Set by every verb, before anything asks for them.
    task: TaskModule
    run_seed: int
    hooks: HookRunner
    mode_runner: Runner
    eval_runner: Runner
    fit_runner: Runner
    """The mode runner of the running or last ``fit``."""
    # Set by fit.
    parameters: List[Any]
    """The trainable parameters of all groups."""
    num_training_batches: Optional[int]
    """Batches in an epoch, or None where that is not known ahead."""
    num_evaluation_batches: Optional[int] = None
    """Batches in the evaluation going on, over all its dataloaders; None where not known."""
    has_validation: bool = False
    """True where ``fit`` was given validation data, and the task has a ``validation_step``."""
    deadline: Optional[float]
    layers_in_training: List[bool]

    # ------------------------------------------------------------------ saving

    def save_checkpoint(self, path: Union[str, Path]) -> Path:
        """Write a checkpoint to ``path`` (safetensors), from which a run can be resumed.

        From a callback, save in ``on_train_batch_end`` or later, and with ``fires_last = True``:
        what callbacks behind it do for the same batch is not in the checkpoint. A Trainer that
        did not train saves the weights only.

        Raises :class:`CheckpointError` where the file cannot be written; the training, and the
        file that was there, are as before.
        """
        return write(path, *self.checkpoint_content())

    def checkpoint_content(self) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]], Dict[str, Any]]:
        """The weights, the state of the run, and the metadata of a checkpoint of this moment."""
        if not hasattr(self, "mode_runner"):
            raise ConfigurationError(
                "save_checkpoint() has nothing to save before fit, validate, test or predict."
            )
        self.mode_runner.settle()
        state = None if self._rates is None else state_of_run(self)
        progress: Dict[str, Any] = {"epoch": self.current_epoch, "global_step": self.global_step}
        if state is not None:
            progress["run"] = self.run_id
        weights = arrays_of(self.task)
        weights.update((name, array_of(kept)) for name, kept in self.weights_aside.items())
        return weights, state, progress

    # ------------------------------------------------------------------ what callbacks ask

    @property
    def can_save(self) -> bool:
        """True in a ``fit`` that has trained, at a moment that can be resumed from exactly."""
        hurried = self.interrupts.hurried or self.resumed is not None
        return (
            self._rates is not None
            and self.train_batches is not None
            and self.batches_seen > 0
            and self.point is not Point.STEP
            and not hurried
        )

    @property
    def resumes_within_epoch(self) -> bool:
        """True in ``on_train_start`` where a resumed run goes on in the middle of an epoch."""
        return self.resumed is not None and self.resumed.is_within_epoch(self)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the running or last ``fit``."""
        return self.made.optimizer

    @property
    def made(self) -> Optimization:
        """What ``configure_optimizers`` returned in the running or last ``fit``."""
        if self.optimization is None:
            raise ConfigurationError("there is no optimizer before fit.")
        return self.optimization

    def seconds_trained(self) -> float:
        """Seconds since training began, those before a resumption included."""
        now = time.monotonic()
        return self.seconds_before + (0.0 if self.begun_at is None else now - self.begun_at)

    @property
    def rates(self) -> RatePlan:
        """The plan of all rates, of the running or last ``fit``."""
        if self._rates is None:
            raise ConfigurationError("there is no rate plan before fit.")
        return self._rates

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far. Not readable inside a compiled step."""
        forbid_in_trace("trainer.global_step")
        return self.steps_done

    @property
    def current_epoch(self) -> int:
        """The epoch being run, from 0. Not readable inside a compiled step."""
        forbid_in_trace("trainer.current_epoch")
        return self._current_epoch

    @current_epoch.setter
    def current_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler of the running or last ``fit``, or None."""
        return None if self.optimization is None else self.optimization.scheduler

    @property
    def callback_metrics(self) -> Dict[str, float]:
        """The latest value of every logged metric. Waits for the device where one is pending."""
        return self.metrics.values

    @property
    def progress_bar_metrics(self) -> Dict[str, float]:
        """The values read last of the metrics for the progress bar. Waits for nothing."""
        return self.metrics.progress_bar

    @property
    def logger(self) -> Optional[Logger]:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> Optional[str]:
        """The folder of the first logger that has one, or None."""
        return next((each.log_dir for each in self.loggers if each.log_dir), None)

    @property
    def total_steps(self) -> Optional[int]:
        """The optimizer steps that ``fit`` will make, or None where that is not known ahead."""
        totals = [self.max_steps] if self.max_steps >= 0 else []
        if self.max_epochs >= 0 and self.num_training_batches is not None:
            per_epoch = ceil_div(self.num_training_batches, self.accumulate_grad_batches)
            totals.append(per_epoch * self.max_epochs)
        return min(totals) if totals else None

    def default_train_graph(self) -> nn.Graph:
        """What ``TaskModule.build_graph`` returns unless it is overridden."""
        runner = self.mode_runner
        if not isinstance(runner, GraphMode):
            raise ConfigurationError('build_graph() is for Trainer(mode="graph").')
        return runner.default_train_graph()

    def lower_rates(self, graph: nn.Graph) -> None:
        """Compile the plan's rates, from this step on, into ``graph``, not compiled yet."""
        start, total = self.global_step, self.total_steps
        stop = start + max(_TABLE_STEPS, start) if total is None else max(total, start + 1)
        runner = self.mode_runner
        until = self.rates.lower_into(graph, start, stop)
        if isinstance(runner, GraphMode):
            runner.rates_until = until

    def save_logs(self) -> None:
        """Let the loggers store what they were sent."""
        for each in self.loggers:
            each.save()

    def log_step(self) -> None:
        """Read what the last steps logged, which waits for the device, and send it on."""
        for each in self.loggers:
            each.save_due(self.steps_done)
        self.log_metrics(self.metrics.flush())

    def log_metrics(self, metrics: Dict[str, float]) -> None:
        """Send ``metrics`` to the loggers and to ``callback_metrics``."""
        if not metrics:
            return
        self.metrics.put(metrics)
        for each in self.loggers:
            each.log_metrics(metrics, self.global_step, self.current_epoch)

    # ------------------------------------------------------------------ what loops and modes ask

    def clip(self) -> None:
        """Clip the gradients of all parameters together, where that was asked for."""
        if self.gradient_clip_val is not None:
            clip_gradients(self.parameters, self.gradient_clip_val, self.gradient_clip_algorithm)

    def set_lr(self, group: str, lr: float) -> None:
        """Give the parameter group called ``group`` another base rate from the next step on.

        A schedule goes on over the new rate; ``lr_scale`` and decay keep multiplying. In graph
        mode the graph is compiled anew. Raises :class:`RateError` for an unknown group or a
        rate that is negative or not finite.
        """
        self.rates.set_lr(group, lr, self.global_step)
        self.mode_runner.rebuild(f"set_lr({group!r}, {lr:g})")

    # ------------------------------------------------------------------ inside

    def _reset_progress(self) -> None:
        """Be as before any run."""
        self.steps_done = 0  # global_step, without its guard
        self.current_epoch = 0
        self.batch_idx = 0
        self.batches_seen = 0
        self.should_stop = False
        self.point = Point.BEGIN
        self.resumed: Optional[Resumed] = None
        self.cut_short: Optional[Dict[str, Any]] = None
        self.states_before_validation: Optional[Dict[str, Any]] = None
        self.layers_in_eval_mode: List[str] = []
        self.weights_aside: Dict[str, Any] = {}
        """Training's weights, by name, while a callback has others in the task; a checkpoint
        holds these."""
        self.train_batches: Optional[Batches] = None
        self.data_states_after_fit: Dict[str, Any] = {
            "now": {},
            "at_pass": None,
            "at_validation": [],
        }
        self.validation_batches: List[Batches] = []
        self.run_id = uuid.uuid4().hex
        self.run_seed = flow.default_generator.initial_seed() if self.seed is None else self.seed
        self.seconds_before = 0.0
        self.begun_at: Optional[float] = None
        self._rates: Optional[RatePlan] = None
        self.optimization: Optional[Optimization] = None
        self.sanity_checking = False
        self.num_training_batches = None
        self.parameters = []
        self.layers_in_training = []
        self.deadline = None
