"""Mode: what the loops, checkpoints and callbacks ask of eager and of graph mode."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Protocol, Tuple

from oneflow import nn

from ofengine._oneflow.optimizer_state import ParameterStates

HookCalls = Mapping[str, List[Callable[..., Any]]]
"""For every hook the bound functions that override it."""


class Mode(Protocol):
    """One way of running the steps of one task. Both compute the same."""

    def start(self) -> None:
        """Training with the run's optimizer is about to begin."""

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """Forward and backward of one batch; the update where it ``closes`` its window.

        ``window`` is the number of batches whose gradients are averaged. Returns what
        ``training_step`` returned as a dict, with the "loss" as a tensor of no dimension; of
        ``ABSENT``, where the other ranks have a batch and this one has none, nothing.
        """

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """``validation_step``, ``test_step`` or ``predict_step`` on one batch, no gradients."""

    def evaluated(self, step: str, dataloader_idx: int) -> None:
        """This rank has gone through its batches of a loader; other ranks may have one left."""

    def optimizer_state(self) -> Tuple[int, ParameterStates]:
        """The optimizer's steps, and what it keeps of each parameter by name; live memory."""

    def load_optimizer_state(self, steps: int, states: ParameterStates) -> None:
        """Go on from what :meth:`optimizer_state` of either mode gave."""

    def gradients(self) -> Dict[str, Any]:
        """What an accumulation window that is not closed yet has added up, by parameter."""

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """Go on from what :meth:`gradients` of either mode gave."""

    def rebuild(self, reason: str) -> None:
        """Other rates, parameters or layers train from the next step on."""

    def settle(self) -> None:
        """Bring up to date what steps leave behind."""

    def close(self) -> None:
        """Let go of what the run needed; the optimizer's state may be saved yet."""

    def default_train_graph(self) -> nn.Graph:
        """What ``TaskModule.build_graph`` returns unless it is overridden; graph mode only."""

    def lower_rates(self, graph: nn.Graph) -> None:
        """Compile the plan's rates, from this step on, into ``graph``; graph mode only."""
