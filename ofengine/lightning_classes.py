"""What to write where a class is Lightning's, or is given an argument that only Lightning's takes.

A value is the end of an error's sentence, as in ``run/lightning.py``.
"""

from __future__ import annotations

from typing import Mapping

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

_ITS_NAMES = "write it into the names that you log"

CLASS_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    # Callbacks.
    "ModelCheckpoint": {
        "verbose": "best_model_path and last_model_path tell what was saved: leave it out",
        "save_weights_only": "a run goes on from every file: leave it out, and write "
        "ofengine.checkpoint.save_weights(task, path) for the weights alone",
        "save_on_train_epoch_end": "it looks at the end of an epoch where monitor is left out or "
        "comes from training, else after validation: leave it out",
        "enable_version_counter": "a file that this run did not write is never replaced, and the "
        "new one's name then ends in -v1: leave it out",
        "save_on_train_end": "write save_last=True",
        "period": "write every_n_epochs",
        "every_n_val_epochs": "write every_n_epochs",
        "filepath": "write dirpath and filename",
        "prefix": "write it into filename",
    },
    "EarlyStopping": {"log_rank_zero_only": "rank 0 alone tells of it: leave it out"},
    "StochasticWeightAveraging": {
        **dict.fromkeys(
            ("swa_lrs", "annealing_epochs", "annealing_strategy"),
            "the rates stay those of the task: return the ones that you want as the lr_scheduler "
            "of configure_optimizers",
        ),
        "avg_fn": "each epoch counts alike: write EMAWeightAveraging for a mean that forgets",
        "device": "the mean is where the weights are: leave it out",
    },
    "EMAWeightAveraging": {
        "use_buffers": "write include_buffers",
        "update_every_n_steps": "write every_n_steps",
        "update_starting_at_step": "write start_step=..., in optimizer steps",
        "update_starting_at_epoch": "write start_step=..., in optimizer steps",
        "device": "the mean is where the weights are: leave it out",
    },
    "BackboneFinetuning": {
        "initial_denom_lr": "backbone_initial_ratio_lr says it: leave it out",
        "verbose": "each change is logged: leave it out",
        "rounding": "each change is logged: leave it out",
    },
    "BatchSizeFinder": {"margin": "write memory_limit, the share of the free memory to be used"},
    "Throughput": {
        "batch_size_fn": "write samples",
        "length_fn": "write tokens",
        "window_size": "it counts what came since the last time: write "
        "Trainer(log_every_n_steps=...)",
    },
    "ProgressBar": {"process_position": "the progress bar keeps its place: leave it out"},
    # Loggers.
    "CSVLogger": {"prefix": _ITS_NAMES},
    "TensorBoardLogger": {
        "prefix": _ITS_NAMES,
        "log_graph": "no graph is drawn: leave it out, and list a ModelSummary in callbacks",
        "default_hp_metric": "no metric is made up for the hyper-parameters: leave it out",
        "sub_dir": "write it into name, as in name='digits/first'",
    },
    # Those of torchmetrics.
    "Metric": {
        "task": "num_classes tells it, 2 for binary: leave it out",
        "dist_sync_on_step": "the engine puts ranks together: leave it out",
        "multidim_average": "all positions of a sample count alike: leave it out",
        "validate_args": "arguments are always checked: leave it out",
        "compute_on_step": "log(..., on_step=True) shows single batches: leave it out",
    },
}
"""Arguments of Lightning's classes, by the class of ofengine's that has them not, or its base."""
