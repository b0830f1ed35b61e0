"""Metrics of several ranks: what each logs, folded on all of them as one process would have.

A rank keeps what it logs until all exchange it, and then each folds the rows of all in the order
in which one process would have logged them: by batch, then by rank.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Dict, Iterable, List, Tuple

import attrs

from ofengine.data.structure import batch_size_of
from ofengine.errors import ConfigurationError
from ofengine.metrics.base import Metric
from ofengine.metrics.log import MOST_PENDING, Metrics
from ofengine.metrics.stage import LOSS, LogSpec, Stage, read_all
from ofengine.ranks.meetings import Meetings

_OUTSIDE = -1
"""The batch of what was logged between batches."""

Row = Tuple[int, LogSpec, Any, float]
"""The batch's index, how it is reported, the value, its weight in the epoch's mean."""
Last = Dict[str, Tuple[LogSpec, Any, int]]
Sums = Dict[str, List[Any]]
"""As a :class:`~ofengine.metrics.stage.Stage` has them."""


class SharedMetrics(Metrics):
    """The metrics of all ranks. ``log`` and ``commit`` tell nobody; reading waits for all."""

    def __init__(self, meetings: Meetings) -> None:
        super().__init__()
        self._meetings = meetings
        meetings.give_metrics = self._give
        meetings.take_metrics = self._take
        meetings.show_metrics = self._show
        self._rows: Dict[int, List[Row]] = {}
        """Of each stage, by its depth, what was not folded yet."""
        self._shown: Dict[int, Tuple[Last, Sums]] = {}
        """Of each stage, by its depth, what the last look at all ranks saw."""
        self._unread = 0

    def attach(self, task: Any, callbacks: Iterable[Any]) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`. Raises for metrics that count."""
        super().attach(task, callbacks)
        for place, metric in self.held.items():
            raise _one_rank_only(place, metric)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`. Raises for metrics that count."""
        if isinstance(value, Metric):
            raise _one_rank_only(f"log({name!r}, ...)", value)
        super().log(name, value, *args, **options)

    def commit(self, batch: Any = None) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        stage = self._stages[-1]
        if not stage.current:
            return
        rows = self._rows_of(stage)
        batch_size = 1 if batch is None else batch_size_of(batch)
        index = _OUTSIDE if batch is None else stage.batch_idx
        for logged, values in stage.current:
            places = dict.fromkeys(each[1:] for each in [*logged.on_step, *logged.on_epoch])
            for spec, tensor, at in places:
                weight = batch_size if spec.batch_size is None else spec.batch_size
                value = values[tensor]
                if getattr(value, "ndim", 0):  # of several numbers, from a compiled step
                    value = value[at]
                rows.append((index, spec, value, float(weight)))
        self._unread += len(stage.current)
        stage.current.clear()
        if self._unread >= MOST_PENDING:
            self._unread = 0
            self._read(rows)

    def _rows_of(self, stage: Stage) -> List[Row]:
        rows = self._rows.setdefault(self._stages.index(stage), [])
        if stage.loss is not None:
            rows.append((stage.batch_idx, LOSS, stage.loss, 0.0))
            stage.loss = None
        return rows

    @staticmethod
    def _read(rows: List[Row]) -> None:
        numbers = read_all([value for _, _, value, _ in rows])
        rows[:] = [(i, spec, n[0], weight) for (i, spec, _, weight), n in zip(rows, numbers)]

    def peek(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`; the other ranks may be anywhere."""
        if self._stages:
            self._meetings.peek()

    def state(self) -> Dict[str, Any]:
        """See :class:`~ofengine.metrics.log.Metrics`; the other ranks may be anywhere."""
        if not self._stages:
            return super().state()
        stage = self._stages[0]
        if stage.current and len(self._stages) == 1:
            self.commit(stage.batch)  # what hooks have logged for it so far
        self._shown.clear()
        self.peek()
        kept = stage.last, stage.sums
        stage.last, stage.sums = self._shown.get(0, kept)
        try:
            return super().state()
        finally:
            stage.last, stage.sums = kept

    def _peek(self, stage: Stage) -> None:
        """Nothing: what was folded is read, and the rest is not this rank's alone."""

    def flush(self) -> Dict[str, float]:
        """See :class:`~ofengine.metrics.log.Metrics`; all ranks call it."""
        if not self._stages:
            return {}
        self._meetings.metrics()
        return super().flush()

    def end(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        self._rows.pop(len(self._stages) - 1, None)
        super().end()

    def reset(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        self._rows.clear()
        super().reset()

    # ------------------------------------------------------------------ the exchange

    def _give(self) -> Any:
        """This rank's rows of all stages."""
        given = []
        for stage in self._stages:
            rows = self._rows_of(stage)
            self._read(rows)
            specs = list(dict.fromkeys(spec for _, spec, _, _ in rows))
            place = {spec: number for number, spec in enumerate(specs)}
            given.append(
                {
                    "specs": [attrs.asdict(spec) for spec in specs],
                    "rows": [[i, place[spec], value, weight] for i, spec, value, weight in rows],
                }
            )
        return given

    def _take(self, messages: List[Any]) -> None:
        """Fold what all ranks gave; all are at the same point."""
        for depth, stage in enumerate(self._stages):
            losses = _fold(messages, depth, stage.last, stage.sums)
            self._publish_last(stage.last)
            if losses and depth == 0:
                self.newest_loss = next((each for each in losses if not isfinite(each)), losses[-1])
        self._rows.clear()

    def _show(self, messages: List[Any]) -> None:
        """See what it comes to so far; the others may be further, or behind."""
        for depth, stage in enumerate(self._stages):
            last, sums = dict(stage.last), {name: [*kept] for name, kept in stage.sums.items()}
            self._shown[depth] = last, sums
            _fold(messages, depth, last, sums)
            self._publish_last(last)

    def _publish_last(self, last: Last) -> None:
        for spec, value, _ in last.values():
            self._publish(spec, spec.step_name, value)


def _one_rank_only(where: str, metric: Metric) -> ConfigurationError:
    return ConfigurationError(
        f"{where}: the sums of ofengine.metrics.{type(metric).__name__} are those of one rank, and "
        "several train here: log a tensor of each batch, whose mean is that of all ranks."
    )


def _fold(messages: List[Any], depth: int, last: Last, sums: Sums) -> List[float]:
    """Add what all ranks gave for the stage of this depth; return the losses among it."""
    rows: List[Tuple[int, int, int, LogSpec, float, float]] = []
    for rank, stages in enumerate(messages):
        told = stages[depth] if depth < len(stages) else {"specs": [], "rows": []}
        specs = [LogSpec(**each) for each in told["specs"]]
        for place, (index, number, value, weight) in enumerate(told["rows"]):
            rows.append((index, rank, place, specs[number], value, weight))
    inside = sorted((row for row in rows if row[0] != _OUTSIDE), key=lambda row: row[:3])
    outside = [row for row in rows if row[0] == _OUTSIDE]
    for _, _, _, spec, value, weight in [*inside, *_said_once(outside, len(messages))]:
        if spec.on_step:
            last[spec.full_name] = (spec, value, 0)
        if spec.on_epoch:
            _, total, weights = sums.get(spec.full_name, (spec, 0.0, 0.0))
            sums[spec.full_name] = [spec, total + value * weight, weights + weight]
    return [row[4] for row in inside if row[3] == LOSS]


def _said_once(rows: List[Any], ranks: int) -> List[Any]:
    """What all ranks logged alike between batches counts once; what they logged otherwise, each."""
    by_rank: List[List[Any]] = [
        [row[3:] for row in rows if row[1] == rank] for rank in range(ranks)
    ]
    if all(repr(each) == repr(by_rank[0]) for each in by_rank[1:]):  # a NaN is like another
        return [row for row in rows if row[1] == 0]
    return rows
