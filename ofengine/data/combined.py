"""CombinedLoader: several loaders that are gone through together, and how their batches meet."""

from __future__ import annotations

from typing import Any, Iterator, List, Optional, Protocol, Sequence, Tuple

from oneflow.utils.data import DataLoader

from ofengine.constructors import tells_unknown_arguments
from ofengine.data.structure import describe
from ofengine.errors import DataError
from ofengine.run.arguments import check_choice

MODES = ("max_size_cycle", "max_size", "min_size", "sequential")

END: Any = object()
"""In the place of a batch: the pass has none any more."""


@tells_unknown_arguments
class CombinedLoader:
    """Several loaders as one, whose batches have a batch of each.

    A batch is a dict, list or tuple, as ``iterables`` is, with a batch of each loader in it. Of
    "sequential" it is a single batch, of one loader after the other.

    Args:
        iterables: a dict, list or tuple of DataLoaders, or of other iterables of batches.
        mode: "min_size" ends with the loader that ends first; "max_size_cycle" with the one that
            ends last, the others begin anew until then; "max_size" too, with None in the place of
            those that have ended; "sequential" goes through one after the other.

    Raises:
        DataError: ``iterables`` holds something else.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        self.mode = check_choice("CombinedLoader(mode)", mode, MODES)
        if not isinstance(iterables, (dict, list, tuple)) or not iterables:
            raise DataError(
                f"CombinedLoader got {describe(iterables)}: give a dict, list or tuple of loaders."
            )
        self.iterables = iterables
        keys = iterables if isinstance(iterables, dict) else range(len(iterables))
        self.names: List[str] = [str(key) for key in keys]
        """What the loaders are called, or their numbers."""
        self.loaders: List[Any] = list(
            iterables.values() if isinstance(iterables, dict) else iterables
        )
        for number, (name, each) in enumerate(zip(self.names, self.loaders)):
            batches = hasattr(each, "__iter__") and not isinstance(each, (str, bytes, type, dict))
            if not batches or isinstance(each, CombinedLoader):
                raise DataError(
                    f"loader {name!r} of several is {describe(each)}: give a "
                    "oneflow.utils.data.DataLoader or a list of batches for each."
                )
            if any(each is other for other in self.loaders[:number]):
                raise DataError(
                    f"loader {name!r} of several is one of the others, too, and each would take "
                    "batches from the other: make a loader for each."
                )

    @property
    def lengths(self) -> List[Optional[int]]:
        """Of each loader its number of batches, or None where that is not known ahead."""
        return [length_of(each) for each in self.loaders]

    def __len__(self) -> int:
        known = [each for each in self.lengths if each is not None]
        if len(known) < len(self.loaders):
            raise TypeError("the length of a loader is not known")
        if self.mode == "sequential":
            return sum(known)
        return min(known) if self.mode == "min_size" else max(known)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one pass, as plain Python has them."""
        return rows(self, [_PlainFeed(each) for each in self.loaders])

    @property
    def num_workers(self) -> int:
        """The fewest that one of the loaders has."""
        return min(getattr(each, "num_workers", 0) for each in self.loaders)

    def pack(self, batches: Sequence[Any]) -> Any:
        """``batches``, one of each loader in order, as one batch."""
        if isinstance(self.iterables, dict):
            return dict(zip(self.iterables, batches))
        return tuple(batches) if isinstance(self.iterables, tuple) else list(batches)


def length_of(source: Any) -> Optional[int]:
    """How many batches ``source`` says that it has; None where it does not say."""
    try:
        return len(source)
    except TypeError:
        return None


def together(source: Any, what: str = "train_dataloader") -> Any:
    """``source``, or one loader of all that it holds where it is several.

    Several are a dict, or a list or tuple that holds a DataLoader: shorter ones begin anew.
    ``what`` is how errors call it.
    """
    several = isinstance(source, dict) or (
        isinstance(source, (list, tuple)) and any(isinstance(each, DataLoader) for each in source)
    )
    if not several or not source:
        return source
    try:
        return CombinedLoader(source, "max_size_cycle")
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def each_loader(source: Any) -> List[Tuple[str, Any]]:
    """(how its place goes on, loader) of each loader in ``source``; itself where it is one."""
    if isinstance(source, CombinedLoader):
        return [(f".{name}", each) for name, each in zip(source.names, source.loaders)]
    return [("", source)]


# ---------------------------------------------------------------------- one pass over all


class Feed(Protocol):
    """The batches of one of the loaders, pass after pass."""

    def begin(self, number: int, skips: bool) -> None:
        """Begin a pass, which the batch of all with this number is the first of.

        ``skips``: batches are passed by at first.
        """

    def take(self, skips: bool) -> Any:
        """The next batch, or anything where it is passed by; :data:`END` where there is none."""

    def finish(self) -> None:
        """All batches that the lengths tell of were taken."""

    def gave_nothing(self) -> DataError:
        """What is to be raised where a pass that begins anew has no batch."""


def rows(combined: CombinedLoader, feeds: Sequence[Feed], skipped: int = 0) -> Iterator[Any]:
    """The batches of one pass over all ``feeds``, of which the first ``skipped`` are passed by."""
    if combined.mode == "sequential":
        return _one_by_one(feeds, skipped)
    return _side_by_side(combined, feeds, skipped)


def _one_by_one(feeds: Sequence[Feed], skipped: int) -> Iterator[Any]:
    number = 0
    for feed in feeds:
        feed.begin(number, number < skipped)
        while True:
            batch = feed.take(number < skipped)
            if batch is END:
                break
            number += 1
            yield batch


def _side_by_side(combined: CombinedLoader, feeds: Sequence[Feed], skipped: int) -> Iterator[Any]:
    mode, total = combined.mode, length_of(combined)
    over = [False] * len(feeds)
    number = 0
    for feed in feeds:
        feed.begin(0, skipped > 0)
    while total is None or number < total:  # or the others would take batches for nothing
        skips = number < skipped
        row: List[Any] = []
        for index, feed in enumerate(feeds):
            batch = None if over[index] and mode == "max_size" else feed.take(skips)
            if batch is END:
                over[index] = True
                if mode == "min_size" or all(over):
                    return
                batch = None
                if mode == "max_size_cycle":
                    feed.begin(number, skips)
                    batch = feed.take(skips)
                    if batch is END:
                        raise feed.gave_nothing()
            row.append(batch)
        yield combined.pack(row)
        number += 1
    for feed in feeds:
        feed.finish()


class _PlainFeed:
    """A loader as anybody goes through it."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def begin(self, number: int, skips: bool) -> None:
        self._batches = iter(self._source)

    def take(self, skips: bool) -> Any:
        return next(self._batches, END)

    def finish(self) -> None:
        pass

    def gave_nothing(self) -> DataError:
        return DataError(f"a {type(self._source).__name__} gave no batch when it began anew.")
