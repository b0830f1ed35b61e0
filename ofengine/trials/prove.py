"""The proof: a task run in both modes, whole and resumed, and compared to the bit."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import attrs
import numpy as np
from oneflow import nn

from ofengine.callback import Callback
from ofengine.callbacks import (
    GraphLRScaleCallback,
    LRDecayCallback,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)
from ofengine.data.combined import together
from ofengine.data.sources import is_iterator
from ofengine.errors import ConfigurationError, DataError, OFEngineError
from ofengine.rates.several import read_all
from ofengine.run.devices import move
from ofengine.run.precision import FULL
from ofengine.run.settings import Settings
from ofengine.speedups import cpu_speedups
from ofengine.task import TaskModule
from ofengine.trials.proof import Difference, Report, Row
from ofengine.trials.recording import QUANTITIES, Record, Recorder, recording_outputs
from ofengine.trials.restore import OptimizerLoan, Restorer, of_trial

Fit = Callable[[Settings, List[Callback], TaskModule, Any, Optional[Path]], None]
"""Fits a task over training data with other settings and callbacks, from a checkpoint or none."""

RATES = (LRDecayCallback, GraphLRScaleCallback)
_OUTPUT_ONLY = (ModelCheckpoint, ModelSummary, ProgressBar)


def prove(
    settings: Settings,
    callbacks: Sequence[Callback],
    task: TaskModule,
    train_dataloaders: Any,
    fit: Fit,
    *,
    steps: int = 20,
) -> Report:
    """Train ``task`` for ``steps`` steps in eager and in graph mode, whole and resumed; compare.

    Six runs from one start: eager; graph; both resumed from a checkpoint of half the steps, each
    in its own mode and in the other. Graph is compared with eager, a resumed run with that which
    saved. After every batch: the batch, the loss, every parameter and buffer, the values that were
    logged, the rate of every group. Where something differs, both runs are made again up to that
    step and the modules' outputs in it compared, in the order of their calls.

    The runs have the settings' device, clipping, accumulation and validation and the task's own
    hooks; their length is ``steps``, and a schedule that asks for the run's length gets that. Of
    the callbacks those take part that say when rates decay. Without a seed in the Trainer the runs
    are seeded alike. Put back afterwards: what :func:`ofengine.trials.lr_find.lr_find` does.

    Args:
        settings: the Trainer's; its mode does not matter.
        callbacks: the Trainer's.
        task: the task; ``configure_optimizers`` is called for each run.
        train_dataloaders: as in ``fit``.
        fit: see :data:`Fit`.
        steps: optimizer steps of a whole run, from 2 on.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data can be gone through only once, or there is none.
        OFEngineError: what ``fit`` in eager mode raises; where graph mode does, the report says so.
    """
    source = begin_proof(settings, task, train_dataloaders, steps)
    with tempfile.TemporaryDirectory(prefix="ofengine-prove-") as folder:
        proof = Proof(settings, callbacks, task, source, fit, steps, Path(folder))
        rows = list(proof.rows())
    return Report(type(task).__name__, steps, rows, left_out(callbacks))


def left_out(callbacks: Sequence[Callback]) -> List[str]:
    """The callbacks that take no part, and could have."""
    known = (*RATES, *_OUTPUT_ONLY)
    return [type(each).__name__ for each in callbacks if not isinstance(each, known)]


def begin_proof(settings: Settings, task: Any, train_dataloaders: Any, steps: int) -> Any:
    """Check what a proof is given, and move the task; returns the training data."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ConfigurationError(f"prove(steps={steps!r}): give a whole number from 2 on.")
    if settings.precision != FULL:
        raise ConfigurationError(
            f'prove compares graph mode with eager mode, which precision="{settings.precision}" is '
            "not for: leave precision out."
        )
    source = train_dataloaders if train_dataloaders is not None else task.train_dataloader()
    source = together(source)
    if is_iterator(source):
        raise DataError(
            f"train_dataloader is a {type(source).__name__}, which can be gone through only once, "
            "and prove goes through it many times: give a DataLoader or a list of batches."
        )
    if isinstance(task, nn.Module):  # else fit says what is wrong
        move(task, settings.device)
    return source


@attrs.frozen
class Way:
    """One way of running the task."""

    name: str
    mode: str
    resumes: str = ""
    """The mode of the run whose checkpoint it goes on from; "" for a whole run."""


_WAYS = (
    Way("graph", "graph"),
    Way("eager, resumed", "eager", "eager"),
    Way("graph, resumed", "graph", "graph"),
    Way("eager, then graph", "graph", "eager"),
    Way("graph, then eager", "eager", "graph"),
)
_WHOLE = {"eager": Way("eager", "eager"), "graph": _WAYS[0]}


@attrs.frozen
class Proof:
    """The runs, and what they are compared with."""

    settings: Settings
    callbacks: Sequence[Callback]
    task: TaskModule
    source: Any
    fit: Fit
    steps: int
    folder: Path
    made: Dict[str, Recorder] = attrs.field(factory=dict)
    """The whole runs, by mode."""

    def rows(self) -> Iterator[Row]:
        """All rows of the report."""
        self.made["eager"] = self.run(_WHOLE["eager"], self.saving("eager"))
        if not self.made["eager"].records:
            raise DataError("prove has nothing to compare: the run came to an end before a step.")
        for way in _WAYS:
            yield self.row(way)

    def row(self, way: Way) -> Row:
        """Make a run, compare it; where it is not equal, find out from where on."""
        against = way.resumes or "eager"
        missing = {against, way.mode} - set(self.made)
        if missing and way.resumes:
            return Row(way.name, against, 0, {}, error="there is no whole run in graph mode.")
        whole = self.made[against]
        if way.resumes and whole.saved_at is None:
            return Row(way.name, against, 0, {}, error="the run ended before it could be saved.")
        try:
            made = self.run(way, Recorder() if way.resumes else self.saving(way.mode))
        except OFEngineError as error:
            return Row(way.name, against, 0, {}, error=f"{type(error).__name__}: {error}")
        if not way.resumes:
            self.made[way.mode] = made
        expected = whole.records[(whole.saved_at or 0) if way.resumes else 0 :]
        first, at = compare(made.records, expected)
        steps = len({record.step for record in expected})
        difference = None if at is None else self.difference(way, made.records, at)
        return Row(way.name, against, steps, first, difference)

    def saving(self, mode: str) -> Recorder:
        """What records a whole run, and saves it half way under this name."""
        return Recorder(self._saved(mode), self.steps // 2)

    def _saved(self, mode: str) -> Path:
        return self.folder / f"{mode}.safetensors"

    def run(self, way: Way, recorder: Recorder, outputs: bool = False) -> Recorder:
        """Train once from the start that all runs have in common."""
        settings = of_trial(
            self.settings,
            self.steps,
            mode=way.mode,
            eval_mode=way.mode,
            seed=0 if self.settings.seed is None else self.settings.seed,
        )
        deciding = [each for each in self.callbacks if isinstance(each, RATES)]
        callbacks: List[Callback] = [*map(copy.copy, deciding), recorder]
        resumed = self._saved(way.resumes) if way.resumes else None
        with Restorer(self.task, self.source):
            lent = _Lent(self.task)
            self.task.__dict__["configure_optimizers"] = lent.configure
            try:
                with contextlib.ExitStack() as around:
                    if outputs:
                        if settings.cpu_speedups and settings.device.type == "cpu":
                            around.enter_context(cpu_speedups(self.task))
                        around.enter_context(recording_outputs(self.task))
                    self.fit(settings, callbacks, self.task, self.source, resumed)
            finally:
                lent.give_back()
        return recorder

    # ------------------------------------------------------------------ where it comes from

    def difference(self, way: Way, records: Sequence[Record], at: int) -> Difference:
        """What differs after the batch ``at``, from 1; both runs are made again for it."""
        against = _WHOLE[way.resumes or "eager"]
        step = _step_of(at, records, self.made[against.mode].records)
        if not all(_has(at, each) for each in (records, self.made[against.mode].records)):
            return Difference(step, None, 0.0, "There one of the two runs is over.")
        for outputs in (True, False):
            try:
                ours, theirs = (
                    self.run(each, Recorder(whole_at=at), outputs) for each in (way, against)
                )
            except OFEngineError:
                if not outputs:
                    raise
                continue  # an output that no graph can put out
            if compare(ours.records, theirs.records, overlap=True)[1] is not None:
                break  # else it is only there where no outputs are recorded
        again = _differs_from(theirs.records, self.made[against.mode].records)
        if again and (not outputs or against.mode == "eager"):  # outputs of a graph may change it
            origin = f"Two {against.name} runs of this task are not the same either: something in "
            origin += "it or its data is drawn from what no seed reaches."
        else:
            origin = _origin(ours, theirs)
        return Difference(step, *largest(ours.arrays, theirs.arrays), origin)


class _Lent:
    """Stands in for ``configure_optimizers``: what it returns is put back after the run."""

    def __init__(self, task: TaskModule) -> None:
        self._task = task
        self._own = vars(task).get("configure_optimizers")
        self._loans: List[OptimizerLoan] = []
        self._schedulers: List[Tuple[Dict[str, Any], Dict[str, Any]]] = []

    def configure(self) -> Any:
        """What the task's own ``configure_optimizers`` returns."""
        del self._task.__dict__["configure_optimizers"]
        if self._own is not None:
            self._task.__dict__["configure_optimizers"] = self._own
        returned = self._task.configure_optimizers()
        for made in read_all(returned, type(self._task).__name__):
            self._loans.append(OptimizerLoan(made.optimizer))
            if hasattr(made.scheduler, "__dict__"):
                attributes = vars(made.scheduler)
                self._schedulers.append((attributes, dict(attributes)))
        return returned

    def give_back(self) -> None:
        """Put optimizers and schedulers back."""
        for loan in self._loans:
            loan.give_back()
        for attributes, kept in self._schedulers:
            attributes.clear()
            attributes.update(kept)


# ---------------------------------------------------------------------- comparing


def compare(
    ours: Sequence[Record], theirs: Sequence[Record], overlap: bool = False
) -> Tuple[Dict[str, Optional[int]], Optional[int]]:
    """Of each quantity the first step that differs, and the first batch in which one does.

    A batch that only one of the two has differs in everything, but for ``overlap``.
    """
    first: Dict[str, Optional[int]] = dict.fromkeys(QUANTITIES)
    at: Optional[int] = None
    in_ours, in_theirs = ({record.batch: record for record in each} for each in (ours, theirs))
    numbers = set(in_ours) & set(in_theirs) if overlap else set(in_ours) | set(in_theirs)
    for number in sorted(numbers):
        one, other = in_ours.get(number), in_theirs.get(number)
        record = one or other
        for quantity in QUANTITIES:
            same = one and other and one.values[quantity] == other.values[quantity]
            if not same and first[quantity] is None and record is not None:
                first[quantity] = record.step
                at = number if at is None else at
    return first, at


def _has(at: int, records: Sequence[Record]) -> bool:
    return any(record.batch == at for record in records)


def _step_of(at: int, *runs: Sequence[Record]) -> int:
    return next(record.step for records in runs for record in records if record.batch == at)


def _differs_from(again: Sequence[Record], before: Sequence[Record]) -> bool:
    return compare(again, before, overlap=True)[1] is not None


def largest(
    ours: Dict[str, np.ndarray], theirs: Dict[str, np.ndarray]
) -> Tuple[Optional[str], float]:
    """The parameter or buffer with the largest difference, and how large it is."""
    worst: Optional[str] = None
    most = 0.0
    for name, array in ours.items():
        other = theirs.get(name)
        if other is None or array.shape != other.shape:
            return name, float("inf")
        if array.tobytes() != other.tobytes():
            with np.errstate(invalid="ignore"):
                apart = np.abs(array.astype("float64") - other.astype("float64")).max()
            distance = float(apart) if np.isfinite(apart) else float("inf")
            if worst is None or distance > most:
                worst, most = name, distance
    return worst, most


def _origin(ours: Recorder, theirs: Recorder) -> str:
    """Where the difference of the batch recorded last comes from, as far as that can be told."""
    others = [n for n, v in theirs.attributes.items() if ours.attributes.get(n) != v]
    told = [f"{n} ({ours.attributes.get(n)}, not {theirs.attributes[n]})" for n in others[:3]]
    also = f" Another after it, too: {', '.join(told)}." if told else ""
    return _place(ours, theirs) + also


def _place(ours: Recorder, theirs: Recorder) -> str:
    if not ours.records or not theirs.records:
        return "It was not seen again in a second run."
    one, other = ours.records[-1].values, theirs.records[-1].values
    differing = {quantity for quantity in QUANTITIES if one[quantity] != other[quantity]}
    if "data" in differing:
        return "The data gave another batch there: its order or what it draws is not the same."
    if "rates" in differing:
        return "The rates are others there."
    for name, output in theirs.outputs.items():
        if name not in ours.outputs:
            return f"The module {name} is called in one of the two runs only."
        if ours.outputs[name].tobytes() != output.tobytes():
            return f"The first output that differs is that of {name}."
    if set(ours.outputs) - set(theirs.outputs):
        return "Other modules are called in the two runs."
    known = bool(theirs.outputs)
    if "loss" in differing and known:
        return "All modules' outputs are the same: training_step itself computes another loss."
    worst, _ = largest(ours.arrays, theirs.arrays)
    if "loss" in differing and worst is not None:
        return f"The loss differs; {worst} differs most after the step."
    if worst is not None and known:
        return (
            "The loss and all modules' outputs are the same: it comes from the backward pass, "
            "clipping or the optimizer's update."
        )
    if "metrics" in differing:
        names = [n for n in other["metrics"] if one["metrics"].get(n) != other["metrics"][n]]
        missing = sorted(set(one["metrics"]) - set(other["metrics"]))
        return f"The weights are the same; logged otherwise: {', '.join([*names, *missing])}."
    return "It was not seen again in a second run." if not differing else "Nothing tells where."
