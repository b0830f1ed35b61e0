"""The proof on several ranks: they are one process that accumulates their batches, to the bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import attrs

from ofengine.callback import Callback
from ofengine.errors import ConfigurationError, DataError
from ofengine.ranks.meetings import Meetings
from ofengine.run.settings import Settings
from ofengine.run.windows import times
from ofengine.task import TaskModule
from ofengine.trials.proof import Difference, Report, Row
from ofengine.trials.prove import RATES, Fit, Proof, Way, begin_proof, compare, largest, left_out
from ofengine.trials.recording import Record, Recorder

_RANKS, _ONE = "ranks", "one"


def prove_ranks(
    settings: Settings,
    callbacks: Sequence[Callback],
    task: TaskModule,
    train_dataloaders: Any,
    fit: Fit,
    *,
    steps: int = 20,
) -> Report:
    """Train ``task`` on all ranks, and in one process that accumulates as many batches; compare.

    Four runs from one start: one process, on rank 0; all ranks; and both resumed from a checkpoint
    of half the steps of the ranks, or of the one process. After every round of all ranks: each
    rank's batch and its loss, every parameter and buffer of each rank, the values that were logged,
    the rate of every group. All else is as in :func:`ofengine.trials.prove.prove`, whose arguments
    these are. All ranks call it, and all get the report.

    Raises:
        ConfigurationError: an argument is wrong, or ranks are not to equal one process.
        DataError: the data can be gone through only once, or there is none.
        OFEngineError: what ``fit`` raises.
    """
    if settings.world is None:
        raise ConfigurationError("prove_ranks is for a process that is one of several ranks.")
    if settings.sync_batchnorm:
        raise ConfigurationError(
            "prove compares bits with one process that accumulates, whose batch norms see one "
            "batch at a time: leave out sync_batchnorm."
        )
    source = begin_proof(settings, task, train_dataloaders, steps)
    with tempfile.TemporaryDirectory(prefix="ofengine-prove-") as own:
        meetings = Meetings(settings.world)
        folder = Path(meetings.talk(own)[0])
        given = task, source, fit, steps, folder
        ranks = Proof(attrs.evolve(settings, mode="eager"), callbacks, *given)
        one = Proof(_of_one(settings), _of_one_s(callbacks, settings.world_size), *given)
        rows = _Comparison(meetings, {_RANKS: ranks, _ONE: one}).rows()
        meetings.talk(None)  # files of rank 0 are read until here
    return Report(type(task).__name__, steps, rows, left_out(callbacks))


def _of_one(settings: Settings) -> Settings:
    """Those of one process that goes through the batches of all ranks."""
    ranks = settings.world_size
    counts = (
        "limit_train_batches", "limit_val_batches", "val_check_interval", "overfit_batches",
    )  # fmt: skip
    changes: Dict[str, Any] = {
        "mode": "eager", "world": None, "devices": 1, "num_nodes": 1,
        "accumulate_grad_batches": times(settings.accumulate_grad_batches, ranks),
    }  # fmt: skip
    for name in counts:
        value = getattr(settings, name)
        changes[name] = ranks * value if type(value) is int else value
    return attrs.evolve(settings, **changes)


def _of_one_s(callbacks: Sequence[Callback], ranks: int) -> List[Callback]:
    """The same decay, counted in the batches of all ranks."""
    deciding: List[Callback] = []
    for each in callbacks:
        if isinstance(each, RATES):
            events = each.decay_events
            if events is not None:
                every = events.every_n_batches * ranks
                each = type(each)(every, per_epoch=events.per_epoch, key=events.key)
            deciding.append(each)
    return deciding


@attrs.frozen
class _Run:
    """What a run has recorded: of each rank, or of one process; elsewhere than on rank 0 nothing.

    Batches count those of all ranks; a rank's record is of the last one of its round.
    """

    by_rank: List[List[Record]]
    saved_at: Optional[int]
    recorder: Recorder

    def rounds(self, ends: Sequence[int]) -> List[Record]:
        """One record for each round, which ``ends`` with one of these batches."""
        rounds = []
        for before, end in zip([0, *ends], ends):
            own = [
                record
                for records in self.by_rank
                for record in records
                if before < record.batch <= end
            ]
            if not own:
                continue
            last = own[-1]
            if len(self.by_rank) > 1:
                weights, last = [each.values["weights"] for each in own], own[0]
            else:
                weights = [last.values["weights"]] * len(own)
            values: Dict[str, Dict[str, bytes]] = {
                "data": {f"batch {i}": r.values["data"]["batch"] for i, r in enumerate(own)},
                "loss": {f"batch {i}": r.values["loss"]["loss"] for i, r in enumerate(own)},
                "weights": {f"{i} {n}": v for i, w in enumerate(weights) for n, v in w.items()},
                "metrics": dict(last.values["metrics"]),
                "rates": dict(last.values["rates"]),
            }
            rounds.append(Record(end, last.step, values))
        return rounds


class _Comparison:
    """The runs of all ranks and of one process, made and compared; on all ranks at once."""

    def __init__(self, meetings: Meetings, proofs: Dict[str, Proof]) -> None:
        self._meetings, self._proofs = meetings, proofs
        ranks = f"{meetings.size} ranks"
        self._names = {_RANKS: ranks, _ONE: "one process"}
        self._whole: Dict[str, _Run] = {}
        self._ends: List[int] = []

    def rows(self) -> List[Row]:
        """All rows of the report."""
        for kind in (_RANKS, _ONE):
            self._whole[kind] = self._run(kind, None, self._proofs[kind].saving(kind))
        first = self._whole[_RANKS].by_rank
        self._ends = sorted({record.batch for records in first for record in records})
        beyond = [each.batch for each in self._whole[_ONE].by_rank[0]][-1:]
        self._ends += [batch for batch in beyond if batch > max(self._ends, default=0)]
        if not self._agree(bool(self._ends)):
            raise DataError("prove has nothing to compare: the run came to an end before a step.")
        ranks, one = self._names[_RANKS], self._names[_ONE]
        return [
            self._row(ranks, _RANKS, None, _ONE),
            self._row(f"{ranks}, resumed", _RANKS, _RANKS, _RANKS),
            self._row(f"{one}, then {ranks}", _RANKS, _ONE, _ONE),
            self._row(f"{ranks}, then {one}", _ONE, _RANKS, _RANKS),
        ]

    def _agree(self, value: Any) -> Any:
        """What rank 0 says, a plain value, on all ranks."""
        return self._meetings.talk(value if self._meetings.rank == 0 else None)[0]

    def _row(self, name: str, kind: str, resumes: Optional[str], against: str) -> Row:
        row, at = Row(name, self._names[against], 0, {}), None
        theirs, made = self._whole[against], self._whole[kind]
        since = self._agree(theirs.saved_at) if resumes else 0
        if since is None:
            return attrs.evolve(row, error="the run ended before it could be saved.")
        if resumes:
            made = self._run(kind, resumes, Recorder())
        if self._meetings.rank == 0:
            ours, others = (self._of(each, since) for each in (made, theirs))
            first, at = compare(ours, others)
            steps = len({record.step for record in others})
            row = attrs.evolve(row, steps=steps, first=first)
            if at is not None:
                told = _origin(ours, others, at)
                step = next(each.step for each in (*others, *ours) if each.batch == at)
                row = attrs.evolve(row, difference=Difference(step, None, 0.0, told))
        at = self._agree(at)
        if at is not None:
            again = [self._run(*each, Recorder(whole_at=at)) for each in (
                (kind, resumes), (against, None),
            )]  # fmt: skip
            if row.difference is not None:
                worst = largest(*(each.recorder.arrays for each in again))
                parameter, distance = worst
                difference = attrs.evolve(row.difference, parameter=parameter, distance=distance)
                row = attrs.evolve(row, difference=difference)
        told = self._agree(attrs.asdict(row))
        difference = told.pop("difference")
        return Row(**told, difference=None if difference is None else Difference(**difference))

    def _of(self, run: _Run, since: int) -> List[Record]:
        """The rounds that end after the batch ``since``, without what was before it."""
        later = [[each for each in records if each.batch > since] for records in run.by_rank]
        return attrs.evolve(run, by_rank=later).rounds(self._ends)

    def _run(self, kind: str, resumes: Optional[str], recorder: Recorder) -> _Run:
        """Train on all ranks, or on rank 0 alone while the others wait."""
        way = Way(self._names[kind], "eager", resumes or "")
        if kind == _RANKS or self._meetings.rank == 0:
            self._proofs[kind].run(way, recorder)
        told = [_told(each) for each in recorder.records] if kind == _RANKS else []
        said = self._meetings.talk(told)
        by_rank = [recorder.records]
        if kind == _RANKS:
            by_rank = [[_heard(each) for each in records] for records in said]
        return _Run(by_rank, recorder.saved_at, recorder)


def _told(record: Record) -> List[Any]:
    values = {q: {n: bits.hex() for n, bits in each.items()} for q, each in record.values.items()}
    return [record.batch, record.step, values]


def _heard(told: List[Any]) -> Record:
    batch, step, values = told
    return Record(
        batch, step, {q: {n: bytes.fromhex(v) for n, v in e.items()} for q, e in values.items()}
    )


def _origin(ours: Sequence[Record], theirs: Sequence[Record], at: int) -> str:
    """What differs in the round that ends with the batch ``at``."""
    pair: List[Optional[Record]] = [
        next((each for each in records if each.batch == at), None) for records in (ours, theirs)
    ]
    one, other = pair
    if one is None or other is None:
        return "There one of the two runs is over."
    for quantity, told in _TOLD:
        mine, its = one.values[quantity], other.values[quantity]
        names = [name for name in its if mine.get(name) != its[name]]
        names += [name for name in mine if name not in its]
        if names:
            return told.format(names[0])
    return "Nothing tells where."


_TOLD: Tuple[Tuple[str, str], ...] = (
    ("data", "The data of {} in that round is not the same: its order or what it draws."),
    ("rates", "The rates are others there."),
    ("loss", "The loss of {} in that round is another, of the same data."),
    (
        "weights",
        "All losses are the same: the weights after it (of rank and name {}) come from the "
        "backward pass, clipping, the update or what a hook does.",
    ),
    ("metrics", "The weights are the same; {} is logged otherwise."),
)
