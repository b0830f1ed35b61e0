"""ofengine: one task, two modes, the same weights. A trainer engine for OneFlow.

The names below are the public ones. They are looked up when first used, so that
``python -m ofengine doctor`` can say what is missing even where OneFlow cannot be
imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from ofengine._startup import quiet_oneflow_import

if TYPE_CHECKING:
    from ofengine.checkpoint import load_weights
    from ofengine.errors import (
        CheckpointError,
        ConfigurationError,
        DataError,
        DeviceError,
        GraphModeError,
        NonFiniteError,
        OFEngineError,
        OFEngineWarning,
        RateError,
    )
    from ofengine.hooks import Callback
    from ofengine.in_memory import ImageArrays, in_memory_loader
    from ofengine.rates.plan import RatePlan
    from ofengine.seeding import seed_everything
    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "ofengine.hooks",
    "CheckpointError": "ofengine.errors",
    "ConfigurationError": "ofengine.errors",
    "DataError": "ofengine.errors",
    "DeviceError": "ofengine.errors",
    "GraphModeError": "ofengine.errors",
    "ImageArrays": "ofengine.in_memory",
    "NonFiniteError": "ofengine.errors",
    "OFEngineError": "ofengine.errors",
    "OFEngineWarning": "ofengine.errors",
    "RateError": "ofengine.errors",
    "RatePlan": "ofengine.rates.plan",
    "TaskModule": "ofengine.task",
    "Trainer": "ofengine.trainer",
    "in_memory_loader": "ofengine.in_memory",
    "load_weights": "ofengine.checkpoint",
    "seed_everything": "ofengine.seeding",
}

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DeviceError",
    "GraphModeError",
    "ImageArrays",
    "NonFiniteError",
    "OFEngineError",
    "OFEngineWarning",
    "RateError",
    "RatePlan",
    "TaskModule",
    "Trainer",
    "__version__",
    "in_memory_loader",
    "load_weights",
    "seed_everything",
]

quiet_oneflow_import()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ofengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *_HOMES])
