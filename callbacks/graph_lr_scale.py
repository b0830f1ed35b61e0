"""GraphLRScaleCallback: layerwise rates in graph mode, lowered into the compiled graph."""

from __future__ import annotations

from typing import Any, Callable, Optional

from oneflow import nn

from ofengine.callback import Callback
from ofengine.callbacks.lr_decay import checked_decay
from ofengine.rates.plan import DecayEvents
from ofengine.run.view import RunView
from ofengine.task import TaskModule


class GraphLRScaleCallback(Callback):
    """Compiles the plan's rates into each graph that updates the weights.

    ``lr_scale`` becomes OneFlow's own ``lr_scale`` of the group; schedule and decay become a
    table of rates for each group, which costs nothing at run time. Does nothing in eager mode,
    where :class:`LRDecayCallback` carries out the same plan. Both may be listed.

    Args:
        every_n_batches: as in :class:`LRDecayCallback`. Default: what an ``LRDecayCallback`` in
            the list says, else 10.
        per_epoch: likewise; default True.
        key: likewise; default ``"lr_decay_scale"``.
    """

    def __init__(
        self,
        every_n_batches: Optional[int] = None,
        per_epoch: Optional[bool] = None,
        key: Optional[str] = None,
    ) -> None:
        self._decay: Optional[DecayEvents] = None
        self._check: Optional[Callable[[], None]] = None
        if (every_n_batches, per_epoch, key) != (None, None, None):
            default = DecayEvents()
            self._decay = checked_decay(
                type(self).__name__,
                default.every_n_batches if every_n_batches is None else every_n_batches,
                default.per_epoch if per_epoch is None else per_epoch,
                default.key if key is None else key,
            )

    @property
    def decay_events(self) -> Optional[DecayEvents]:
        """When decay happens, where this callback was given arguments."""
        return self._decay

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Remember the groups' rates, to notice where somebody changes them."""
        self._check = None
        if trainer.mode == "graph":
            trainer.rates.watch(*trainer.optimizers.values())
            self._check = trainer.rates.check_untouched

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a rate written into a group by hand, which the graph would not see."""
        if self._check is not None:
            self._check()

    def on_before_graph_compile(self, trainer: RunView, task: TaskModule, graph: nn.Graph) -> None:
        """Lower the rates from this step on into ``graph``."""
        trainer.lower_rates(graph)

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let go of the plan."""
        self._check = None
