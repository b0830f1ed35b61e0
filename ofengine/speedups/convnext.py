"""The layer norm that flowvision's ConvNeXt has of its own, in faster operators.

Imported only where a model has one, so that ofengine needs no flowvision.
"""

from __future__ import annotations

from typing import Any

from flowvision.models import convnext

from ofengine.speedups import norms
from ofengine.speedups.layers import is_for_cpu


class LayerNorm(convnext.LayerNorm):
    """See :func:`ofengine.speedups.norms.layer_norm`; over the last dimension, or the second."""

    def forward(self, x: Any) -> Any:
        """The normalized input, of its shape."""
        width = self.weight.shape[0]
        first = self.data_format == "channels_first"
        fits = x.ndim == 4 and x.shape[1 if first else 3] == width
        if not fits or not is_for_cpu(x):
            return convnext.LayerNorm.forward(self, x)
        if not first:
            return norms.layer_norm(x, width, self.weight, self.bias, self.eps)
        last = x.permute(0, 2, 3, 1).contiguous()
        y = norms.layer_norm(last, width, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2).contiguous()
