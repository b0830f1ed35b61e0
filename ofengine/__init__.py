"""ofengine: one task, two modes, the same weights. A trainer engine for OneFlow.

The names below are the public ones. They are looked up when first used, so that
``python -m ofengine doctor`` can say what is missing even where OneFlow cannot be
imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from ofengine.callback import Callback
    from ofengine.checkpoint.weights import load_weights
    from ofengine.data.combined import CombinedLoader
    from ofengine.data.image_folder import CachedImageFolder
    from ofengine.data.in_memory import ImageArrays, in_memory_loader
    from ofengine.data.seeding import seed_everything
    from ofengine.data_module import DataModule
    from ofengine.errors import (
        CheckpointError,
        ConfigurationError,
        DataError,
        DeviceError,
        GraphModeError,
        NonFiniteError,
        OFEngineError,
        OFEngineWarning,
        RankError,
        RateError,
    )
    from ofengine.ranks.zero import rank_zero_only
    from ofengine.rates.plan import RatePlan
    from ofengine.speedups import cpu_speedups
    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "CachedImageFolder": "ofengine.data.image_folder",
    "Callback": "ofengine.callback",
    "CheckpointError": "ofengine.errors",
    "CombinedLoader": "ofengine.data.combined",
    "ConfigurationError": "ofengine.errors",
    "DataError": "ofengine.errors",
    "DataModule": "ofengine.data_module",
    "DeviceError": "ofengine.errors",
    "GraphModeError": "ofengine.errors",
    "ImageArrays": "ofengine.data.in_memory",
    "NonFiniteError": "ofengine.errors",
    "OFEngineError": "ofengine.errors",
    "OFEngineWarning": "ofengine.errors",
    "RankError": "ofengine.errors",
    "RateError": "ofengine.errors",
    "RatePlan": "ofengine.rates.plan",
    "TaskModule": "ofengine.task",
    "Trainer": "ofengine.trainer",
    "cpu_speedups": "ofengine.speedups",
    "in_memory_loader": "ofengine.data.in_memory",
    "load_weights": "ofengine.checkpoint.weights",
    "rank_zero_only": "ofengine.ranks.zero",
    "seed_everything": "ofengine.data.seeding",
}

__all__ = [
    "CachedImageFolder",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigurationError",
    "DataError",
    "DataModule",
    "DeviceError",
    "GraphModeError",
    "ImageArrays",
    "NonFiniteError",
    "OFEngineError",
    "OFEngineWarning",
    "RankError",
    "RateError",
    "RatePlan",
    "TaskModule",
    "Trainer",
    "__version__",
    "cpu_speedups",
    "in_memory_loader",
    "load_weights",
    "rank_zero_only",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        foreign = importlib.import_module("ofengine.foreign_names")
        raise foreign.no_such_name("ofengine", name)
    importlib.import_module("ofengine._oneflow")  # first: it imports OneFlow quietly
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *_HOMES])
