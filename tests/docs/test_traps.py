"""Every trap that docs/en/traps.md tells of is there: its script says so, over OneFlow alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = sorted((ROOT / "docs" / "traps").glob("*.py"))

# All in one process, each as a program of its own, for most of the time goes into the import.
RUN_ALL = """
import os, runpy, sys, traceback

for path in sys.argv[1:]:
    print("==", os.path.basename(path), flush=True)
    try:
        sys.argv[1:] = []
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    else:
        print("seen", flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def said() -> Dict[str, str]:
    """What each script has printed."""
    command = [sys.executable, "-c", RUN_ALL, *map(str, SCRIPTS)]
    ran = subprocess.run(command, capture_output=True, text=True)
    parts = re.split(r"^== (\S+)$", ran.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.stem))
def test_the_trap_is_there(script: Path, said: Dict[str, str]) -> None:
    assert said.get(script.name, "").endswith("\nseen\n"), said.get(script.name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.stem))
def test_a_script_has_oneflow_alone_and_checks_what_it_shows(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported <= {"ctypes", "numpy", "oneflow", "os", "subprocess", "sys", "tempfile"}
    assert re.search(r"^ *assert ", text, re.MULTILINE)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_has_every_script(language: str) -> None:
    page = (ROOT / "docs" / language / "traps.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(\.\./traps/(\w+)\.py\)", page)) == [each.stem for each in SCRIPTS]
