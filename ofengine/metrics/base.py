"""Metric: sums of a whole epoch, added up on the device and read when they are asked for."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import (
    Any,
    ClassVar,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
)

import attrs
import numpy as np
import oneflow as flow

from ofengine.constructors import ships, tells_unknown_arguments
from ofengine.errors import ConfigurationError, GraphModeError, quoted
from ofengine.tracing import active_trace, forbid_in_trace

State = Dict[str, np.ndarray]
"""The sums of a metric by name, as numpy has them: whole numbers, or float64."""

_MOST_ROWS = 256
"""So many batches' rows are put together at once, to keep few tensors."""
_evaluating: ContextVar[bool] = ContextVar("evaluating", default=False)


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """In the block an evaluation runs, which has sums of its own."""
    token = _evaluating.set(True)
    try:
        yield
    finally:
        _evaluating.reset(token)


class OfAllRanks(Protocol):
    """Has the sums of all ranks, in a run of several; see :mod:`ofengine.shared_sums`."""

    def add(self, metric: Metric, evaluation: bool, sums: Mapping[str, Any]) -> bool:
        """Add to the metric's sums of all ranks; False where it has its rank's own."""

    def reset(self, metric: Metric, evaluation: bool) -> None:
        """Begin anew; the metric has dropped what it had of all ranks."""

    def has_own(self, metric: Metric) -> bool:
        """True where this rank has added something to its sums of training lately."""

    def states(self, metric: Metric) -> Optional[Dict[bool, State]]:
        """The sums of all ranks, of training (False) and of evaluation (True), if they have any."""


_ranks: ContextVar[Optional[OfAllRanks]] = ContextVar("ranks", default=None)


@contextlib.contextmanager
def shared_with(ranks: OfAllRanks) -> Iterator[None]:
    """In the block several ranks run, and metrics have the sums of all."""
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


@attrs.define(eq=False)
class _Sums:
    """What has been added up since the last reset: in training, or in evaluation."""

    totals: Dict[str, Any] = attrs.Factory(dict)
    rows: Dict[str, List[Any]] = attrs.Factory(dict)
    """Of each name that keeps rows: tensors of many batches, then of one batch each."""
    fresh: int = 0
    """How many of these are of one batch."""
    before: State = attrs.Factory(dict)
    """What a checkpoint or other ranks have brought."""
    newest: Dict[str, Any] = attrs.Factory(dict)
    """What the newest update has added."""

    def copy(self) -> _Sums:
        """These sums as they are now; adding to one does not change the other."""
        rows = {name: list(each) for name, each in self.rows.items()}
        return _Sums(dict(self.totals), rows, self.fresh, dict(self.before), dict(self.newest))

    def add(self, sums: Mapping[str, Any], rows: Sequence[str]) -> None:
        """Add what one batch has; of ``rows``, behind what is there."""
        self.newest = dict(sums)
        for name, value in sums.items():
            if name in rows:
                self.rows.setdefault(name, []).append(value)
            elif name in self.totals:
                self.totals[name] = self.totals[name] + value
            elif name in self.before:
                self.totals[name] = flow.tensor(self.before.pop(name)).to(value.device) + value
            else:
                self.totals[name] = value
        self.fresh += bool(rows)
        if self.fresh >= _MOST_ROWS:
            for each in self.rows.values():
                each[-self.fresh :] = [flow.cat(each[-self.fresh :], dim=0)]
            self.fresh = 0

    def read(self) -> State:
        """All of it as numpy has it, which waits for the device."""
        state = {**self.before, **{name: value.numpy() for name, value in self.totals.items()}}
        for name, tensors in self.rows.items():
            before = [self.before[name]] if name in self.before else []
            state[name] = np.concatenate([*before, *(each.numpy() for each in tensors)])
        return state

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Sums:
        """What :meth:`read` gave."""
        return cls(before={name: np.asarray(value) for name, value in state.items()})

    def __bool__(self) -> bool:
        """True where there is something to make a value of."""
        return bool(self.totals or self.rows or self.before)


class _Both:
    """The sums of training (False) and of evaluation (True).

    In an object of its own, which stays the same: the guards of compiled steps look at the
    metric's other attributes, and need not look at these.
    """

    def __init__(self) -> None:
        self._sides = [_Sums(), _Sums()]

    def __getitem__(self, evaluation: bool) -> _Sums:
        return self._sides[evaluation]

    def __setitem__(self, evaluation: bool, sums: _Sums) -> None:
        self._sides[evaluation] = sums


class Metric:
    """The base of all metrics: ``update`` with each batch, ``compute``, ``reset``.

    Nothing waits for the device before the value is asked for. An ``update`` in a compiled step
    is computed in the graph, and its sums come out of it. Training and evaluation each have sums
    of their own, so that one object may be used in both; they begin anew with each ``fit`` and
    each evaluation. A checkpoint keeps the sums of metrics that are attributes of the task, of a
    module in it or of a callback, or in a list or dict that is one.

    A metric of your own writes :meth:`sums` and :meth:`value`, and, where it keeps rows and no
    sums, names these in ``rows``. ``batch`` and ``options`` are what :meth:`update` is called with,
    ``sums`` what :meth:`sums` made of one batch, ``state`` all sums by name, as arrays of numpy.
    """

    rows: ClassVar[Tuple[str, ...]] = ()
    """Those of :meth:`sums` that are not added up, but put behind each other."""
    is_scalar: bool = True
    """True where :meth:`value` is one number, which can be logged."""
    _kept: _Both

    def __init_subclass__(cls, **options: Any) -> None:
        """Of ofengine's own ones, an argument that they have not is told."""
        super().__init_subclass__(**options)
        if ships(cls):
            tells_unknown_arguments(cls)

    def __new__(cls, *_: Any, **__: Any) -> Metric:
        """With no sums yet, whether or not a subclass calls ``super().__init__()``."""
        self = super().__new__(cls)
        self._kept = _Both()
        return self

    # ------------------------------------------------------------------ what a metric writes

    def sums(self, *batch: Any, **options: Any) -> Dict[str, Any]:
        """What one batch adds, by name: tensors of int64 or float64 of the same shape each time.

        Traced in graph mode: it cannot read tensors, and no gradient is computed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sums(...).")

    def value(self, state: State) -> Any:
        """The metric's value from all sums."""
        raise NotImplementedError(f"{type(self).__name__} has no value(state).")

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """Kinds of numbers ("i" or "f") and shapes of :meth:`sums`, to check what a file holds.

        None stands for any length. Default: nothing is known.
        """
        return {}

    # ------------------------------------------------------------------ what a user calls

    def update(self, *batch: Any, **options: Any) -> None:
        """Add a batch. Works the same in both modes and never waits for the device."""
        with flow.no_grad():
            sums = self.sums(*batch, **options)
        trace = active_trace()
        if trace is not None:
            trace.record_update(self, sums)
        else:
            self.add(sums)

    def __call__(self, *batch: Any, **options: Any) -> None:
        """As :meth:`update`."""
        self.update(*batch, **options)

    def compute(self) -> Any:
        """The value of all updates since the last reset. Waits for the device.

        Outside of an evaluation, the sums of training count, or, where there are none, those of
        the last evaluation.

        Raises :class:`ConfigurationError` where there was no update.
        """
        forbid_in_trace(f"{type(self).__name__}.compute()")
        state = self.state_dict()
        if not state:
            raise ConfigurationError(
                f"{type(self).__name__} has no value: it had no update since it was reset; call "
                "update(...) with each batch first."
            )
        return self.value(state)

    def reset(self) -> None:
        """Begin anew."""
        forbid_in_trace(f"{type(self).__name__}.reset()")
        evaluation, ranks = _evaluating.get(), _ranks.get()
        if not evaluation and not self._kept[False]:
            is_of_training = ranks is not None and (ranks.has_own(self) or self._of_ranks()[False])
            evaluation = not is_of_training
        self._kept[evaluation] = _Sums()
        if ranks is not None:
            ranks.reset(self, evaluation)

    def state_dict(self) -> State:
        """The sums, empty where there was no update; waits for the device."""
        if _ranks.get() is not None:
            states = self._of_ranks()
            return states[_evaluating.get() or not states[False]]
        return self._kept[_evaluating.get() or not self._kept[False]].read()

    def _of_ranks(self) -> Dict[bool, State]:
        ranks = _ranks.get()
        states = None if ranks is None else ranks.states(self)
        return {side: self.kept(side) for side in (False, True)} if states is None else states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        evaluation, ranks = _evaluating.get(), _ranks.get()
        self._kept[evaluation] = _Sums()
        if ranks is not None:
            ranks.reset(self, evaluation)
        if ranks is None or not ranks.add(self, evaluation, state):
            self._kept[evaluation] = _Sums.of(state)

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of several, such as ranks, in the order in which they are given.

        Whole numbers are added exactly, others in float64 one after the other; rows are put
        behind each other.
        """
        merged: State = {}
        for state in states:
            for name, value in state.items():
                value = np.asarray(value)
                if name not in merged:
                    merged[name] = value
                elif name in self.rows:
                    merged[name] = np.concatenate([merged[name], value])
                else:
                    merged[name] = merged[name] + value
        self.load_state_dict(merged)

    # ------------------------------------------------------------------ what the engine calls

    def add(self, sums: Mapping[str, Any]) -> None:
        """Add what :meth:`sums` gave for one batch, which a compiled step may have put out.

        Raises :class:`GraphModeError` in a graph of your own.
        """
        for value in sums.values():
            if value.is_lazy:
                raise GraphModeError(
                    f"{type(self).__name__}.update() is called in a graph of your own: return what "
                    "it needs, and update it in on_train_batch_end."
                )
        evaluation, ranks = _evaluating.get(), _ranks.get()
        kept = self._kept[evaluation]
        if ranks is not None and ranks.add(self, evaluation, sums):
            kept.newest = dict(sums)
        else:
            kept.add(sums, self.rows)

    @property
    def newest(self) -> Dict[str, Any]:
        """What the newest update since the last reset has added; empty where there was none."""
        return self._kept[_evaluating.get()].newest

    def value_of(self, sums: Mapping[str, Any]) -> float:
        """The value of one batch, of what :meth:`newest` was; waits for the device."""
        return float(self.value({name: tensor.numpy() for name, tensor in sums.items()}))

    def all_sums(self) -> Dict[bool, _Sums]:
        """The sums of training (False) and of evaluation (True), to be put back later."""
        return {side: self._kept[side].copy() for side in (False, True)}

    def put_back(self, sums: Dict[bool, _Sums]) -> None:
        """Put back what :meth:`all_sums` gave."""
        for side, each in sums.items():
            self._kept[side] = each

    def begin(self, evaluation: bool) -> None:
        """Training or an evaluation begins: with no sums."""
        self._kept[evaluation] = _Sums()

    def kept(self, evaluation: bool) -> State:
        """The sums of training, or of evaluation; of several ranks, up to their last exchange."""
        return self._kept[evaluation].read()

    def keep(self, evaluation: bool, state: State) -> None:
        """These are the sums of all ranks now."""
        newest = self._kept[evaluation].newest
        self._kept[evaluation] = _Sums.of(state)
        self._kept[evaluation].newest = newest

    def misfit(self, state: Mapping[str, Any]) -> Optional[str]:
        """What keeps ``state``, of a file, from being this metric's sums; None where nothing."""
        layout = self.layout()
        if not layout or not state:
            return None
        if set(state) != set(layout):
            return f"has {quoted(sorted(state))} and not {quoted(sorted(layout))}"
        for name, (kind, shape) in layout.items():
            value = np.asarray(state[name])
            like = len(shape) == value.ndim and all(
                wanted in (None, given) for wanted, given in zip(shape, value.shape)
            )
            if value.dtype.kind != kind or not like:
                return f"has {value.dtype} of shape {value.shape} for {name!r}"
        lengths = {len(state[name]) for name in self.rows}
        return "has rows of several lengths" if len(lengths) > 1 else None

    def load_states(self, states: Mapping[str, State]) -> None:
        """Go on from :meth:`states`, which were checked."""
        for name, state in states.items():
            self._kept[name == "evaluation"] = _Sums.of(state)
