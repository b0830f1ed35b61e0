"""What a loop asks of the object that its batches come from: a DataLoader, a list, a generator."""

from __future__ import annotations

import inspect
import os
import re
import traceback
import types
from collections import abc
from typing import Any, Dict, Iterator, Optional

from oneflow.utils.data import DataLoader, DistributedSampler, IterableDataset

from ofengine._oneflow.loaders import forget_workers
from ofengine.data.combined import each_loader
from ofengine.errors import ConfigurationError, DataError, warn
from ofengine.lines import line_at, user_line
from ofengine.run.arguments import Limit, batches_in_share

_PARTS = ("batch_sampler", "sampler", "dataset", "datasets", "loaders")
"""Under which names a loader, sampler or dataset holds those that it is made of."""
_DEEPEST = 6
_ONEFLOW = f"{os.sep}oneflow{os.sep}"


def is_sequence(source: Any) -> bool:
    """True for a list or tuple that is gone through as such."""
    own = getattr(type(source), "__iter__", None)
    return isinstance(source, (list, tuple)) and own in (list.__iter__, tuple.__iter__)


def is_iterator(source: Any) -> bool:
    """True for what gives its batches by ``next``: as a rule they can be had only once."""
    return any(hasattr(type(each), "__next__") for _, each in each_loader(source))


def is_used_up(source: Any) -> bool:
    """True for a generator, or another iterator of Python's own: it never begins anew.

    Of a class of somebody's own this is not known: its ``__iter__`` may begin anew.
    """
    own = getattr(type(source), "__iter__", None)
    builtin = isinstance(own, types.WrapperDescriptorType)
    return is_iterator(source) and (builtin or own is abc.Iterator.__iter__)


def describe_once(source: Any) -> str:
    """The end of a sentence about an iterator that has no batches left, and what to do."""
    source = next(each for _, each in each_loader(source) if is_iterator(each))
    name = "generator" if inspect.isgenerator(source) else f"iterator ({type(source).__name__})"
    return (
        f"it is a{'n' if name[0] == 'i' else ''} {name}, which can be gone through only once; give "
        "a list, a DataLoader, or an object whose __iter__ starts anew"
    )


def refuse_shared(source: Any, what: str) -> None:
    """Raise where the sampler of ``source`` gives each rank a part already."""
    loaders = [each for _, each in each_loader(source) if isinstance(each, DataLoader)]
    for loader in loaders:
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                raise DataError(
                    f"{what} has a DistributedSampler, which repeats samples, and the Trainer "
                    "shares the batches out among the ranks by itself: leave it out, and write "
                    "shuffle=True where that is meant."
                )


def count_batches(total: Optional[int], limit: Limit, what: str, limit_name: str) -> Optional[int]:
    """How many of ``total`` batches ``limit`` lets through (see :class:`Batches`)."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return total
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if total is None:
        raise ConfigurationError(
            f"{limit_name}={limit!r} is a share of {what}, whose length is not known: give a "
            "number of batches (an int)."
        )
    count = batches_in_share(limit, total)
    if count == 0 and limit > 0:
        raise ConfigurationError(
            f"{limit_name}={limit!r} of the {total} batches of {what} is less than one batch: give "
            "a larger share, or a number of batches (an int)."
        )
    return count


# ---------------------------------------------------------------------- the epoch


def set_epoch(source: Any, epoch: int) -> None:
    """Tell the epoch to whatever in ``source`` has a ``set_epoch``: samplers, datasets, itself."""
    told: Dict[int, Any] = {}
    for part in _parts(source, told, _DEEPEST):
        method = getattr(part, "set_epoch", None)
        if callable(method) and _takes_an_epoch(method, part):
            method(epoch)
    for _, loader in each_loader(source):
        workers_stay = isinstance(loader, DataLoader) and loader.persistent_workers
        if workers_stay and callable(getattr(loader.dataset, "set_epoch", None)):
            forget_workers(loader)  # they have copies of the dataset, which know of no new epoch


def _parts(source: Any, seen: Dict[int, Any], depth: int) -> Iterator[Any]:
    """``source``, its samplers and datasets, and theirs, each once."""
    if id(source) in seen:
        return
    seen[id(source)] = source
    yield source
    for name in _PARTS if depth else ():
        part = getattr(source, name, None)
        for each in part if isinstance(part, (list, tuple)) else [part]:
            if hasattr(each, "__dict__"):  # no number, text or list of indices
                yield from _parts(each, seen, depth - 1)


def _takes_an_epoch(method: Any, owner: Any) -> bool:
    try:
        inspect.signature(method).bind(0)
    except TypeError:
        warn(
            f"{type(owner).__name__}.set_epoch cannot be called with the epoch alone, so it is "
            "not called: write `def set_epoch(self, epoch)`, or give the method another name."
        )
        return False
    except ValueError:  # a function of C, whose arguments are not told
        pass
    return True


# ---------------------------------------------------------------------- the end of the data


def ended_by_its_own(
    batches: Iterator[Any], source: DataLoader, what: str, number: int
) -> Iterator[Any]:
    """The batches of a DataLoader, from that ``number`` on; raises where its end is an accident.

    A StopIteration that escapes from a dataset's ``__getitem__`` or from ``collate_fn``, in a
    worker process too, looks to whoever asks for the next batch like the end of the data.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration as stop:
            where = _accident(stop, isinstance(source.dataset, IterableDataset))
            if where is None:
                return
            raise DataError(
                f"the dataset or collate_fn of {what} raised StopIteration{where}, in batch "
                f"{number}, which would end the epoch there: give next() a default, or catch the "
                "StopIteration."
            ) from stop
        yield batch
        number += 1


def _accident(stop: StopIteration, iterable: bool) -> Any:
    """Where code that loads a batch raised ``stop``, as "" or " at file:line"; None: nowhere."""
    calls = [frame.f_code for frame, _ in traceback.walk_tb(stop.__traceback__)]
    names = [each.co_name if _ONEFLOW in each.co_filename else "" for each in calls]
    if "reraise" in names:  # from a worker, which has told of the end of the data in another way
        lines = re.findall(r'File "(.+)", line (\d+), in ', str(stop))
        return f" at {line_at(lines[-1][0], int(lines[-1][1]))}" if lines else ""
    if "fetch" not in names:
        return None
    after = calls[names.index("fetch") + 1 :]
    # A dataset that is an iterator says so that it has come to its end.
    if iterable and (not after or after[0].co_name == "__next__"):
        return None
    line = user_line(stop.__traceback__)
    return f" at {line}" if line else ""
