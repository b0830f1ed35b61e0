"""Random configurations are the same in both modes, resumed across them and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_python

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_configurations_are_the_same_to_the_bit(first: int) -> None:
    """In processes of their own: they compile hundreds of graphs, and might crash."""
    done = run_python(FUZZ, "--configurations", 12, "--seed", first)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("12 configurations, 0 failed\n")
