"""Which of the files kept for a metric is best, and which makes room for another."""

from __future__ import annotations

import math
from typing import Dict, Optional, Tuple


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


def _badness(score: float, mode: str) -> Tuple[bool, float]:
    if math.isnan(score):
        return True, 0.0
    return False, score if mode == "min" else -score
