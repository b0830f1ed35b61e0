"""Metrics that are counted over an epoch, on the device: ``self.log("acc", self.acc)``."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.metrics.auroc import AUROC
from ofengine.metrics.base import Metric
from ofengine.metrics.classification import (
    Accuracy,
    ConfusionMatrix,
    F1Score,
    Precision,
    Recall,
)
from ofengine.metrics.means import Mean, MeanSquaredError

__all__ = [
    "AUROC",
    "Accuracy",
    "ConfusionMatrix",
    "F1Score",
    "Mean",
    "MeanSquaredError",
    "Metric",
    "Precision",
    "Recall",
]
