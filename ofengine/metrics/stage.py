"""One logged value: how it is to be reported, and where it waits until it is read."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import attrs
import oneflow as flow

from ofengine.data.structure import describe
from ofengine.errors import ConfigurationError
from ofengine.metrics.base import Metric


@attrs.frozen
class LogSpec:
    """How one ``log`` call wants its value reported."""

    name: str
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    batch_size: Optional[int]
    suffix: str = ""
    """Which of several dataloaders it belongs to."""

    @property
    def full_name(self) -> str:
        """The name that stands for the newest of its values."""
        return self.name + self.suffix

    @property
    def step_name(self) -> str:
        """The name of single batches' values."""
        return (f"{self.name}_step" if self.on_epoch else self.name) + self.suffix

    @property
    def epoch_name(self) -> str:
        """The name of the epoch's mean."""
        return (f"{self.name}_epoch" if self.on_step else self.name) + self.suffix


LOSS = LogSpec("loss", prog_bar=True, logger=True, on_step=True, on_epoch=False, batch_size=None)


_Place = Tuple[str, LogSpec, int, int]
"""(full name, spec, which tensor, which of the numbers in it)."""
Places = Sequence[Tuple[LogSpec, int, int]]
"""(spec, which tensor, which of the numbers in it) in the order of the ``log`` calls."""


class Logged:
    """Where the numbers of some names are, in one or several tensors that are logged together.

    Args:
        places: of numbers.
        counted: of metrics, which stand among the tensors.
    """

    def __init__(self, places: Places, counted: Places = ()) -> None:
        numbers, self.counted = (
            [(spec.full_name, spec, tensor, index) for spec, tensor, index in each]
            for each in (places, counted)
        )
        self.on_step: List[_Place] = [place for place in numbers if place[1].on_step]
        self.on_epoch: List[_Place] = [place for place in numbers if place[1].on_epoch]


@attrs.frozen
class OfBatch:
    """What one batch has added to a metric, to be read later."""

    metric: Metric
    sums: Dict[str, Any]

    def read(self) -> float:
        """The metric's value of this batch alone."""
        return self.metric.value_of(self.sums)


class Stage:
    """The values of one running stage: the last of each step, sums for each epoch mean."""

    def __init__(self, per_step: bool, suffix: str) -> None:
        self.per_step = per_step
        self.suffix = suffix
        self.batch: Any = None
        """The training batch that was stepped last."""
        self.batch_idx = 0
        """Its index in the pass; of evaluation, the batch being gone through."""
        self.loss: Any = None
        """Its loss, where nothing has taken it up yet."""
        self.current: List[Tuple[Logged, Sequence[Any]]] = []
        """What was logged since the last batch was closed, and its tensors, numbers and metrics."""
        self.last: Dict[str, Tuple[LogSpec, Any, int]] = {}
        """By name the newest: its tensor or number, and which of the numbers in it."""
        self.pending: List[Tuple[Logged, Sequence[Any], int]] = []
        """What goes into epoch means, and the size of its batch."""
        self.sums: Dict[str, List[Any]] = {}
        """By name [spec, sum of the weighted values, sum of the weights]."""
        self.counted: Dict[str, Tuple[LogSpec, Metric]] = {}
        """The metrics that were logged, to be reset with the epoch."""


def take_loss(stage: Stage) -> None:
    if stage.loss is not None:
        stage.last["loss"] = (LOSS, stage.loss, 0)
        stage.loss = None


def check_spec(spec: LogSpec) -> None:
    if not isinstance(spec.name, str) or not spec.name:
        raise ConfigurationError(f"log({spec.name!r}, ...): a metric's name is a text.")
    if spec.name in ("epoch", "step"):
        what = "number of the epoch" if spec.name == "epoch" else "number of optimizer steps"
        raise ConfigurationError(
            f"log({spec.name!r}, ...): every logger has the {what} in a column of this name: give "
            "yours another one."
        )
    if not spec.on_step and not spec.on_epoch:
        raise ConfigurationError(
            f"log({spec.name!r}, ...) with on_step=False and on_epoch=False would report nothing: "
            "set one of them to True."
        )


def check_metric(name: str, metric: Metric) -> None:
    if not metric.is_scalar:
        raise ConfigurationError(
            f"log({name!r}, {type(metric).__name__}): its value is an array: call its compute() "
            "and reset() in on_train_epoch_end or on_validation_epoch_end, and log single numbers."
        )


def of_batch(spec: LogSpec, metric: Metric) -> OfBatch:
    sums = metric.newest
    if not sums:
        raise ConfigurationError(
            f"log({spec.name!r}, {type(metric).__name__}) came before the metric had a batch: call "
            "its update(...) in the step first, or log it with on_step=False, on_epoch=True."
        )
    return OfBatch(metric, sums)


def scalar(name: str, value: Any) -> Any:
    """``value`` as a tensor of no dimension and a memory of its own, or as a float."""
    if isinstance(value, flow.Tensor):
        if not value.dim():
            return value.detach().clone()
        if value.numel() != 1:
            raise ConfigurationError(
                f"log({name!r}, ...) got a tensor of shape {tuple(value.shape)}: log one number, "
                "for example its .mean()."
            )
        return value.detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"log({name!r}, ...) got {describe(value)}: {_mend(value)}."
        ) from None


def _mend(value: Any) -> str:
    if value is None:
        return (
            "log a number, or, of a metric of ofengine.metrics, whose update() returns nothing, "
            "the object itself, as in self.acc.update(scores, y) and self.log('acc', self.acc)"
        )
    return "log a tensor of one element or a number; use log_dict for a dict"


def read_all(values: Sequence[Any]) -> List[List[float]]:
    """The numbers in each of the values, with one transfer for each type and shape."""
    numbers: List[List[float]] = [[] for _ in values]
    alike: Dict[Tuple[Any, ...], List[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, flow.Tensor):
            kind = (value.type(), value.shape) if value.is_local else (value.dtype, value.shape)
            alike.setdefault(kind, []).append(position)
        else:
            numbers[position] = [value.read() if isinstance(value, OfBatch) else value]
    for positions in alike.values():
        together = [values[position] for position in positions]
        read = (flow.stack(together) if len(together) > 1 else together[0]).numpy()
        rows = read.reshape(len(together), -1).astype("float64").tolist()
        for position, row in zip(positions, rows):
            numbers[position] = row
    return numbers
