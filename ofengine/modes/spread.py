"""How the batch of one round lies on the ranks, and what a trace over all of it does with that.

A step of several ranks is traced over the batches of all of them as one, whose rows lie on the
ranks that loaded them. Where these are no balanced shares, which OneFlow does not take, as at the
end of the data, all ranks have the whole batch and compute the same.
"""

from __future__ import annotations

from typing import Any, Callable, List, Sequence, Tuple

import attrs

from ofengine._oneflow.global_tensors import Ranks
from ofengine._oneflow.late_inputs import eager_result
from ofengine.modes.draws import Draw, Feed


@attrs.frozen
class Round:
    """The rows that each rank has of one batch of all."""

    rows: Tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """The rows of all."""
        return sum(self.rows)

    @property
    def is_cut(self) -> bool:
        """True where each rank has its own rows; else all have the whole batch."""
        least, more = divmod(self.total, len(self.rows))
        return least > 0 and self.rows == tuple(
            least + (rank < more) for rank in range(len(self.rows))
        )

    @property
    def own(self) -> slice:
        """Which of all rows are this rank's."""
        start = sum(self.rows[: self.rank])
        return slice(start, start + self.rows[self.rank])

    @property
    def teller(self) -> int:
        """The rank that records what a step logs: the first that has rows."""
        return next(rank for rank, rows in enumerate(self.rows) if rows)


class Spread:
    """What a trace over the batch of a round does with its tensors.

    Args:
        ranks: where global tensors lie.
        round_: the rows of the batch.
    """

    def __init__(self, ranks: Ranks, round_: Round) -> None:
        self._ranks = ranks
        self.round = round_
        self.cut: List[int] = []
        """The outputs of which each rank is to have its own rows."""

    def has_rows(self, tensor: Any) -> bool:
        """True where the first dimension of ``tensor`` is that of the batch."""
        return bool(tensor.ndim) and tensor.shape[0] == self.round.total

    def whole(self, tensors: Sequence[Any]) -> List[Any]:
        """Tensors of the trace, each as one that all ranks have whole."""
        return [self._ranks.whole(each) for each in tensors]

    def rows(self, tensors: Sequence[Any], first: int) -> List[Any]:
        """The same of what a step returns, but for tensors that have a row for each sample.

        ``first``: the number of outputs that the graph has before these.
        """
        placed: List[Any] = []
        for number, each in enumerate(tensors, first):
            has_rows = self.has_rows(each)
            if has_rows:
                self.cut.append(number)
            cut = has_rows and self.round.is_cut
            placed.append(self._ranks.rows(each) if cut else self._ranks.whole(each))
        return placed

    def logs(self, logs: Sequence[Tuple[Any, Any]]) -> List[Tuple[Any, Any]]:
        """What a step logs of all rows at once."""
        weighted: List[Tuple[Any, Any]] = []
        for spec, value in logs:
            if spec.batch_size is None:
                spec = attrs.evolve(spec, batch_size=self.round.total)
            is_global = getattr(value, "is_global", False)
            weighted.append((spec, self._ranks.whole(value) if is_global else value))
        return weighted

    def gradients(self, parameters: Sequence[Any]) -> None:
        """Make the gradients those of all rows, on all ranks."""
        for each in parameters:
            if each.grad is not None:
                each.grad = self._ranks.whole(each.grad)

    def feed(self, add_input: Callable[[Any], Any]) -> Feed:
        """As :class:`~ofengine.modes.draws.Feed`."""
        return _FeedOfRanks(add_input, self, self._ranks)


class _FeedOfRanks(Feed):
    """Each rank draws for its own rows, as in eager mode; for all else rank 0 draws."""

    def __init__(self, add_input: Callable[[Any], Any], spread: Spread, ranks: Ranks) -> None:
        super().__init__(add_input)
        self._spread, self._ranks = spread, ranks

    def _is_cut(self, like: Any) -> bool:
        return like is not None and self._spread.round.is_cut and self._spread.has_rows(like)

    def _shape(self, like: Any) -> Tuple[int, ...]:
        shape = tuple(like.shape)
        round_ = self._spread.round
        return (round_.rows[round_.rank], *shape[1:]) if self._is_cut(like) else shape

    def _feed(self, prepare: Callable[[], Draw], example: Any, like: Any = None) -> Any:
        place = self._ranks.rows if self._is_cut(like) else self._ranks.whole

        def prepare_global() -> Draw:
            draw = prepare()
            return lambda: place(draw())

        return super()._feed(prepare_global, eager_result(place, example), like)
