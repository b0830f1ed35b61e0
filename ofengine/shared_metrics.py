"""Metrics of several ranks: what each logs, folded on all of them as one process would have.

A rank keeps what it logs until all exchange it, and then each folds the rows of all in the order
in which one process would have logged them: by batch, then by rank.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Callable, ContextManager, Dict, List, Tuple

import attrs

from ofengine.data.structure import batch_size_of
from ofengine.errors import ConfigurationError
from ofengine.metrics.base import Metric, shared_with
from ofengine.metrics.log import MOST_PENDING, Metrics
from ofengine.metrics.stage import LOSS, LogSpec, Stage, of_batch, read_all
from ofengine.ranks.meetings import Meetings
from ofengine.ranks.shares import ABSENT
from ofengine.run.progress import Progress
from ofengine.shared_sums import OUTSIDE, Key, SharedSums

Row = Tuple[int, LogSpec, Any, float, str, int]
"""The batch's index, how it is reported, the value, its weight in the epoch's mean; of a metric
that is computed at the end of the epoch, where it is held; and one of these three:"""
_OF_BATCH, _OF_UPDATE, _OF_UPDATE_WITHOUT_BATCH = range(3)
Last = Dict[str, Tuple[LogSpec, Any, int]]
Sums = Dict[str, List[Any]]
Counted = Dict[str, Tuple[LogSpec, Metric]]
"""As a :class:`~ofengine.metrics.stage.Stage` has them."""


class _OfUpdate(Tuple[Any, Any]):
    """What a hook of an update has logged, which fires on all ranks, with a batch or without."""


class SharedMetrics(Metrics):
    """The metrics of all ranks. ``log`` and ``commit`` tell nobody; reading waits for all."""

    def __init__(self, meetings: Meetings, progress: Progress) -> None:
        super().__init__()
        self._meetings, self._progress = meetings, progress
        self._part = 0
        """Which part of the run it is: all ranks go through the same ones."""
        self._batch = OUTSIDE
        self._shared = SharedSums(self._now, lambda: self.held, self._peek_of_sums)
        meetings.give_metrics = self._give
        meetings.take_metrics = self._take
        meetings.show_metrics = self._show
        self._rows: Dict[int, List[Row]] = {}
        """Of each stage, by its depth, what was not folded yet."""
        self._shown: Dict[int, Tuple[Last, Sums, Counted]] = {}
        """Of each stage, by its depth, what the last look at all ranks saw."""
        self._unread = 0

    def running(self) -> ContextManager[None]:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        return shared_with(self._shared)

    def settle(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`; all ranks call it."""
        self._meetings.metrics()

    def _now(self) -> Key:
        if len(self._stages) == 1 and self._stages[0].per_step:
            return self._part, self._progress.batch_idx
        return self._part, self._batch

    def _enter(self) -> None:
        self._part += 1
        self._batch = OUTSIDE

    def count_anew(self, evaluation: bool) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        super().count_anew(evaluation)
        self._shared.begin(evaluation)

    def begin(self, per_step: bool, suffix: str = "") -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        super().begin(per_step, suffix)
        self._enter()

    def at_batch(self, batch_idx: int) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        super().at_batch(batch_idx)
        self._batch = batch_idx

    def begin_batches(self) -> Stage:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        self._enter()
        return super().begin_batches()

    def end_batches(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        super().end_batches()
        self._enter()

    def around_update(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """See :class:`~ofengine.metrics.log.Metrics`."""

        def marking(*arguments: Any) -> None:
            start = self.logged_so_far()
            hook(*arguments)
            if self._stages:
                current = self._stages[-1].current
                current[start:] = map(_OfUpdate, current[start:])

        return marking

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`. Raises for a metric that nobody holds."""
        if isinstance(value, Metric) and self._shared.place_of(value) is None:
            raise ConfigurationError(
                f"log({name!r}, {type(value).__name__}): several ranks run, which find each "
                "other's metric by the attribute that holds it: make it in the task's __init__, as "
                "in self.acc = Accuracy()."
            )
        super().log(name, value, *args, **options)

    def commit(self, batch: Any = None) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        stage = self._stages[-1]
        if not stage.current:
            return
        rows = self._rows_of(stage)
        has_none = batch is None or batch is ABSENT
        batch_size = 1 if has_none else batch_size_of(batch)
        within = self._progress.batch_idx if batch is ABSENT else stage.batch_idx
        index = OUTSIDE if batch is None else within
        for each in stage.current:
            (logged, values), by = each, _OF_BATCH
            if batch is not None and isinstance(each, _OfUpdate):
                by = _OF_UPDATE_WITHOUT_BATCH if has_none else _OF_UPDATE
            places = dict.fromkeys(each[1:] for each in [*logged.on_step, *logged.on_epoch])
            for spec, tensor, at in places:
                weight = batch_size if spec.batch_size is None else spec.batch_size
                value = values[tensor]
                if getattr(value, "ndim", 0):  # of several numbers, from a compiled step
                    value = value[at]
                rows.append((index, spec, value, float(weight), "", by))
            for _, spec, tensor, _ in logged.counted:
                value = of_batch(spec, values[tensor]) if spec.on_step else 0.0
                place = self._shared.place_of(values[tensor]) or ""
                rows.append((index, spec, value, 0.0, place, by))
        self._unread += len(stage.current)
        stage.current.clear()
        if self._unread >= MOST_PENDING:
            self._unread = 0
            self._read(rows)

    def _rows_of(self, stage: Stage) -> List[Row]:
        rows = self._rows.setdefault(self._stages.index(stage), [])
        if stage.loss is not None:
            rows.append((stage.batch_idx, LOSS, stage.loss, 0.0, "", _OF_BATCH))
            stage.loss = None
        return rows

    @staticmethod
    def _read(rows: List[Row]) -> None:
        numbers = read_all([row[2] for row in rows])
        rows[:] = [(*row[:2], each[0], *row[3:]) for row, each in zip(rows, numbers)]

    def peek(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`; the other ranks may be anywhere."""
        if self._stages:
            self._meetings.peek()

    def _peek_of_sums(self) -> bool:
        self._meetings.peek()
        return not self._meetings.over

    def state(self) -> Dict[str, Any]:
        """See :class:`~ofengine.metrics.log.Metrics`; the other ranks may be anywhere."""
        if not self._stages:
            return super().state()
        stage = self._stages[0]
        if stage.current and len(self._stages) == 1:
            self.commit(stage.batch)  # what hooks have logged for it so far
        self._shown.clear()
        self.peek()
        kept = stage.last, stage.sums, stage.counted
        stage.last, stage.sums, stage.counted = self._shown.get(0, kept)
        try:
            return super().state()
        finally:
            stage.last, stage.sums, stage.counted = kept

    def _sums_of(self, place: str, metric: Metric, evaluation: bool) -> Dict[str, Any]:
        if not self._stages:
            return super()._sums_of(place, metric, evaluation)
        return self._shared.shown(place, metric, evaluation)

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
        self._enter()

    def reset(self) -> None:
        """See :class:`~ofengine.metrics.log.Metrics`."""
        self._rows.clear()
        super().reset()

    # ------------------------------------------------------------------ the exchange

    def _give(self) -> Any:
        """This rank's rows of all stages, and the sums of its metrics."""
        given = []
        for stage in self._stages:
            rows = self._rows_of(stage)
            self._read(rows)
            specs = list(dict.fromkeys(spec for _, spec, *_ in rows))
            place = {spec: number for number, spec in enumerate(specs)}
            given.append(
                {
                    "specs": [attrs.asdict(spec) for spec in specs],
                    "rows": [[i, place[spec], *rest] for i, spec, *rest in rows],
                }
            )
        return {"stages": given, "sums": self._shared.give()}

    def _take(self, messages: List[Any]) -> None:
        """Fold what all ranks gave; all are at the same point."""
        for depth, stage in enumerate(self._stages):
            losses = self._fold(messages, depth, stage.last, stage.sums, stage.counted)
            self._publish_last(stage.last)
            if losses and depth == 0:
                self.newest_loss = next((each for each in losses if not isfinite(each)), losses[-1])
        self._rows.clear()
        self._shared.take([each["sums"] for each in messages])

    def _show(self, messages: List[Any]) -> None:
        """See what it comes to so far; the others may be further, or behind."""
        for depth, stage in enumerate(self._stages):
            sums = {name: [*kept] for name, kept in stage.sums.items()}
            shown = self._shown[depth] = dict(stage.last), sums, dict(stage.counted)
            self._fold(messages, depth, *shown)
            self._publish_last(shown[0])
        self._shared.show([each["sums"] for each in messages])

    def _fold(
        self, messages: List[Any], depth: int, last: Last, sums: Sums, counted: Counted
    ) -> List[float]:
        """Add what all ranks gave for the stage of this depth; return the losses among it."""
        losses, rows = [], _in_order(messages, depth)
        held = self.held if any(place for *_, place in rows) else {}
        for spec, value, weight, place in rows:
            if spec == LOSS:
                losses.append(value)
            if spec.on_step:
                last[spec.full_name] = (spec, value, 0)
            if place:
                counted[spec.full_name] = (spec, held[place])
            elif spec.on_epoch:
                _, total, weights = sums.get(spec.full_name, (spec, 0.0, 0.0))
                sums[spec.full_name] = [spec, total + value * weight, weights + weight]
        return losses

    def _publish_last(self, last: Last) -> None:
        for spec, value, _ in last.values():
            self._publish(spec, spec.step_name, value)


def _in_order(messages: List[Any], depth: int) -> List[Tuple[LogSpec, float, float, str]]:
    """What all ranks gave for the stage of this depth, in the order of one process."""
    rows: List[Any] = []
    for rank, message in enumerate(messages):
        stages = message["stages"]
        told = stages[depth] if depth < len(stages) else {"specs": [], "rows": []}
        specs = [LogSpec(**each) for each in told["specs"]]
        for place, (index, number, *rest) in enumerate(told["rows"]):
            rows.append((index, rank, place, specs[number], *rest))
    of_batches = [row for row in rows if row[-1] == _OF_BATCH and row[0] != OUTSIDE]
    of_updates = [row for row in rows if row[-1] != _OF_BATCH]
    inside = sorted(
        [*of_batches, *_said_by_the_last(of_updates, len(messages))], key=lambda row: row[:3]
    )
    outside = [row for row in rows if row[0] == OUTSIDE]
    return [row[3:-1] for row in [*inside, *_said_once(outside, len(messages))]]


def _said_by_the_last(rows: List[Any], ranks: int) -> List[Any]:
    """What all ranks logged alike around an update counts once, with the window's last batch.

    What they logged otherwise counts for each that had a batch.
    """
    kinds: Dict[Tuple[int, LogSpec], List[List[Any]]] = {}
    for row in rows:
        kinds.setdefault((row[0], row[3]), [[] for _ in range(ranks)])[row[1]].append(row)
    kept: List[Any] = []
    for by_rank in kinds.values():
        values = [repr([row[4] for row in each]) for each in by_rank]  # a NaN is like another
        with_batch = [each for each in by_rank if each and each[0][-1] == _OF_UPDATE]
        for each in with_batch[-1:] if len(set(values)) == 1 else with_batch:
            kept.extend(each)
    return kept


def _said_once(rows: List[Any], ranks: int) -> List[Any]:
    """What all ranks logged alike between batches counts once; what they logged otherwise, each."""
    by_rank: List[List[Any]] = [
        [row[3:] for row in rows if row[1] == rank] for rank in range(ranks)
    ]
    if all(repr(each) == repr(by_rank[0]) for each in by_rank[1:]):  # a NaN is like another
        return [row for row in rows if row[1] == 0]
    return rows
