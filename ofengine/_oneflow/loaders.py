"""What a DataLoader keeps to itself: its sampler, its workers, how it collates."""

from __future__ import annotations

import inspect
from typing import Any, Callable, Iterator, List

import numpy as np
import oneflow as flow
from oneflow.utils.data import DataLoader

SHARED_GENERATOR = inspect.signature(DataLoader.__init__).parameters["generator"].default
"""The one that all DataLoaders shuffle with that are given none."""


def open_with_indices(loader: Any, wrap: Callable[[Any], Any]) -> Iterator[Any]:
    """``iter(loader)`` of a DataLoader whose (batch) sampler is ``wrap`` of its own, this once."""
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    own = vars(loader)[name]
    wrapped = wrap(own)
    vars(loader)[name] = wrapped  # the class forbids it by setattr
    kept = loader._iterator  # persistent workers' iterator has noted its sampler
    if kept is not None:
        kept._index_sampler = wrapped
        kept._status_reset = False  # or its first pass gives what it loaded when it was made
        # What an iterator draws when it is made, perhaps from the generator of the order.
        flow.randint(0, np.iinfo(np.int64).max, (), generator=loader.generator)
    try:
        return iter(loader)
    finally:
        vars(loader)[name] = own
        if loader._iterator is not None:
            loader._iterator._index_sampler = own


def forget_workers(loader: Any) -> None:
    """Let go of the worker processes that ``loader`` keeps alive."""
    loader._iterator = None


def collate(samples: List[Any]) -> Any:
    """What a DataLoader makes of a list of samples by default."""
    from oneflow.utils.data._utils.collate import default_collate

    return default_collate(samples)
