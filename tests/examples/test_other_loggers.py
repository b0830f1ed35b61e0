"""The loggers to be copied: told to stand-ins, and to W&B and MLflow themselves."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from helpers.environments import make_environment, without_paths

STEPS = [4, 8, 8, 12, 16, 16, 20, 24, 24]
"""Those that are logged: an epoch's mean has the step of its last batch."""
PACKAGES = ("wandb==0.25.0", "mlflow-skinny==3.17.2", "protobuf<4")
"""As the example says that they were tried."""
READER = """
import glob, json
from mlflow import MlflowClient
from pathlib import Path
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

runs = []
for path in sorted(glob.glob("wandb/offline-run-*/*.wandb")):
    store = DataStore()
    store.open_for_scan(path)
    run = {"file": Path(path).name, "rows": [], "config": {}, "exits": []}
    runs.append(run)
    for content in iter(store.scan_data, None):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        items = lambda each: {i.key or ".".join(i.nested_key): json.loads(i.value_json)
                              for i in each}
        if kind == "history":
            run["rows"].append(items(record.history.item))
        elif kind in ("config", "run"):
            told = record.config if kind == "config" else record.run.config
            run["config"].update(items(told.update))
        elif kind == "exit":
            run["exits"].append(record.exit.exit_code)

runs.sort(key=lambda run: run["rows"][0]["step"])  # the files' names are no order within a second
client = MlflowClient(Path("mlruns").absolute().as_uri())
place = client.get_experiment_by_name("ofengine-example").experiment_id
(run,) = client.search_runs([place])
points = {name: sorted([each.step, each.value] for each in
                       client.get_metric_history(run.info.run_id, name))
          for name in run.data.metrics}
print(json.dumps({"wandb": runs, "status": run.info.status, "params": run.data.params,
                  "points": points}))
"""

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

    first, second = wandb.runs
    assert (first.id, second.id, second.options["resume"]) == ("first", "first", "allow")
    assert [row["step"] for row in first.rows + second.rows] == STEPS
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


# ---------------------------------------------------------------------- the services' own packages


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 10), reason="this mlflow-skinny is for newer Pythons")
def test_the_real_packages_keep_what_they_are_told(tmp_path: Path) -> None:
    """W&B in its files for a later upload, MLflow in a folder; read by their own readers."""
    python = make_environment(tmp_path / "environment", *PACKAGES, beside=True)
    work = tmp_path / "work"
    work.mkdir()

    def ran(*words: str) -> str:
        ended = subprocess.run([str(python), *words], cwd=work, capture_output=True, text=True,
                               env={**without_paths(), "WANDB_SILENT": "true",
                                    "MLFLOW_ALLOW_FILE_STORE": "true"})  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "steps: 24" in ran(str(EXAMPLE), "both")
    found = json.loads(ran("-c", READER).splitlines()[-1])

    first, second = found["wandb"]
    assert first["file"] == second["file"]  # named after the id, which is the same
    rows = first["rows"] + second["rows"]
    assert [row["step"] for row in rows] == STEPS
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (first["config"]["width"], first["exits"], second["exits"]) == (16, [0], [0])

    assert (found["status"], found["params"]) == ("FINISHED", {"width": "16"})
    points = found["points"]
    for name in ("loss", "accuracy"):
        assert points[name] == [[row["step"], row[name]] for row in rows if name in row]
        assert all(math.isfinite(value) for _, value in points[name])
    assert [step for step, _ in points["loss"]] == [4, 8, 12, 16, 20, 24]
    assert [step for step, _ in points["accuracy"]] == [8, 16, 24]
