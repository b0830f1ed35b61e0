"""The optimizer's state in graph mode: one memory that all graphs which update share.

A run begins with what the optimizer object holds, and leaves there what it ended with, as eager
mode does: a loop by hand, or another ``fit`` in either mode, goes on from it.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs, optimizer_state
from ofengine._oneflow.global_tensors import Ranks, Twins, local
from ofengine._oneflow.optimizer_copies import replace_state
from ofengine._oneflow.session import synchronize
from ofengine.run.mode import ParameterStates
from ofengine.run.state import Run


class SharedState:
    """What the optimizer keeps of each parameter, and its count of steps."""

    def __init__(self, run: Run, task: nn.Module) -> None:
        self._run = run
        self._task = task
        self._tensors: Dict[str, Any] = {}
        """By the names that graphs give them."""
        self._parameter_of: Dict[str, str] = {}

    def read(self) -> Tuple[int, ParameterStates]:
        """The steps, and what is kept of each parameter by name; live memory."""
        if not self._tensors:  # nothing was compiled yet, or the run is over
            return self._of_optimizer()
        synchronize()  # a graph's run is not waited for by reading what it writes
        states: ParameterStates = {}
        for name, tensor in self._tensors.items():
            parameter, key = optimizer_state.split_graph_state(name)
            if parameter in self._parameter_of:
                states.setdefault(self._parameter_of[parameter], {})[key] = local(tensor)
        return self._steps(), states

    def _steps(self) -> int:
        return int(self._tensors[optimizer_state.TRAIN_STEP].item())

    def _of_optimizer(self) -> Tuple[int, ParameterStates]:
        made = self._run.optimization
        if made is None:
            return 0, {}
        names = {id(self._own(p)): name for name, p in self._task.named_parameters()}
        return optimizer_state.optimizer_state(made.optimizer, names)

    def _own(self, parameter: Any) -> Any:
        """The parameter that the optimizer keeps its state by."""
        return parameter

    def load(self, steps: int, states: ParameterStates) -> None:
        """Begin with these, as :meth:`read` of either mode's gave them."""
        parameters = dict(self._task.named_parameters())
        replace_state(self._run.made.optimizer, parameters, steps, states)

    def share_with(self, graph: nn.Graph) -> None:
        """Let ``graph``, not compiled yet, use this memory."""
        names = {id(p): name for name, p in self._task.named_parameters()}
        for key, parameter in graphs.parameter_names(graph).items():
            if id(parameter) in names:
                self._parameter_of[key] = names[id(parameter)]
        if not self._tensors:
            self._begin()
        if self._tensors:
            graphs.share_optimizer_states(graph, self._tensors)

    def take_from(self, graph: nn.Graph) -> None:
        """Note the memory of ``graph``, which is compiled.

        Kept where a later one has it no more: what is frozen now may train again.
        """
        self._tensors.update(graphs.optimizer_states(graph))

    def detach(self) -> None:
        """Let the graphs' memory go, and the optimizer have what it holds."""
        if self._tensors:
            steps, states = self.read()
            _, others = self._of_optimizer()  # of parameters that no graph has
            self._tensors.clear()
            self.load(steps, {**others, **states})

    def _begin(self) -> None:
        """Take what the optimizer holds for the first graph."""
        steps, states = self._of_optimizer()
        if not steps and not states:
            return
        in_graph = {name: key for key, name in self._parameter_of.items()}
        for name, kept in states.items():
            for key, tensor in kept.items():
                if name in in_graph:
                    place = optimizer_state.graph_state_name(in_graph[name], key)
                    self._tensors[place] = self._as_graphs_have_it(tensor)
        self._tensors[optimizer_state.TRAIN_STEP] = self._count(steps)

    def _as_graphs_have_it(self, tensor: Any) -> Any:
        return tensor

    def _count(self, steps: int) -> Any:
        return flow.tensor([steps], dtype=flow.int64).to(self._run.settings.device)


class StateOfRanks(SharedState):
    """The same as global tensors, which all ranks have whole."""

    def __init__(self, run: Run, task: nn.Module, ranks: Ranks, twins: Twins) -> None:
        super().__init__(run, task)
        self._ranks, self._twins = ranks, twins
        self.steps = 0
        """Updates made with this memory: only rank 0 has the graphs' own count."""

    def _own(self, parameter: Any) -> Any:
        return self._twins.local_of(parameter)

    def _steps(self) -> int:
        return self.steps

    def _begin(self) -> None:
        self.steps, _ = self._of_optimizer()
        super()._begin()

    def _as_graphs_have_it(self, tensor: Any) -> Any:
        return self._ranks.whole(tensor)

    def _count(self, steps: int) -> Any:
        return self._ranks.count(steps)
