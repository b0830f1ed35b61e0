"""The error where a user imports a name that PyTorch Lightning has and ofengine has not."""

from __future__ import annotations

from ofengine.errors import UnknownNameError
from ofengine.lightning_classes import EXPORTS


def no_such_name(module: str, name: str) -> Exception:
    """The error about ``name``, which ``module`` has not: for a module's ``__getattr__``."""
    if name in EXPORTS:
        return UnknownNameError(f"{module} has no {name}, which is Lightning's: {EXPORTS[name]}.")
    return AttributeError(f"module {module!r} has no attribute {name!r}")
