"""What the faster operators share."""

from __future__ import annotations

from typing import Any

import oneflow as flow

from ofengine.errors import ConfigurationError


def stretched(column: Any, width: int) -> Any:
    """The (n, 1) ``column``, ``width`` times beside itself: the same numbers, to the bit."""
    return flow.matmul(column, column.new_ones((1, width)))


def refuse_second_derivatives() -> None:
    """Called in a backward: what it computes from does not tell of a further derivative.

    Raises :class:`ConfigurationError` where one may be taken.
    """
    if flow.is_grad_enabled():
        raise ConfigurationError(
            "cpu_speedups has no second derivatives, which create_graph=True asks for: leave "
            "cpu_speedups out where a step takes them."
        )
