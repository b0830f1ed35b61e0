"""Starts a program of cases on several ranks, and reads what each of them wrote down."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[2]


def results_of(
    size: int, script: Path, names: Sequence[str], folder: Path, *options: str
) -> List[Dict[str, Any]]:
    """What each of ``size`` ranks got for each of the cases, in one start of all.

    ``options`` are those of ``ofengine launch``.
    """
    command = [sys.executable, "-m", "ofengine", "launch", "--nproc", str(size), *options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launched = subprocess.run(
        [*command, str(script), str(folder), "--rank", *names],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stdout
    files = [folder / f"results_{rank}.pickle" for rank in range(size)]
    return [pickle.loads(each.read_bytes()) for each in files]
