"""Rates compiled into a graph: a table of absolute rates for each parameter group."""

from __future__ import annotations

import math
from typing import Any, List, Sequence, Tuple

from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler

_LONG_TABLE = 1024
RateTable = Tuple[List[int], List[float]]
"""The steps at which a rate takes a new value (the first is 0 or less), and the values."""


class _TableLR(LRScheduler):
    """Lowers one table of absolute rates for each parameter group, in the groups' order."""

    def __init__(
        self, graph: nn.Graph, tables: Sequence[RateTable], scales: Sequence[float]
    ) -> None:
        # LRScheduler.__init__ would write into the groups.
        (entry,) = graph._opts
        self.optimizer = entry["optim"]
        self.verbose = False
        self._train_conf = graph.config.proto.train_conf
        self._rates = iter(list(enumerate(zip(tables, scales))))

    def _generate_conf_for_graph(self, lr_conf: Any) -> None:
        group, ((starts, values), scale) = next(self._rates)
        self._train_conf.optimizer_conf[group].lr_scale = scale
        _fill(lr_conf, starts, values)


def _fill(lr_conf: Any, starts: Sequence[int], values: Sequence[float]) -> None:
    """Write a table into ``lr_conf``; a long one as a table of tables.

    The kernel searches a table from its start at every step.
    """
    if len(values) <= _LONG_TABLE:
        conf = lr_conf.piecewise_constant_conf
        conf.SetInParent()
        conf.values.extend(values)
        # The kernel takes the first value whose boundary is not below the step.
        conf.boundaries.extend(start - 1 for start in starts[1:])
        return
    conf = lr_conf.sequential_scheduler_conf
    size = math.isqrt(len(values))
    for first in range(0, len(values), size):
        part = slice(first, first + size)
        _fill(conf.schedulers.add(), starts[part], values[part])
        if first:
            conf.milestones.append(starts[first])
            conf.interval_rescaling.append(False)


def lower_rates(graph: nn.Graph, tables: Sequence[RateTable], scales: Sequence[float]) -> None:
    """Make ``graph``, not compiled yet, take its groups' rates from ``tables`` times ``scales``."""
    graph._opts[0]["lr_sch"] = _TableLR(graph, tables, scales)
