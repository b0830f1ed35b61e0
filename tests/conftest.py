"""Fixtures for all tests. Helpers that are no fixtures are in ``helpers.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, and no limit on the seconds an example takes.
settings.register_profile("ofengine", deadline=None, derandomize=True, database=None)
settings.load_profile("ofengine")


@pytest.fixture(params=["eager", "graph"])
def mode(request: pytest.FixtureRequest) -> str:
    """Each mode in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes without saying where, does not land in the checkout."""
    monkeypatch.chdir(tmp_path)
