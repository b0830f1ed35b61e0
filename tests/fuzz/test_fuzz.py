"""Random configurations are the same in both modes, resumed across them and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_python

FUZZ = Path(__file__).with_name("fuzz.py")


SLOW = [
    pytest.param(first, count, marks=pytest.mark.slow)
    for first, count in ((10, 20), (30, 30), (60, 30), (90, 30))
]


@pytest.mark.parametrize(("first", "count"), [(0, 10), *SLOW])
def test_random_configurations_are_the_same_to_the_bit(first: int, count: int) -> None:
    """In processes of their own: they compile hundreds of graphs, and might crash."""
    done = run_python(FUZZ, "--configurations", count, "--seed", first)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(f"{count} configurations, 0 failed\n")
