"""The runs on the command line alone: from a config file, and from options."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator

import numpy as np
import pytest

from ofengine.checkpoint import read
from ofengine.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _beside_the_examples(tmp_path: Path) -> Iterator[None]:
    """The examples are in the current folder, as where a user runs them."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    kept = list(sys.path)
    yield
    sys.path[:] = kept


def weights_of(number: int) -> Dict[str, Any]:
    (path,) = Path(f"ofengine_logs/version_{number}/checkpoints").glob("*.safetensors")
    weights: Dict[str, Any] = read(path).weights
    return weights


def assert_is_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.slow
def test_a_regression_from_a_config_file_is_the_same_in_both_modes(capsys: Any) -> None:
    run = ["--config", "examples/tabular_regression.yaml", "--trainer.enable_progress_bar=false"]
    short = [*run, "--max_epochs", "4", "--data.rows", "400"]
    assert main(["fit", *short]) == 0
    assert main(["fit", *short, "--mode", "eager"]) == 0
    one, other = weights_of(0), weights_of(1)
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    assert_is_picture(Path("ofengine_logs/version_0/regression.png"))
    capsys.readouterr()
    assert main(["test", *short, "--ckpt_path", "last"]) == 0
    (error,) = re.findall(r"^test_mse +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert float(error) < 24  # the variance of the targets


@pytest.mark.slow
def test_the_regression_comes_near_to_the_noise(mode: str, capsys: Any) -> None:
    run = ["--config", "examples/tabular_regression.yaml", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *run, "--mode", mode]) == 0
    capsys.readouterr()
    assert main(["test", *run, "--ckpt_path", "last"]) == 0
    (error,) = re.findall(r"^test_mse +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert 0.9 < float(error) ** 0.5 < 1.2


def test_a_run_by_options_alone(mode: str, capsys: Any) -> None:
    digits = ["examples/command_line.py:Digits", "--task.channels=4"]
    assert main(["fit", *digits, "--mode", mode, "--max_epochs=4"]) == 0
    capsys.readouterr()
    assert main(["test", *digits, "--mode", mode, "--ckpt_path=last"]) == 0
    (accuracy,) = re.findall(r"^accuracy +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert main(["predict", *digits, "--mode", mode, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().out
    folder = Path(said.rpartition("The predictions are in ")[2].strip())
    predicted = np.load(str(folder / "loader_0.npz"))["predictions"]
    from sklearn.datasets import load_digits

    right = (predicted == load_digits().target[1536:1792]).mean()
    assert float(accuracy) == pytest.approx(right, abs=1e-6)
    assert right > 0.7
    first = [digits[0], "--max-epochs", "4", "--plot", "rates.png"]
    assert main(["rates", *first]) == 0
    assert_is_picture(Path("rates.png"))
