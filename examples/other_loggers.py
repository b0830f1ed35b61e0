"""Loggers for Weights & Biases and for MLflow: three methods each, and two for a resumed run.

    python examples/other_loggers.py wandb     # pip install wandb; writes wandb/, offline
    python examples/other_loggers.py mlflow    # pip install mlflow-skinny; writes mlruns/
    python examples/other_loggers.py both

Copy the class that you need. Both were tried beside OneFlow's protobuf 3.20, with wandb 0.25.0 and
mlflow-skinny 3.17.2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import oneflow as flow
from oneflow import nn

from ofengine import TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.loggers import Logger
from ofengine.metrics import Accuracy


class WandbLogger(Logger):
    """Sends metrics to Weights & Biases; ``mode="offline"`` keeps them in ``wandb/``.

    A resumed run goes on in the run of the same id. W&B takes nothing back: what came after the
    checkpoint is there twice, at the same ``step``.
    """

    def __init__(self, project: str, mode: str = "offline", **options: Any) -> None:
        import wandb

        self._wandb = wandb
        self.project = project
        self._options = {"project": project, "mode": mode, **options}
        self._id: Optional[str] = None
        self._run: Any = None

    @property
    def experiment(self) -> Any:
        """W&B's run."""
        if self._run is None:
            resume = {} if self._id is None else {"id": self._id, "resume": "allow"}
            self._run = self._wandb.init(**self._options, **resume)
            self._run.define_metric("*", step_metric="step")
            self._id = self._run.id
        return self._run

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        self.experiment.config.update(dict(hparams), allow_val_change=True)

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        self.experiment.log({**metrics, "step": step, "epoch": epoch})

    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None

    def state_dict(self) -> Dict[str, Any]:
        return {} if self._id is None else {"id": self._id}

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        self._id = state["id"] if continue_files else None


class MLflowLogger(Logger):
    """Sends metrics to MLflow, by default into the folder ``mlruns``.

    A resumed run goes on in the same run. MLflow takes nothing back: what came after the
    checkpoint is there twice, at the same step.
    """

    def __init__(self, experiment: str, tracking_uri: Optional[str] = None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # or give "sqlite:///mlflow.db"
        from mlflow import MlflowClient

        self.experiment = experiment
        self.client = MlflowClient(tracking_uri or Path("mlruns").absolute().as_uri())
        self._id: Optional[str] = None

    @property
    def run_id(self) -> str:
        """MLflow's id of this run."""
        if self._id is None:
            known = self.client.get_experiment_by_name(self.experiment)
            place = known.experiment_id if known else self.client.create_experiment(self.experiment)
            self._id = self.client.create_run(place).info.run_id
        return self._id

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        for name, value in hparams.items():
            self.client.log_param(self.run_id, name, value)

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        now = int(time.time() * 1000)
        for name, value in {**metrics, "epoch": epoch}.items():
            self.client.log_metric(self.run_id, name, value, timestamp=now, step=step)

    def finalize(self, status: str) -> None:
        if self._id is not None:
            self.client.set_terminated(self._id, "FINISHED" if status == "success" else "FAILED")

    def state_dict(self) -> Dict[str, Any]:
        return {} if self._id is None else {"id": self._id}

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        self._id = state["id"] if continue_files else None


class Points(TaskModule):
    """Which of two halves of the plane a point is in."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
        self.accuracy = Accuracy()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        points, labels = batch
        scores = self.model(points)
        self.accuracy.update(scores, labels)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(scores, labels)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.2, momentum=0.9)


def data() -> List[Any]:
    """Eight batches of 32 points."""
    flow.manual_seed(0)
    points = flow.randn(8, 32, 2)
    return [(each, (each[:, 0] > each[:, 1]).long()) for each in points]


def loggers_for(kind: str) -> List[Logger]:
    """The loggers that the command line asks for."""
    made: List[Logger] = []
    if kind in ("wandb", "both"):
        made.append(WandbLogger("ofengine-example"))
    if kind in ("mlflow", "both"):
        made.append(MLflowLogger("ofengine-example"))
    return made


def main(kind: str) -> None:
    """Train for two epochs, then go on with a third, as after a stop."""
    for epochs in (2, 3):
        trainer = Trainer(
            max_epochs=epochs,
            log_every_n_steps=4,
            logger=loggers_for(kind),
            callbacks=ModelCheckpoint("checkpoints"),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Points(), data(), ckpt_path="last")
    print(f"steps: {trainer.global_step}, accuracy: {trainer.callback_metrics['accuracy']:.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "both")
