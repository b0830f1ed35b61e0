"""The bias correction of Adam, AdamW and LAMB in eager mode, with the bits of graphs.

Both modes run the same kernels and hand them ``1 - beta ** step``. OneFlow's eager optimizers take
the power from ``math.pow``, in float64; a graph has ``Fastpow<float>`` compute it
(``model_update_kernel_util.cpp``), and rounds each product to float32. It does so for any device:
the step counter lies on the CPU (``auto_train_step.cpp``), and the correction is computed beside it
(``adam_optm.cpp``, ``lamb_optm.cpp``). For GPUs this was read, not run.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, Callable, List

import numpy as np
from oneflow import optim
from oneflow.nn.optimizer import adam, adamw, lamb

_MODULES: Any = (adam, adamw, lamb)
"""Where OneFlow's optimizers call ``math.pow``, each for its bias correction and nothing else."""

_BLOCK = 256
"""Powers are computed for so many steps at once: the next one is then looked up."""


class Stepping(threading.local):
    """Whether this thread is in an optimizer's step that is to compute as graphs do.

    Each thread has its own answer: loops of others may run in other threads.
    """

    on = False


STEPPING = Stepping()


@functools.lru_cache(maxsize=64)  # groups mostly have the same betas
def graph_power(beta: float, exponent: int) -> float:
    """``beta ** exponent``, a float32 value, with the bits of OneFlow's ``Fastpow<float>``."""
    place = exponent % _BLOCK
    return _powers(beta, exponent - place)[place]


@functools.lru_cache(maxsize=256)
def _powers(beta: float, first: int) -> List[float]:
    """The powers with the exponents from ``first`` on, by repeated squaring."""
    left = np.arange(first, first + _BLOCK)
    square, powers = np.float32(beta), np.ones(_BLOCK, np.float32)
    with np.errstate(under="ignore"):
        while left.any():
            powers = np.where(left & 1, powers * square, powers)
            square, left = square * square, left >> 1
    return powers.tolist()


class _Math:
    """The module ``math``, but that :data:`STEPPING` decides which ``pow`` it has."""

    def __init__(self, instead_of: Any) -> None:
        self._instead_of = instead_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instead_of, name)

    def pow(self, x: float, y: float) -> float:
        if STEPPING.on:
            return graph_power(float(x), int(y))
        power: float = self._instead_of.pow(x, y)
        return power


_WITHOUT = (optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta)


def corrects_bias(optimizer: Any) -> bool:
    """False where ``optimizer`` has no bias to correct; True where that is not known."""
    return type(optimizer) not in _WITHOUT


def step_as_graphs(step: Callable[[], Any]) -> None:
    """Call an optimizer's ``step`` and have it compute its corrections as graphs do."""
    STEPPING.on = True
    try:
        step()
    finally:
        STEPPING.on = False


def let_optimizers_ask() -> None:
    """Have OneFlow's optimizers look at :data:`STEPPING`; while it is off, nothing is changed."""
    for module in _MODULES:
        if not isinstance(module.math, _Math):
            module.math = _Math(module.math)
