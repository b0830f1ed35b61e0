"""What one rank does for all: rank 0 writes and prints."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional, TypeVar

from ofengine.launch.environment import read

T = TypeVar("T")


def is_rank_zero() -> bool:
    """True on rank 0, and where one process is alone."""
    world = read()
    return world is None or world.rank == 0


def rank_zero_only(function: Callable[..., T]) -> Callable[..., Optional[T]]:
    """``function``, which does nothing and returns None on all ranks but rank 0."""

    @functools.wraps(function)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Optional[T]:
        return function(*args, **kwargs) if is_rank_zero() else None

    return on_rank_zero
