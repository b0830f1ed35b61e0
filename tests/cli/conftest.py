"""What the tests of the command line share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Iterator

import pytest
from verb_cases import FILE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file with a task, its data and a callback, in the current folder."""
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    kept, modules = list(sys.path), set(sys.modules)
    yield path
    sys.path[:] = kept
    for name in set(sys.modules) - modules:
        if name.startswith(("ofengine_file_", "a_package")):
            del sys.modules[name]
