"""Which of the files kept is best, or newest, and which makes room for another."""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Tuple


def best_of(kept: Dict[str, float], mode: str) -> str:
    """The file with the best score; "" where none has one but NaN."""
    numbers = [path for path in kept if not math.isnan(kept[path])]
    return min(numbers, key=lambda each: _badness(kept[each], mode), default="")


def makes_room(kept: Dict[str, float], score: float, mode: str, most: int) -> Optional[str]:
    """Which file goes for one of this score; "" where there is room, None where it is no better.

    ``most`` files are kept, or all where it is -1. NaN is worse than any number.
    """
    if most == 0 or (math.isnan(score) and most != -1):
        return None
    if len(kept) != most:
        return ""
    worst = max(kept, key=lambda each: _badness(kept[each], mode))
    return None if _badness(score, mode) >= _badness(kept[worst], mode) else worst


def put_in(kept: Dict[str, float], path: str, out: str, score: float) -> Dict[str, float]:
    """``kept`` with ``path``, and without ``out``."""
    return {**{each: kept[each] for each in kept if each not in (out, path)}, path: score}


def oldest_first(kept: Dict[str, float]) -> List[str]:
    """Files by the optimizer step that they are kept with; of one step, as they were written."""
    return sorted(kept, key=lambda each: _badness(kept[each], "max"), reverse=True)


def makes_room_as_oldest(kept: Dict[str, float], newest: str, most: int) -> Optional[str]:
    """As :func:`makes_room`, for a newer file: the oldest goes; of one alone, ``newest``."""
    if most == 0:
        return None
    if most == 1:
        return newest
    return "" if most == -1 or len(kept) < most else oldest_first(kept)[0]


def _badness(score: float, mode: str) -> Tuple[bool, float]:
    if math.isnan(score):
        return True, 0.0
    return False, score if mode == "min" else -score
