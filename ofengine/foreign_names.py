"""What to write where a user imports a name that PyTorch Lightning has and ofengine has not.

A value is the end of an error's sentence: a clause that begins in lower case and has no full stop.
"""

from __future__ import annotations

from typing import Mapping

from ofengine.errors import UnknownNameError

_OTHER_LOGGERS = (
    "write a class with log_metrics that inherits ofengine.loggers.Logger: "
    "examples/other_loggers.py has those of W&B and MLflow"
)
_PROGRESS_BAR = "write ProgressBar, from ofengine.callbacks"
_FREEZES = "write GradualUnfreezing or BackboneFinetuning, from ofengine.callbacks"
_OWN_CALLBACK = "write a class of your own that inherits ofengine.Callback"

EXPORTS: Mapping[str, str] = {
    "LightningModule": "write TaskModule, from ofengine",
    "LightningDataModule": "write DataModule, from ofengine",
    "LightningCLI": "write ofengine fit FILE.py:Task in a terminal: no code is needed",
    "Fabric": "write a loop by hand: a Trainer runs whole verbs",
    # Callbacks.
    "TQDMProgressBar": _PROGRESS_BAR,
    "RichProgressBar": _PROGRESS_BAR,
    "RichModelSummary": "write ModelSummary, from ofengine.callbacks",
    "LambdaCallback": _OWN_CALLBACK,
    "LearningRateFinder": "write trainer.lr_find(task, train_dataloader).suggestion() before fit",
    "GradientAccumulationScheduler": "write Trainer(accumulate_grad_batches={0: 1, 5: 4})",
    "BasePredictionWriter": "write PredictionWriter, from ofengine.callbacks, or "
    "on_predict_batch_end of a callback of your own",
    "BaseFinetuning": _FREEZES,
    "ThroughputMonitor": "write Throughput, from ofengine.callbacks",
    "WeightAveraging": "write EMAWeightAveraging or StochasticWeightAveraging, from "
    "ofengine.callbacks",
    "ModelPruning": _OWN_CALLBACK,
    # Loggers.
    "WandbLogger": _OTHER_LOGGERS,
    "MLFlowLogger": _OTHER_LOGGERS,
    "CometLogger": _OTHER_LOGGERS,
    "NeptuneLogger": _OTHER_LOGGERS,
    "LitLogger": _OTHER_LOGGERS,
    # Metrics.
    "MetricCollection": "make each metric an attribute of the task, and log each by its name",
    "MeanMetric": "write Mean, from ofengine.metrics",
    "MeanAbsoluteError": "log the mean of a tensor, or write a class that inherits "
    "ofengine.metrics.Metric",
    "SumMetric": "write a class that inherits ofengine.metrics.Metric",
}
"""Classes of Lightning's and torchmetrics'."""


def no_such_name(module: str, name: str) -> Exception:
    """The error about ``name``, which ``module`` has not: for a module's ``__getattr__``."""
    if name in EXPORTS:
        return UnknownNameError(f"{module} has no {name}, which is Lightning's: {EXPORTS[name]}.")
    return AttributeError(f"module {module!r} has no attribute {name!r}")
