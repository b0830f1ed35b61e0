"""Layers that OneFlow computes slowly on a CPU, in other operators: the same mathematics, faster.

``cpu_speedups(model)`` has the layers of a model compute so. A layer stays the object it is, with
its parameters, names and hooks; only its class is a subclass of its own class meanwhile.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType
from typing import Any, Dict, List, Optional, Tuple, Type

from oneflow import nn

from ofengine.constructors import tells_unknown_arguments
from ofengine.errors import ConfigurationError
from ofengine.speedups import layers

_FASTER: Dict[type, type] = {
    nn.LayerNorm: layers.LayerNorm,
    nn.GELU: layers.GELU,
    nn.SiLU: layers.SiLU,
    nn.Conv2d: layers.Conv2d,
    nn.LSTM: layers.LSTM,
}


def _faster(layer: nn.Module) -> Optional[type]:
    """The subclass of its class with which ``layer`` computes in faster operators, or None."""
    if not layers.has_faster(layer):
        return None
    own = type(layer)
    if own is getattr(sys.modules.get("flowvision.models.convnext"), "LayerNorm", None):
        from ofengine.speedups import convnext

        return convnext.LayerNorm
    return _FASTER.get(own)


@tells_unknown_arguments
class cpu_speedups:
    """Have the layers of ``model`` compute on a CPU in faster operators, from now on.

    These are ``nn.LayerNorm`` and that of flowvision's ConvNeXt, ``nn.GELU``, ``nn.SiLU``, an
    ``nn.LSTM`` of one direction without ``proj_size`` (in training, with dropout between its layers
    it computes as before), and such ``nn.Conv2d`` of stride 1 as have one filter of 25 elements or
    more for each channel; a subclass of a user's own stays as it is, and so does what a forward
    method calls as a function. Parameters, names, ``state_dict`` and ``isinstance`` are untouched;
    last bits differ from those of OneFlow's own kernels, and values and gradients are within 1e-6
    of the largest one from float64. Only float32 on a CPU is computed so; of a layer norm, GELU,
    SiLU and LSTM first derivatives alone can be taken.

    As in ``with cpu_speedups(model):``, which ends it, or until :meth:`undo`.

    Args:
        model: any ``oneflow.nn.Module``.

    Raises:
        ConfigurationError: ``model`` is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                f"cpu_speedups takes an oneflow.nn.Module, and this is a {type(model).__name__}."
            )
        self._changed: List[Tuple[Any, type]] = []
        for layer in model.modules():
            own, faster = type(layer), _faster(layer)
            if faster is not None:
                layer.__class__ = faster
                self._changed.append((layer, own))
        self.layers = dict(Counter(own.__name__ for _, own in self._changed))
        """How many layers of each class compute so."""

    def undo(self) -> None:
        """Let the layers compute as OneFlow does again."""
        for layer, own in self._changed:
            layer.__class__ = own
        self._changed = []

    def __enter__(self) -> cpu_speedups:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.undo()
