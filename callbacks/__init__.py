"""The callbacks that ship with ofengine, one a file; they use what any user's callback could."""

from typing import Any

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.callbacks.backbone_finetuning import BackboneFinetuning
from ofengine.callbacks.batch_size_finder import BatchSizeFinder
from ofengine.callbacks.device_stats_monitor import DeviceStatsMonitor
from ofengine.callbacks.early_stopping import EarlyStopping
from ofengine.callbacks.ema_weight_averaging import EMAWeightAveraging
from ofengine.callbacks.gradual_unfreezing import GradualUnfreezing
from ofengine.callbacks.graph_lr_scale import GraphLRScaleCallback
from ofengine.callbacks.lr_decay import LRDecayCallback
from ofengine.callbacks.lr_monitor import LearningRateMonitor
from ofengine.callbacks.model_checkpoint import ModelCheckpoint
from ofengine.callbacks.model_statistics import ModelStatistics
from ofengine.callbacks.model_summary import ModelSummary
from ofengine.callbacks.prediction_writer import PredictionWriter
from ofengine.callbacks.progress_bar import ProgressBar
from ofengine.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from ofengine.callbacks.terminate_on_nan import TerminateOnNaN
from ofengine.callbacks.throughput import Throughput
from ofengine.callbacks.timer import Timer
from ofengine.foreign_names import no_such_name

__all__ = [
    "BackboneFinetuning",
    "BatchSizeFinder",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradualUnfreezing",
    "GraphLRScaleCallback",
    "LRDecayCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelStatistics",
    "ModelSummary",
    "PredictionWriter",
    "ProgressBar",
    "StochasticWeightAveraging",
    "TerminateOnNaN",
    "Throughput",
    "Timer",
]


def __getattr__(name: str) -> Any:
    raise no_such_name(__name__, name)
