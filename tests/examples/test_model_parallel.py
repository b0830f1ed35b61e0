"""Tensor and pipeline parallel training reaches the weights of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import run_python

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "model_parallel.py"


@pytest.mark.slow
def test_both_kinds_compute_what_one_process_does(tmp_path: Path) -> None:
    found = {}
    for name in ("tensor", "pipeline", "alone"):
        options = ["--devices", "1"] if name == "alone" else ["--kind", name]
        path = tmp_path / f"{name}.npz"
        run = run_python(EXAMPLE, *options, "--save", path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip().splitlines()[-1].startswith("loss ")
        found[name] = np.load(path)
    for kind in ("tensor", "pipeline"):
        assert found[kind].files == found["alone"].files
        for name in found["alone"].files:
            np.testing.assert_allclose(
                found[kind][name], found["alone"][name], rtol=0, atol=2e-6, err_msg=f"{kind} {name}"
            )
