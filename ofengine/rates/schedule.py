"""What a scheduler would write into the groups, without writing it."""

from __future__ import annotations

import copy
from array import array
from typing import Any, Callable, Dict, List, Sequence

from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine.errors import RateError

_CHUNK = 4096
"""Positions that are recorded together."""
_CHUNKS_KEPT = 4


class Schedule:
    """The rate of each group, before ``lr_scale`` and decay, at each position of a schedule."""

    def lr(self, group: int, position: int) -> float:
        """The rate of ``group`` (its index) after ``position`` calls of ``step``."""
        return self.lrs(position)[group]

    def lrs(self, position: int) -> List[float]:
        """The rates of all groups after ``position`` calls of ``step``."""
        raise NotImplementedError

    def rebase(self, group: int, lr: float, position: int) -> None:
        """Let ``lr`` be the base rate of ``group`` from ``position`` on."""
        raise NotImplementedError

    def earliest(self) -> int:
        """The first position that can be asked for; :meth:`rebase` may forget earlier ones."""
        return 0

    def adopt(self, kept: Any) -> None:
        """Go on with the schedule of a checkpoint, as :func:`describe_schedule` describes it.

        Raises :class:`RateError` where this one cannot become that one.
        """


class ConstantSchedule(Schedule):
    """``lr`` of the group for ever."""

    def __init__(self, base_lrs: Sequence[float]) -> None:
        self.base_lrs = list(base_lrs)

    def factor(self, position: int) -> float:
        """What all base rates are multiplied by."""
        return 1.0

    def lr(self, group: int, position: int) -> float:
        """See :class:`Schedule`."""
        return self.base_lrs[group] * self.factor(position)

    def lrs(self, position: int) -> List[float]:
        """See :class:`Schedule`."""
        factor = self.factor(position)
        return [lr * factor for lr in self.base_lrs]

    def rebase(self, group: int, lr: float, position: int) -> None:
        """See :class:`Schedule`."""
        self.base_lrs[group] = lr


class FunctionSchedule(ConstantSchedule):
    """``lr`` of the group times ``factor(position)``, as in ``LambdaLR``."""

    def __init__(self, base_lrs: Sequence[float], factor: Callable[[int], float]) -> None:
        super().__init__(base_lrs)
        self._factor = factor

    def factor(self, position: int) -> float:
        """See :class:`ConstantSchedule`."""
        return float(self._factor(position))


class TableSchedule(ConstantSchedule):
    """``lr`` of the group times ``factors[position]``; the last factor goes on for ever."""

    def __init__(self, base_lrs: Sequence[float], factors: Sequence[float]) -> None:
        super().__init__(base_lrs)
        self.factors = [float(factor) for factor in factors]

    def factor(self, position: int) -> float:
        """See :class:`ConstantSchedule`."""
        return self.factors[min(position, len(self.factors) - 1)]

    def adopt(self, kept: Any) -> None:
        """See :class:`Schedule`."""
        self.factors = [float(factor) for factor in kept["table"]]


class PerGroupSchedule(Schedule):
    """A schedule of its own for each group."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = list(schedules)

    def lr(self, group: int, position: int) -> float:
        """See :class:`Schedule`."""
        return self.schedules[group].lr(group, position)

    def lrs(self, position: int) -> List[float]:
        """See :class:`Schedule`."""
        return [schedule.lr(group, position) for group, schedule in enumerate(self.schedules)]

    def rebase(self, group: int, lr: float, position: int) -> None:
        """See :class:`Schedule`."""
        self.schedules[group].rebase(group, lr, position)

    def earliest(self) -> int:
        """See :class:`Schedule`."""
        return max(schedule.earliest() for schedule in self.schedules)

    def adopt(self, kept: Any) -> None:
        """See :class:`Schedule`."""
        for schedule, part in zip(self.schedules, kept["by_group"]):
            if part is not None:
                schedule.adopt(part)


class PlateauSchedule(Schedule):
    """Rates that ``ReduceLROnPlateau`` lowers when a metric stops getting better."""

    def __init__(self, scheduler: Any) -> None:
        self._twin = twin_of(scheduler)

    def observe(self, metric: float) -> bool:
        """Show the scheduler the metric's new value; True where a rate changed."""
        groups = self._twin.optimizer.param_groups
        before = [group["lr"] for group in groups]
        self._twin.step(metric)
        return before != [group["lr"] for group in groups]

    def state(self) -> Dict[str, Any]:
        """The scheduler's memory of the metric, and the rates it has come to."""
        groups = self._twin.optimizer.param_groups
        memory = {key: value for key, value in vars(self._twin).items() if is_plain(value)}
        return {"memory": memory, "lrs": [float(group["lr"]) for group in groups]}

    def load_state(self, state: Dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        vars(self._twin).update(state["memory"])
        for group, lr in zip(self._twin.optimizer.param_groups, state["lrs"]):
            group["lr"] = lr

    def lrs(self, position: int) -> List[float]:
        """See :class:`Schedule`: the rates from now on, whatever the position."""
        return [float(group["lr"]) for group in self._twin.optimizer.param_groups]

    def rebase(self, group: int, lr: float, position: int) -> None:
        """See :class:`Schedule`."""
        self._twin.optimizer.param_groups[group]["lr"] = lr


class _StandInGroup(Dict[str, Any]):
    """A parameter group's options, apart from the optimizer's own."""

    @property
    def options(self) -> Dict[str, Any]:
        return self


class _StandInOptimizer:
    """What a scheduler sees of its optimizer: groups with rates, and no parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [_StandInGroup(group.options) for group in optimizer.param_groups]


def twin_of(scheduler: Any) -> Any:
    """A deep copy of ``scheduler`` over a stand-in of its optimizer."""
    stand_in = _StandInOptimizer(scheduler.optimizer)
    try:
        twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    except Exception as error:
        raise RateError(
            f"{type(scheduler).__name__} cannot be copied ({error}): the engine steps a copy "
            "of the scheduler ahead of training; keep open files, locks and tensors out of it."
        ) from error
    twin.verbose = False
    return twin


class RecordedSchedule(Schedule):
    """The rates of a OneFlow scheduler at each of its positions, recorded from a twin of it.

    The twin is a deep copy of the scheduler over a stand-in of its optimizer. It is stepped
    as far as somebody asks, so that the original is left alone and any deterministic scheduler
    works, a user's own subclass too. Only the rates around the positions asked for last are
    kept; a copy of the twin at the start of each chunk leads back to earlier ones.

    Args:
        scheduler: a ``oneflow.optim.lr_scheduler`` object; position 0 is where it stands now.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler
        self._start_over(twin_of(scheduler), 0)

    def _start_over(self, twin: LRScheduler, position: int) -> None:
        self._first = position
        self._starts: List[LRScheduler] = [twin]
        self._chunks: Dict[int, _Chunk] = {}

    def rebase(self, group: int, lr: float, position: int) -> None:
        """See :class:`Schedule`. Earlier positions cannot be asked for any more."""
        number, within = divmod(position - self._first, _CHUNK)
        self._open(number)
        twin = copy.deepcopy(self._starts[number])
        for _ in range(within):
            twin.step()
        _set_base_lr(twin, group, lr)
        twin.optimizer.param_groups[group]["initial_lr"] = lr
        twin.last_step -= 1  # and forward again, now from the new base rate
        twin.step()
        self._start_over(twin, position)

    def earliest(self) -> int:
        """See :class:`Schedule`."""
        return self._first

    def lr(self, group: int, position: int) -> float:
        """See :class:`Schedule`."""
        return self._rates_at(position)[group]

    def lrs(self, position: int) -> List[float]:
        """See :class:`Schedule`."""
        return self._rates_at(position).tolist()

    def _rates_at(self, position: int) -> array[float]:
        if position < self._first:
            raise RateError(
                f"the schedule's rates before position {self._first} are not known any more, "
                "since trainer.set_lr changed a base rate there."
            )
        number, within = divmod(position - self._first, _CHUNK)
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._open(number)
        return chunk.rates(within)

    def adopt(self, kept: Any) -> None:
        """See :class:`Schedule`."""
        twin = twin_of(self.scheduler)
        write_values(twin, kept)
        for group, lr in zip(twin.optimizer.param_groups, twin.base_lrs):
            group["lr"] = group["initial_lr"] = lr
        twin.last_step -= 1  # and forward again, now with these values
        twin.step()
        self._start_over(twin, 0)

    def _open(self, number: int) -> _Chunk:
        while len(self._starts) <= number:
            twin = self._open(len(self._starts) - 1).end()
            twin.step()
            self._starts.append(twin)
        while len(self._chunks) >= _CHUNKS_KEPT:
            self._chunks.pop(next(iter(self._chunks)))
        chunk = self._chunks[number] = _Chunk(copy.deepcopy(self._starts[number]))
        return chunk


def _set_base_lr(scheduler: Any, group: int, lr: float) -> None:
    """Set a base rate in ``scheduler`` and in the schedulers that it is made of."""
    scheduler.base_lrs = [lr if i == group else base for i, base in enumerate(scheduler.base_lrs)]
    for part in getattr(scheduler, "schedulers", ()):
        _set_base_lr(part, group, lr)


class _Chunk:
    """The rates from where ``twin`` stands, recorded no further than somebody asks."""

    def __init__(self, twin: LRScheduler) -> None:
        self._twin = twin
        self._rates: List[array[float]] = []
        self._record()

    def rates(self, within: int) -> array[float]:
        """The rates of all groups, ``within`` positions from the chunk's start."""
        while len(self._rates) <= within:
            self._twin.step()
            self._record()
        return self._rates[within]

    def end(self) -> LRScheduler:
        """A copy of the twin at the chunk's last position."""
        self.rates(_CHUNK - 1)
        return copy.deepcopy(self._twin)

    def _record(self) -> None:
        groups = self._twin.optimizer.param_groups
        self._rates.append(array("d", [group["lr"] for group in groups]))


# ---------------------------------------------------------------------- what a checkpoint keeps


_MOVING = ("last_step", "_last_lr", "verbose", "best", "num_bad_steps", "cooldown_counter")
"""What changes in a scheduler while it is stepped."""


def is_plain(value: Any) -> bool:
    """True for None, booleans, numbers, texts, and lists and tuples of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def describe_schedule(scheduler: Any, names: Sequence[str] = ()) -> Any:
    """What ``configure_optimizers`` returned as a scheduler, as far as JSON can tell it.

    ``names`` are the groups' names. A scheduler object becomes its class, its plain values
    before the first step, and the schedulers inside it.
    """
    if scheduler is None:
        return None
    if isinstance(scheduler, dict):
        parts = [describe_schedule(scheduler.get(name)) for name in names]
        return {"class": "one for each group", "by_group": parts}
    if isinstance(scheduler, (list, tuple)):
        return {"class": "a table", "table": [float(factor) for factor in scheduler]}
    if not hasattr(scheduler, "optimizer"):
        return {"class": "a function"}
    values: Dict[str, Any] = {}
    parts_by_name: Dict[str, Any] = {}
    for key, value in vars(scheduler).items():
        listed = value if isinstance(value, (list, tuple)) and value else [value]
        if all(hasattr(each, "optimizer") for each in listed):
            parts_by_name[key] = [describe_schedule(each) for each in listed]
        elif key not in _MOVING and is_plain(value):
            values[key] = value
    kind = type(scheduler)
    return {"class": kind.__qualname__, "values": values, "parts": parts_by_name}


def as_read(description: Any) -> Any:
    """``description`` as it is once it was written to a file and read: tuples are lists."""
    if isinstance(description, dict):
        return {key: as_read(value) for key, value in description.items()}
    if isinstance(description, (list, tuple)):
        return [as_read(value) for value in description]
    return description


def same_kind(kept: Any, own: Any) -> bool:
    """True where two descriptions are of the same classes, inside too."""
    if kept is None or own is None:
        return kept is own
    if kept["class"] != own["class"]:
        return False
    pairs = [(kept.get("by_group", []), own.get("by_group", []))]
    inside, own_inside = kept.get("parts", {}), own.get("parts", {})
    if set(inside) != set(own_inside):
        return False
    pairs += [(inside[key], own_inside[key]) for key in inside]
    return all(len(a) == len(b) and all(map(same_kind, a, b)) for a, b in pairs)


def write_values(scheduler: Any, kept: Any) -> None:
    """Write the values of a description, as it is read from a file, into ``scheduler``."""
    for key, value in kept["values"].items():
        own = getattr(scheduler, key, None)
        setattr(scheduler, key, tuple(value) if isinstance(own, tuple) else value)
    for key, parts in kept["parts"].items():
        own = getattr(scheduler, key)
        for each, part in zip(own if isinstance(own, (list, tuple)) else [own], parts):
            write_values(each, part)
