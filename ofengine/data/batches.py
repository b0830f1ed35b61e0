"""Batches: which ones, in which order, on which device, and in which accumulation window."""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple

import oneflow as flow
from oneflow.utils.data import DataLoader

from ofengine.data.combined import CombinedLoader, each_loader, length_of, together
from ofengine.data.feeds import can_skip_all, open_combined
from ofengine.data.generators import (
    RandomState,
    global_states,
    set_global_states,
    set_states_in,
    states_in,
)
from ofengine.data.loading import Order, can_skip, derive_seed, open_source
from ofengine.data.sources import (
    count_batches,
    describe_once,
    ended_by_its_own,
    is_iterator,
    is_sequence,
    refuse_shared,
    set_epoch,
)
from ofengine.data.steps import STEPPED, Resumption, Step, listed, resumed_step, step_of
from ofengine.data.structure import describe, to_device
from ofengine.errors import DataError, warn
from ofengine.ranks.shares import ABSENT, OTHERS, Share
from ofengine.run.arguments import Limit

_NONE: Any = object()
_BATCH = operator.itemgetter(0)
_ONES, _ALL = itertools.repeat(1), itertools.repeat(True)


class Batches:
    """A dataloader as the loops see it: limited, on the device, in windows.

    Args:
        source: any iterable of batches.
        limit: None for all; an int for so many batches; a float in [0, 1] for that share.
        limit_name: the Trainer's argument that ``limit`` comes from.
        device: where the tensors go.
        what: how errors call it, e.g. ``"train_dataloader"``.
        keep: hold the batches of the first pass and repeat them (``overfit_batches``).
        resumable: note where the generators are when a pass is begun.
        share: which of the batches are this rank's, where there are several; an int for ``limit``
            is then so many batches of each rank.
    """

    def __init__(
        self,
        source: Iterable[Any],
        limit: Limit,
        device: flow.device,
        what: str,
        limit_name: str = "limit",
        keep: bool = False,
        resumable: bool = False,
        share: Optional[Share] = None,
    ) -> None:
        source = together(source, what)
        if not hasattr(source, "__iter__") or isinstance(source, (str, bytes, dict, type)):
            raise DataError(
                f"{what} is {describe(source)}, which holds no batches: give a "
                "oneflow.utils.data.DataLoader or a list of batches."
            )
        self.source = source
        self.what = what
        self.device = device
        self.keep = keep
        self._share = share
        self._resumable = resumable
        self._kept: Optional[List[Any]] = None
        total = length_of(source)
        if total == 0:
            raise DataError(f"{what} is empty: it has no batch (is batch_size larger than the "
                            "dataset, with drop_last=True?).")  # fmt: skip
        if share is not None:
            refuse_shared(source, what)
            limit = limit * share.size if isinstance(limit, int) else limit
        self.count = count_batches(total, limit, what, limit_name)
        """How many batches a pass has, or has at most, of all ranks together; None where that
        shows only at its end."""
        self._total = total
        self._limit_name = limit_name
        # What was not asked for may be left out; what the length does not tell of may not.
        asked_for = isinstance(limit, int) and total is not None and limit <= total
        self._length_counts = total is not None and total == self.count and not asked_for
        self.once = is_iterator(source)
        """True for a generator or another iterator, which as a rule can be had only once."""
        self.pass_seed: Tuple[int, ...] = (0,)
        """What the randomness in worker processes is a function of, with the batch's number."""
        self.states_at_start: Optional[RandomState] = None
        """The generators' states when the last pass was begun, where it is ``resumable``; None
        for a list."""
        self._begun: Tuple[int, ...] = ()
        self.before_load: Optional[Callable[[int], None]] = None
        """Of several ranks: called with the number of each batch of several loaders or of a stream
        before it is loaded."""
        self.transfer: Callable[[Any, flow.device], Any] = to_device
        self.order = Order()
        """What the batches of the last pass are made of, where that is known."""
        self._numbers = itertools.count()
        self.in_round = 1
        """How many batches all ranks together have in the round at hand."""
        self.given = 0
        """How many batches of all ranks the last pass of :meth:`first` has gone through."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of one pass, on the device."""
        return self._from(None)

    def _from(self, resumption: Optional[Resumption], counts: bool = True) -> Iterator[Any]:
        """The batches of one pass; those that are ``done`` are gone through, or skipped.

        Where it does not ``count`` them, whoever takes one takes the next of the numbers too.
        """
        if self._kept is not None:
            self._numbers = itertools.count()
            return iter(self._kept)
        if resumption is not None:
            resumption.begin()
        if self._resumable and not is_sequence(self.source):
            self.states_at_start = self.states()
            self._begun = self.pass_seed
        skipped = resumption.done if resumption is not None and self.can_skip else 0
        self.order = Order()
        begun = (skipped, self.pass_seed, self.order)
        if isinstance(self.source, CombinedLoader):
            batches = open_combined(self.source, *begun, self.what)
            batches = batches if self._share is None else self._share.of(batches, skipped)
        else:
            batches = open_source(self.source, *begun, self._share)
        if isinstance(self.source, DataLoader):
            batches = ended_by_its_own(batches, self.source, self.what, skipped)
        is_seeded = isinstance(self.source, (DataLoader, list))  # by batch, or draws nothing
        if self._share is not None and self.before_load is not None and not is_seeded:
            batches = _each_behind(self.before_load, batches, skipped)
        if self.device.type != "cpu" or self._share is not None:
            batches = (self.transfer(batch, self.device) for batch in batches)
        # Counted in C: where a batch cannot be had, its number is not taken.
        self._numbers = itertools.count(skipped)
        if counts or self.keep:
            batches = map(_BATCH, zip(batches, self._numbers))
        if self.count is not None:
            limited = itertools.islice(batches, self.count - skipped)
            batches = itertools.chain(limited, self._surplus(batches))
        if self.keep:
            self._kept = listed(batches)
            return iter(self._kept)
        return batches

    def _surplus(self, batches: Iterator[Any]) -> Iterator[Any]:
        """No batch; warns where there are more of ``batches`` than the length tells of."""
        if self._length_counts and next(batches, _NONE) is not _NONE:
            self._length_counts = False  # once is enough
            warn(
                f"{self.what} has more batches than its length, {self._total}, and those beyond it "
                f"are left out: correct its __len__, or remove it; or say {self._limit_name}="
                f"{self._total} where no more are meant."
            )
        yield from ()

    def first(self, most: Optional[int]) -> Iterator[Any]:
        """At most so many batches of a pass, no further one being fetched; None for all.

        Of several ranks, this one's, and so many of each.
        """
        # A generator, whose frame tells a batch that cannot be had from a step that fails.
        if self._share is not None:
            yield from self._own(most, self._share)
        else:
            yield from self if most is None else itertools.islice(self, most)

    @property
    def number_to_come(self) -> int:
        """The number, in the pass, of the batch that is fetched next, or could not be."""
        return next(copy.copy(self._numbers))

    def _own(self, most: Optional[int], share: Share) -> Iterator[Any]:
        self.given = 0
        every = iter(self)
        for batch in every if most is None else itertools.islice(every, most * share.size):
            self.given += 1
            if batch is not OTHERS:
                yield batch

    @property
    def rounds(self) -> Optional[int]:
        """How many batches the rank has that has most; None where that is not known."""
        if self._share is None or self.count is None:
            return self.count
        return self._share.rounds(self.count)

    def check_given(self, batches: int, at: str) -> None:
        """Say so where a whole pass gave no batch, or fewer than its length tells of.

        ``at`` is when it was, as the sentence goes on.

        Raises :class:`DataError` for none.
        """
        if self._share is not None:
            batches = self.given
        if batches == 0 and self.count != 0:
            end = f": {describe_once(self.source)}." if self.once else "."
            raise DataError(f"{self.what} gave no batch{at}{end}")
        if self._total is not None and self.count is not None and batches < self.count:
            warn(f"{self.what} {self._gave(batches)}")

    def _gave(self, batches: int) -> str:
        if batches == 0 and self.once:
            return f"gave no batch: {describe_once(self.source)}."
        return (
            f"gave {batches} batches, though its length is {self._total}: correct its __len__, or "
            "remove it."
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell its samplers and datasets which epoch the next pass belongs to, from 0."""
        set_epoch(self.source, 0 if self.keep else epoch)  # what is kept is the first epoch's

    @property
    def states_if_begun(self) -> RandomState:
        """:attr:`states_at_start` of the pass of now, where that was begun; else empty."""
        is_begun = self._begun == self.pass_seed and self.states_at_start is not None
        return dict(self.states_at_start or {}) if is_begun else {}

    @property
    def can_skip(self) -> bool:
        """True where batches that are done need not be loaded again to get behind them."""
        if self.keep or self._total is None:
            return False
        source = self.source
        return can_skip_all(source) if isinstance(source, CombinedLoader) else can_skip(source)

    def steps(self, accumulate: int, resumption: Optional[Resumption] = None) -> Iterator[Step]:
        """The batches of one pass with their windows of ``accumulate`` batches.

        The window that the end of the pass cuts short has the number of batches it really has.
        Where the length is not known, up to ``accumulate`` batches are read ahead to find out.
        """
        if self._share is not None:
            return self._in_rounds(accumulate, resumption, self._share)
        return self._steps(accumulate, resumption)

    def _steps(self, accumulate: int, resumption: Optional[Resumption]) -> Iterator[Step]:
        if self.count is not None and self._total is not None:
            return self._steps_of_known(self.count, accumulate, resumption)
        return self._steps_of_unknown(accumulate, resumption)

    def _in_rounds(
        self, accumulate: int, resumption: Optional[Resumption], share: Share
    ) -> Iterator[Step]:
        """A step for each round of all ranks: this rank's batch in it, or ``ABSENT``.

        Windows are those of one process that averages as many batches as all ranks together.
        """
        mine, self.in_round = ABSENT, 0
        for batch, number, window, closes, is_last in self._steps(
            accumulate * share.size, resumption
        ):
            self.in_round += batch is not STEPPED
            mine = mine if batch is OTHERS else batch
            if is_last or number % share.size == share.size - 1:
                yield mine, number // share.size, window, closes, is_last
                mine, self.in_round = ABSENT, 0
            elif batch is STEPPED:  # in the middle of a round: nothing is due before its end
                mine = ABSENT

    def _steps_of_unknown(
        self, accumulate: int, resumption: Optional[Resumption]
    ) -> Iterator[Step]:
        done = 0 if resumption is None else resumption.done
        batches = self._from(resumption)
        batch_idx = 0
        window_batches = listed(itertools.islice(batches, accumulate))
        while window_batches:
            following = listed(itertools.islice(batches, accumulate))
            window = len(window_batches)
            for place, batch in enumerate(window_batches):
                closes = place == window - 1
                step = (batch, batch_idx, window, closes, closes and not following)
                if resumption is None or batch_idx >= done:
                    yield step
                else:
                    yield from resumed_step(step, resumption)
                    if batch_idx == done - 1:
                        batches = resumption.behind(batches)
                batch_idx += 1
            window_batches = following
        if batch_idx < done:
            raise DataError(
                f"{self.what} gave {batch_idx} batches, and the run was saved after {done} of this "
                "epoch: resume it with the data it was begun with."
            )

    def _steps_of_known(
        self, count: int, accumulate: int, resumption: Optional[Resumption]
    ) -> Iterator[Step]:
        batches = self._from(resumption, counts=False)
        last, first = count - 1, 0
        if resumption is not None:
            first = resumption.done
            if not self.can_skip:
                first = sum(1 for _ in itertools.islice(batches, first))
            if first:
                yield from resumed_step(step_of(count, accumulate, first - 1, STEPPED), resumption)
            batches = resumption.behind(batches)
        # Most of this runs in C, once a step.
        self._numbers = itertools.count(first)
        if accumulate == 1:  # what step_of gives, without its call at every step
            lasts = itertools.chain(itertools.repeat(False, last - first), (True,))
            yield from zip(batches, self._numbers, _ONES, _ALL, lasts)
        else:
            for batch, batch_idx in zip(batches, self._numbers):
                yield step_of(count, accumulate, batch_idx, batch)
        if self.number_to_come <= last:
            raise DataError(f"{self.what} {self._gave(self.number_to_come)}")

    def states(self) -> RandomState:
        """Where the generators that batches may draw from are now, for :meth:`set_states`."""
        return {"global": global_states(), "data": states_in(None, self.source)}

    def set_states(self, states: Optional[RandomState]) -> None:
        """Put the generators where they were when a pass was begun."""
        if states is not None:
            set_global_states(states["global"])
            set_states_in(None, self.source, states["data"])

    def hold(self, states: Optional[RandomState]) -> None:
        """Where batches are kept: take them anew as the pass took them that was begun so."""
        if self.keep and self._kept is None and states is not None:
            self.set_epoch(0)
            self.set_states(states)
            iter(self)

    def check_of(self, round_idx: int) -> int:
        """A number below 2**24 that tells what the last batch of a round is made of."""
        size = 1 if self._share is None else self._share.size
        number = (round_idx + 1) * size - 1
        digest = self.order.digest(number if self.count is None else min(number, self.count - 1))
        return 0 if digest is None else int(digest[:6], 16)

    def reseed(self, seed: int) -> None:
        """Make the next pass shuffle as a function of ``seed`` alone."""
        several = isinstance(self.source, CombinedLoader)
        for number, (_, loader) in enumerate(each_loader(self.source)):
            generator = flow.Generator("cpu")
            generator.manual_seed(derive_seed(seed, number) if several else seed)
            for holder in _holders(loader):
                holder.generator = generator

    @contextlib.contextmanager
    def as_reseeded(self, is_so: bool) -> Iterator[None]:
        """With the one generator within that :meth:`reseed` gives; then with its own again."""
        if not is_so:
            yield
            return
        holders = [each for _, loader in each_loader(self.source) for each in _holders(loader)]
        kept = [(holder, holder.generator) for holder in holders]
        self.reseed(0)
        try:
            yield
        finally:
            for holder, generator in kept:
                holder.generator = generator


def _each_behind(call: Callable[[int], None], batches: Iterator[Any], first: int) -> Iterator[Any]:
    """``batches``, the next one asked for behind a ``call`` with its number, from ``first`` on."""
    for number in itertools.count(first):
        call(number)
        batch = next(batches, _NONE)
        if batch is _NONE:
            return
        yield batch


def _holders(loader: Any) -> List[Any]:
    """The loader and its samplers that draw from a ``generator`` of theirs; none of others."""
    if not isinstance(loader, DataLoader):
        return []
    batch_sampler, sampler = loader.batch_sampler, loader.sampler
    inner = [getattr(each, "sampler", None) for each in (batch_sampler, sampler)]
    held = (loader, sampler, batch_sampler, *inner)
    return [each for each in held if hasattr(each, "generator")]
