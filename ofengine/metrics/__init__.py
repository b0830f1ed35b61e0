"""Metrics that are counted over an epoch, on the device: ``self.log("acc", self.acc)``."""

from typing import Any

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.foreign_names import no_such_name
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


def __getattr__(name: str) -> Any:
    raise no_such_name(__name__, name)
