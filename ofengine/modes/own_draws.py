"""Generators and iterators of the user's own: how far they are."""

from __future__ import annotations

import itertools
import operator
import random
import types
from collections.abc import Iterator
from gc import get_referents
from typing import Any, Tuple

import numpy as np

from ofengine.errors import GraphModeError

_DEEPEST = 5
_ADAPTERS: Tuple[Any, ...] = (
    zip, map, filter, enumerate, itertools.count, itertools.cycle, itertools.chain,
    itertools.islice, itertools.starmap, itertools.takewhile, itertools.dropwhile,
    itertools.accumulate, itertools.compress, itertools.zip_longest, itertools.product,
    itertools.permutations, itertools.combinations, itertools.groupby, type(itertools.tee(())[0]),
)  # fmt: skip


def state_of(value: Any) -> Any:
    """How far a generator of random numbers or an iterator is; None of anything else."""
    if isinstance(value, np.random.Generator):
        return _plain(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return _plain(value.get_state(legacy=False))
    if isinstance(value, np.random.BitGenerator):
        return _plain(value.state)
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else value.getstate()
    return _place_in(value, _DEEPEST) if isinstance(value, Iterator) else None


def refuse(what: str, place: str, value: Any) -> GraphModeError:
    """The error about ``value``, called ``place``, which the step ``what`` has moved on."""
    if isinstance(value, Iterator):
        return GraphModeError(
            f"{what} takes the next of {place} inside a compiled step: the step is traced once and "
            "would keep that of its first batch for ever. Take it in the dataset or in "
            'collate_fn, put it into the batch as a tensor, or use Trainer(mode="eager")'
        )
    return GraphModeError(would_keep(what, place))


def would_keep(what: str, source: str) -> str:
    """What is wrong where the step ``what`` draws from ``source``."""
    return (
        f"{what} draws from {source} inside a compiled step: the step is traced once and would "
        "keep the numbers of its first batch for ever. Draw them in the dataset or in "
        'collate_fn, with oneflow.rand, or use Trainer(mode="eager").'
    )


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return [(key, _plain(each)) for key, each in state.items()]
    if isinstance(state, np.ndarray):
        return state.tobytes()
    return state


def _place_in(value: Any, depth: int) -> Any:
    """Where an iterator is; None where it does not tell."""
    if not depth:
        return None
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "ended"
        return frame.f_lasti, [_part(each, depth) for each in get_referents(frame)]
    if isinstance(value, _ADAPTERS):
        return [_part(each, depth) for each in value.__reduce__()]
    if hasattr(type(value), "__length_hint__"):
        try:
            return operator.length_hint(value)
        except TypeError:  # of what repeats for ever
            return None
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        return [(key, each) for key, each in own.items() if isinstance(each, int)]
    return None


def _part(value: Any, depth: int) -> Any:
    if isinstance(value, tuple):
        return [_part(each, depth - 1) for each in value] if depth else None
    if isinstance(value, Iterator):
        return _place_in(value, depth - 1)
    return value if isinstance(value, (int, float, str)) else id(value)
