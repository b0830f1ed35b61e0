"""The sums of metrics on several ranks: what each adds, folded on all of them as in one process.

A rank keeps what it adds to a metric until all exchange it. Then each rank adds what all have, in
the order in which one process would have: by batch, then by rank. Whole numbers come out the same
in any order, so those of many batches are added up before they are sent.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import attrs
import numpy as np
import oneflow as flow

from ofengine.metrics.base import Metric, State

OUTSIDE = -1
"""The batch of what happens between batches."""
_MOST_ON_DEVICE = 256
"""So many batches' sums wait on the device before they are read, to bound the memory."""

Key = Tuple[int, int]
"""Which part of the run, counted from its start, and which batch in it."""
_Event = Tuple[Tuple[int, int, int, int], Optional[State]]
"""When in the order of one process, and what is added; None for a reset."""


@attrs.define
class _Own:
    """What this rank has done to the sums of one metric since all last exchanged them."""

    reset_at: Optional[Key] = None
    """When they were reset last; nothing from before that is kept."""
    whole: List[Tuple[Key, Dict[str, Any]]] = attrs.Factory(list)
    """Whole numbers: of each part of the run its last batch, and all before that in one."""
    ordered: List[Tuple[Key, Dict[str, Any]]] = attrs.Factory(list)
    """All else, of each update."""
    fresh: int = 0

    def add(self, key: Key, sums: Mapping[str, Any], rows: Sequence[str]) -> None:
        whole = {n: v for n, v in sums.items() if n not in rows and _is_whole(v)}
        ordered = {name: value for name, value in sums.items() if name not in whole}
        if whole:
            self._add_whole(key, whole)
        if ordered:
            self.ordered.append((key, ordered))
            self.fresh += 1
            if self.fresh >= _MOST_ON_DEVICE:
                self.read()

    def _add_whole(self, key: Key, sums: Dict[str, Any]) -> None:
        if self.whole and self.whole[-1][0] == key:
            self.whole[-1] = key, _added(self.whole[-1][1], sums)
            return
        if len(self.whole) > 1 and self.whole[-2][0][0] == self.whole[-1][0][0]:
            last = self.whole.pop()
            self.whole[-1] = last[0], _added(self.whole[-1][1], last[1])
        self.whole.append((key, sums))

    def read(self) -> None:
        """Have all of it as numpy has it, which waits for the device."""
        self.whole = [(k, {n: _array(v) for n, v in each.items()}) for k, each in self.whole]
        kinds: Dict[Tuple[Any, ...], List[Tuple[Dict[str, Any], str]]] = {}
        for _, sums in self.ordered:
            for name, value in sums.items():
                if isinstance(value, flow.Tensor):
                    kinds.setdefault((value.dtype, value.device), []).append((sums, name))
        for places in kinds.values():
            tensors = [sums[name] for sums, name in places]
            flat = [each.contiguous().reshape(-1) for each in tensors]
            together = (flow.cat(flat, dim=0) if len(flat) > 1 else flat[0]).numpy()
            start = 0
            for (sums, name), tensor in zip(places, tensors):
                stop = start + tensor.numel()
                sums[name] = together[start:stop].reshape(tuple(tensor.shape))
                start = stop
        self.fresh = 0

    def told(self) -> Dict[str, Any]:
        """It as a plain value."""
        self.read()
        added = [[*key, sums] for key, sums in (*self.whole, *self.ordered)]
        return {"reset": self.reset_at, "added": added}


class SharedSums:
    """The sums that the metrics of a run have on all ranks.

    Args:
        now: at which part and batch of the run this rank is.
        held: the metrics that are held by place; these have the sums of all ranks, and any other
            metric has its rank's own.
        peek: has all ranks' sums given to :meth:`show`; False where that can no longer be.
    """

    def __init__(
        self,
        now: Callable[[], Key],
        held: Callable[[], Dict[str, Metric]],
        peek: Callable[[], bool],
    ) -> None:
        self._now, self._held, self._peek = now, held, peek
        self._own: Dict[Tuple[str, bool], _Own] = {}
        """By the metric's place, and whether it is of an evaluation."""
        self._places: Dict[int, Tuple[str, Metric]] = {}
        self._shown: Dict[Tuple[str, bool], State] = {}

    def place_of(self, metric: Metric) -> Optional[str]:
        """Where ``metric`` is held; None where it is not."""
        if id(metric) not in self._places:
            self._places = {id(each): (place, each) for place, each in self._held().items()}
        found = self._places.get(id(metric))
        return None if found is None else found[0]

    # ------------------------------------------------------------------ what a metric calls

    def add(self, metric: Metric, evaluation: bool, sums: Mapping[str, Any]) -> bool:
        """Add to the metric's sums of all ranks; False where it has its rank's own."""
        place = self.place_of(metric)
        if place is not None:
            own = self._own.setdefault((place, evaluation), _Own())
            own.add(self._now(), sums, metric.rows)
        return place is not None

    def reset(self, metric: Metric, evaluation: bool) -> None:
        """Begin anew; the metric has dropped what it had of all ranks."""
        place = self.place_of(metric)
        if place is not None:
            self._own[place, evaluation] = _Own(reset_at=self._now())

    def states(self, metric: Metric) -> Optional[Dict[bool, State]]:
        """The sums of all ranks, of training (False) and of evaluation (True).

        The other ranks may be anywhere. None for a metric that has its rank's own.
        """
        place = self.place_of(metric)
        if place is None:
            return None
        self._shown.clear()
        if not self._peek():
            self.show([self.give()])
        return {side: self.shown(place, metric, side) for side in (False, True)}

    def has_own(self, metric: Metric) -> bool:
        """True where this rank has added something to its sums of training lately."""
        own = self._own.get((self.place_of(metric) or "", False))
        return own is not None and bool(own.whole or own.ordered)

    # ------------------------------------------------------------------ what the engine calls

    def begin(self, evaluation: bool) -> None:
        """Training or an evaluation begins: with no sums, on all ranks."""
        self._own = {key: own for key, own in self._own.items() if key[1] != evaluation}

    def shown(self, place: str, metric: Metric, evaluation: bool) -> State:
        """The sums of all ranks that :meth:`show` has seen last."""
        return self._shown.get((place, evaluation), metric.kept(evaluation))

    def give(self) -> List[Any]:
        """What this rank has added, as a plain value."""
        return [[place, side, own.told()] for (place, side), own in self._own.items()]

    def take(self, given: List[List[Any]]) -> None:
        """Fold what all ranks gave, who are all at the same point, once and for all."""
        folded = self._folded(given, None)
        held = self._held() if folded else {}
        for (place, side), state in folded.items():
            held[place].keep(side, state)
        self._own.clear()

    def show(self, given: List[List[Any]]) -> None:
        """Look at it only. Of training, leave out what others have done beyond this batch."""
        self._shown = self._folded(given, self._now())

    def _folded(self, given: List[List[Any]], until: Optional[Key]) -> Dict[Any, State]:
        by_key: Dict[Tuple[str, bool], List[Any]] = {}
        for rank, all_told in enumerate(given):
            for place, side, told in all_told:
                by_key.setdefault((place, side), [None] * len(given))[rank] = told
        folded, held = {}, self._held() if by_key else {}
        for (place, side), told in by_key.items():
            if place in held:
                last = None if side else until
                metric = held[place]
                folded[place, side] = _fold(metric.kept(side), told, metric.rows, last)
        return folded


def _fold(kept: State, told: List[Any], rows: Sequence[str], until: Optional[Key]) -> State:
    """``kept``, and then what each rank told, in the order of one process."""
    state = dict(kept)
    for _, sums in _in_order(told, until):
        if sums is None:
            state = {}
            continue
        for name, value in sums.items():
            if name not in state:
                state[name] = np.asarray(value)
            elif name in rows:
                state[name] = np.concatenate([state[name], value])
            else:
                state[name] = np.asarray(state[name] + value)
    return state


def _in_order(told: List[Any], until: Optional[Key]) -> List[_Event]:
    events: List[_Event] = []
    between: Dict[int, List[List[_Event]]] = {}
    for rank, own in enumerate(told):
        if own is None:
            continue
        every: List[_Event] = [
            ((part, batch, rank, place), sums)
            for place, (part, batch, sums) in enumerate(own["added"])
        ]
        if own["reset"] is not None:
            part, batch = own["reset"]
            # Between batches all ranks reset before any of them adds.
            every.append(((part, batch, -1 if batch == OUTSIDE else rank, -1), None))
        for event in every:
            if until is not None and event[0][:2] > until:
                continue
            if event[0][1] == OUTSIDE:
                of_ranks = between.setdefault(event[0][0], [[] for _ in told])
                of_ranks[rank].append(event)
            else:
                events.append(event)
    for of_ranks in between.values():
        alike = all(_alike(each, of_ranks[0]) for each in of_ranks[1:])
        for each in of_ranks[:1] if alike else of_ranks:  # what all do alike counts once
            events.extend(each)
    return sorted(events, key=lambda event: event[0])


def _alike(one: List[_Event], other: List[_Event]) -> bool:
    return [_bits(sums) for _, sums in one] == [_bits(sums) for _, sums in other]


def _bits(sums: Optional[State]) -> Any:
    if sums is None:
        return None
    return {n: (v.dtype.str, v.shape, v.tobytes()) for n, v in sums.items()}


def _added(one: Dict[str, Any], other: Dict[str, Any]) -> Dict[str, Any]:
    added = dict(one)
    for name, value in other.items():
        if name not in added:
            added[name] = value
        elif isinstance(value, flow.Tensor) and isinstance(added[name], flow.Tensor):
            added[name] = added[name] + value
        else:
            added[name] = np.asarray(_array(added[name]) + _array(value))
    return added


def _is_whole(value: Any) -> bool:
    if isinstance(value, flow.Tensor):
        return not value.dtype.is_floating_point
    return bool(np.asarray(value).dtype.kind in "iu")


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.numpy() if isinstance(value, flow.Tensor) else value)
