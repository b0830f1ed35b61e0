"""The fixture ``run``: scripts in processes of their own, which end with the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, List

import pytest
from children import Child


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    children: List[Child] = []

    def start(script: str, mode: str = "graph") -> Child:
        children.append(Child(tmp_path, script, mode))
        return children[-1]

    yield start
    for child in children:
        child.alarm.cancel()
        child.process.kill()
        child.process.communicate()
