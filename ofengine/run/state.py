"""Run: what one run consists of, put together."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import attrs
import oneflow as flow

from ofengine.data.batches import Batches
from ofengine.errors import ConfigurationError, quoted
from ofengine.loggers.base import Logger
from ofengine.metrics.history import History
from ofengine.metrics.log import Metrics
from ofengine.processes.crash_report import Place
from ofengine.processes.interrupts import InterruptGuard
from ofengine.ranks.meetings import Meetings
from ofengine.rates.optimizers import Optimization
from ofengine.rates.plan import RatePlan
from ofengine.run.finite import Expected
from ofengine.run.mode import Mode
from ofengine.run.orders import Orders
from ofengine.run.profile import Profile
from ofengine.run.progress import Point, Progress
from ofengine.run.settings import Settings
from ofengine.run.telling import Telling
from ofengine.run.weighing import Weighing
from ofengine.shared_metrics import SharedMetrics

State = Dict[str, Any]
"""Plain values and arrays, nested, as a checkpoint keeps them."""


def _new_id() -> str:
    return uuid.uuid4().hex


@attrs.define(eq=False)
class Run:
    """One run: a ``fit`` and what is evaluated after it. No behaviour but answers about these."""

    settings: Settings
    callbacks: List[Any]
    """In the order in which the user lists them."""
    loggers: List[Logger]
    progress: Progress = attrs.Factory(Progress)
    metrics: Metrics = attrs.Factory(Metrics)
    history: History = attrs.Factory(History)
    interrupts: InterruptGuard = attrs.Factory(InterruptGuard)
    profile: Optional[Profile] = None
    """Where the time goes, where that is asked for."""
    weighing: Weighing = attrs.Factory(Weighing)
    """What the batches of the open accumulation window weigh; the mode's to change."""
    telling: Telling = attrs.Factory(Telling)
    """Whom the hook that is being fired was told to."""
    place: Place = attrs.Factory(Place)
    """Where it is, for whoever speaks after a crash."""
    orders: Orders = attrs.Factory(Orders)
    """What it was told from outside to do between two steps."""
    id: str = attrs.Factory(_new_id)
    ranks: Optional[Meetings] = None
    """This rank's end of what all exchange; None where one process is alone."""
    sitting: int = 0
    """How often the run was resumed; more than in any file of it that was found then."""
    resumed_from: Optional[Path] = None
    """The checkpoint that this fit goes on from."""
    seed: Optional[int] = None
    """The Trainer's, or that of the run that is resumed."""
    data_seed: int = 0
    """What the randomness of dataloaders' workers is a function of."""
    task: Any = None
    """The task of the verb that is running, or ran last."""
    datamodule: Any = None
    """Where its data comes from; None where that was given, or is the task's own."""

    # Set by fit.
    mode: Optional[Mode] = None
    """What runs the training steps."""
    optimization: Optional[Optimization] = None
    """None before ``fit``, and where there are several."""
    parts: Dict[str, Run] = attrs.Factory(dict)
    """Of several optimizers what is each one's own, by name: this run, but for its optimization,
    plan, mode, parameters, settings and progress, whose ``global_step`` counts its own steps."""
    name: str = ""
    """In such a part, what the optimizer is called."""
    every_n_batches: int = 1
    """Likewise: it steps in the batches of an epoch whose index is divisible by this."""
    planned: Optional[Settings] = None
    """Likewise: the settings that its plan was made with, in its own steps."""
    others: List[Any] = attrs.Factory(list)
    """Likewise: the parameters of the other optimizers, which its steps leave alone."""
    plan: Optional[RatePlan] = None
    parameters: List[Any] = attrs.Factory(list)
    """The trainable parameters of all groups."""
    layers_in_training: List[bool] = attrs.Factory(list)
    train: Optional[Batches] = None
    validation: List[Batches] = attrs.Factory(list)
    batches_per_epoch: Optional[int] = None
    """Of one rank, where there are several; None where that is not known ahead."""
    epoch_length: Optional[int] = None
    """Batches in an epoch of all ranks together; None where that is not known ahead."""
    batches_between_validations: Optional[int] = None
    """None for the end of the epoch."""
    begun_at: Optional[float] = None
    deadline: Optional[float] = None
    seconds_before: float = 0.0
    """Seconds trained before the run was resumed."""

    # Changes while it runs.
    has_validation: bool = False
    should_stop: bool = False
    sanity_checking: bool = False
    told_not_finite: bool = False
    """True where the verb has warned of a loss or of metrics that are not finite."""
    evaluation_batches: Optional[int] = None
    """Batches in the evaluation going on, over all its dataloaders; None where not known."""
    expected: Optional[Expected] = None
    """What of the task was finite when its training began, and is to stay so."""
    weights_aside: State = attrs.Factory(dict)
    """Training's weights, by name, while a callback has others in the task."""
    weights_left: State = attrs.Factory(dict)
    """Those that training ended with, where a callback has left others in the task."""

    # For the checkpoint.
    cut_short: Optional[State] = None
    """The metrics of an epoch that ends before its last batch because training does."""
    at_cut: Optional[State] = None
    """What the hooks at the end of such an epoch may have changed, as it was before them."""
    states_before_validation: Optional[State] = None
    layers_in_eval_mode: List[str] = attrs.Factory(list)
    """Of training, while validation or the user has others in eval mode."""
    frozen: List[str] = attrs.Factory(list)
    """The parameters that did not train when training ended; callbacks may let them train."""
    data_states_after_fit: State = attrs.Factory(
        lambda: {"now": {}, "validation": [], "at_pass": None, "at_validation": []}
    )
    moments_resumed: Optional[State] = None
    """Where a checkpoint left off, until the run has gone there."""
    tensors_at_start: Dict[str, Tuple[Tuple[int, ...], str]] = attrs.Factory(dict)
    """Shape and digest of each tensor of the task that is in no ``state_dict``, by place."""
    seen_at_start: Dict[str, str] = attrs.Factory(dict)
    """A digest of each plain attribute that a user's code may change, by place."""
    changed_before: Set[str] = attrs.Factory(set)
    """Of both, those that had changed before the run was resumed."""

    @classmethod
    def new(cls, settings: Settings, callbacks: List[Any], loggers: List[Logger]) -> Run:
        """A run at its beginning."""
        seed = settings.seed
        data_seed = flow.default_generator.initial_seed() if seed is None else seed
        run = cls(settings, callbacks, loggers, seed=seed, data_seed=data_seed)
        if settings.world is not None:
            run.ranks = Meetings(settings.world)
            run.metrics = SharedMetrics(run.ranks, run.progress)
        return run

    @property
    def training_mode(self) -> Mode:
        """What runs the training steps of the running or last ``fit``."""
        if self.mode is None:
            raise ConfigurationError("there is no training before fit.")
        return self.mode

    @property
    def made(self) -> Optimization:
        """What ``configure_optimizers`` returned in the running or last ``fit``."""
        if self.parts:
            names = quoted(self.parts, most=8)
            raise ConfigurationError(
                f"there are {len(self.parts)} optimizers, {names}: write "
                f"trainer.optimizers[{next(iter(self.parts))!r}]."
            )
        if self.optimization is None:
            raise ConfigurationError("there is no optimizer before fit.")
        return self.optimization

    @property
    def rates(self) -> RatePlan:
        """The plan of all rates, of the running or last ``fit``."""
        if self.plan is None:
            raise ConfigurationError("there is no rate plan before fit.")
        return self.plan

    def each(self) -> Dict[str, Run]:
        """What has one optimizer: the parts by name where there are several, or this under ""."""
        return self.parts or {"": self}

    @property
    def total_steps(self) -> Optional[int]:
        """The optimizer steps that ``fit`` will make, or None where that is not known ahead."""
        if self.name and self.plan is not None:
            return self.plan.stop
        return self.settings.total_steps(self.epoch_length)

    def rounds(self, batches: int) -> int:
        """So many of the ``batches`` of all ranks has the rank that has most."""
        return -(-batches // self.settings.world_size)

    @property
    def seconds_trained(self) -> float:
        """Seconds since training began, those before a resumption included."""
        now = time.monotonic()
        return self.seconds_before + (0.0 if self.begun_at is None else now - self.begun_at)

    def broken(
        self, weights: Optional[State] = None, state: Optional[State] = None
    ) -> Optional[str]:
        """What is not finite, though it was, of the task or of a checkpoint's content, in words."""
        expected = Expected.of(self.task) if self.expected is None else self.expected
        if weights is None:
            return expected.broken(self.task.state_dict())
        return expected.broken_content(weights, state)

    # ------------------------------------------------------------------ does it go on?

    def is_done(self) -> bool:
        """True where no further epoch is to be started."""
        most = self.settings.max_epochs
        epochs = most != -1 and self.progress.epoch >= most
        return epochs or self.stops() or self.is_out_of_time_or_steps()

    def stops(self) -> bool:
        """True where training was asked to end, and has come as far as it has to."""
        least, done = self.settings, self.progress
        far = done.epoch >= least.min_epochs and done.global_step >= least.min_steps
        return self.should_stop and far

    def is_out_of_time_or_steps(self) -> bool:
        """True where ``max_steps`` or ``max_time`` is used up."""
        step = self.progress.global_step
        if self.settings.max_steps != -1 and step >= self.settings.max_steps:
            return True
        if self.ranks is not None:
            return self.ranks.agreed.out_of_time
        return self.is_out_of_time()

    def is_out_of_time(self) -> bool:
        """True where ``max_time`` is used up by this rank's clock."""
        if self.deadline is None or self.progress.global_step == 0:
            return False
        return time.monotonic() >= self.deadline

    def can_go_on_within(self, loop: State) -> bool:
        """True where an epoch of a checkpoint's ``loop`` was cut short by what is no limit now."""
        most = self.settings.max_epochs
        epochs_left = most == -1 or loop["epoch"] < most
        stops = self.stops() or self.is_out_of_time_or_steps()
        return loop["cut_short"] is not None and epochs_left and not stops

    @property
    def resumes_within_epoch(self) -> bool:
        """True where a run that is being resumed will go on in the middle of an epoch."""
        if self.moments_resumed is None:
            return False
        loop = self.moments_resumed["loop"]
        point = Point(loop["point"])
        if point in (Point.EPOCH_END, Point.OVER):
            return self.can_go_on_within(loop)
        return point is not Point.BEGIN
