"""The loggers to be copied do what their services ask for; stand-ins keep what they are told."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "other_loggers.py"


class Wandb(types.ModuleType):
    """W&B's ``init``, and the runs that it made."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: List[types.SimpleNamespace] = []

    def init(self, id: str = "first", **options: Any) -> Any:
        config: Dict[str, Any] = {}
        rows: List[Dict[str, Any]] = []
        run = types.SimpleNamespace(
            id=id, options=options, rows=rows, told=config, axes=[], exits=[]
        )
        run.config = types.SimpleNamespace(
            update=lambda values, allow_val_change: config.update(values)
        )
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        run.log = rows.append
        run.finish = lambda exit_code: run.exits.append(exit_code)
        self.runs.append(run)
        return run


class Client:
    """MLflow's client; the runs are those of all clients."""

    runs: Dict[str, List[Tuple[Any, ...]]] = {}  # noqa: RUF012

    def __init__(self, uri: str) -> None:
        assert uri.startswith("file:")

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str) -> Any:
        self.runs["run"] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run"))

    def log_param(self, run: str, name: str, value: Any) -> None:
        self.runs[run].append(("param", name, value))

    def log_metric(self, run: str, name: str, value: float, timestamp: int, step: int) -> None:
        self.runs[run].append((name, step, value))

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run].append(("status", status))


def test_both_are_told_everything_and_go_on_in_the_same_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb, mlflow = Wandb(), types.ModuleType("mlflow")
    monkeypatch.setattr(Client, "runs", {})
    mlflow.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    spec = importlib.util.spec_from_file_location("other_loggers", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main("both")
    assert "steps: 24" in capsys.readouterr().out

    steps = [4, 8, 8, 12, 16, 16, 20, 24, 24]  # an epoch's mean has the step of its last batch
    first, second = wandb.runs
    assert (first.id, second.id, second.options["resume"]) == ("first", "first", "allow")
    assert [row["step"] for row in first.rows + second.rows] == steps
    assert [row["epoch"] for row in first.rows + second.rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert first.told == {"width": 16}
    assert (first.axes, first.exits, second.exits) == ([("*", "step")], [0], [0])

    entries = Client.runs["run"]
    assert entries.count(("param", "width", 16)) == 2
    assert [e[1] for e in entries if e[0] == "loss"] == [4, 8, 12, 16, 20, 24]
    assert [e[1] for e in entries if e[0] == "accuracy"] == [8, 16, 24]
    assert entries.count(("status", "FINISHED")) == 2
    logged = [row["accuracy"] for row in first.rows + second.rows if "accuracy" in row]
    assert [e[2] for e in entries if e[0] == "accuracy"] == logged
