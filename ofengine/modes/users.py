"""Whose code it is: the user's own, or that of OneFlow, numpy, this package or Python itself."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from typing import Any

_FOREIGN = ("ofengine", "oneflow", "flowvision", "numpy", "builtins")
_OF_PYTHON = tuple(
    os.path.realpath(sysconfig.get_paths()[key]) + os.sep for key in ("stdlib", "platstdlib")
)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


@functools.lru_cache(maxsize=None)
def _is_users_module(name: str) -> bool:
    package = name.partition(".")[0]
    if package in _FOREIGN or package in sys.builtin_module_names:
        return False
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "origin", None) in ("built-in", "frozen"):
        return False
    file = getattr(module, "__file__", None)
    if not file:
        return True  # of a notebook, or made at run time
    file = os.path.realpath(file)
    return not file.startswith(_OF_PYTHON) or any(each in file for each in _INSTALLED)


def is_users(value: Any) -> bool:
    """True for a function, a class or a module that is the user's own, or of another package."""
    if isinstance(value, types.ModuleType):
        return _is_users_module(value.__name__)
    name = getattr(value, "__module__", None)
    return not isinstance(name, str) or _is_users_module(name)
