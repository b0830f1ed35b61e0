"""The examples on rates run from end to end, and end with their picture."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from helpers import run_python

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run_example(name: str, *arguments: str) -> str:
    """What an example prints, started as its users start it."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    result = run_python(EXAMPLES / name, "--device", "cpu", *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_is_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.slow
def test_layer_decay_of_a_vit_shows_its_rates(mode: str, tmp_path: Path) -> None:
    picture = tmp_path / "rates.png"
    printed = run_example(
        *("layer_decay_vit.py", "--mode", mode, "--epochs", "2", "--plot", str(picture))
    )
    rows = dict(re.findall(r"^(\w+_decay) +\S+ +\S+ +0\.01 +(\S+) ", printed, re.MULTILINE))
    scales = {"stem": 0.75**4, "layer_1": 0.75**3, "layer_2": 0.75**2, "layer_3": 0.75, "head": 1}
    assert {name: float(scale) for name, scale in rows.items()} == pytest.approx(
        {f"{name}_{half}": x for name, x in scales.items() for half in ("decay", "no_decay")},
        rel=3e-3,
    )
    assert re.search(r"held-out accuracy: \d+\.\d%", printed)
    assert "learning rate (log scale) by optimizer step" in printed
    assert_is_picture(picture)


@pytest.mark.slow
def test_gradual_unfreezing_trains_layer_after_layer(mode: str, tmp_path: Path) -> None:
    picture = tmp_path / "unfreezing.png"
    printed = run_example(
        *("gradual_unfreezing.py", "--mode", mode, "--every-n-epochs", "1", "--plot", str(picture))
    )
    scales = re.findall(r"^(\w+) +\d+ +\S+ +0\.05 +(\S+) ", printed, re.MULTILINE)  # the preview
    assert scales == [("stem", "0.125"), ("layer_1", "0.25"), ("layer_2", "0.5"), ("head", "1")]
    rows = re.findall(r"^ +(\d+) +([\d.]+)%  (.*)$", printed, re.MULTILINE)
    assert [training for _, _, training in rows] == [
        "head",
        "layer_2, head",
        "layer_1, layer_2, head",
        "stem, layer_1, layer_2, head",
    ]
    assert float(rows[-1][1]) > float(rows[0][1])
    assert_is_picture(picture)
