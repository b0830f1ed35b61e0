"""The optimizer's state in graph mode: one memory that all graphs which update share.

A run begins with what the optimizer object holds, and leaves there what it ended with, as eager
mode does: a loop by hand, or another ``fit`` in either mode, goes on from it.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs, optimizer_state
from ofengine._oneflow.global_tensors import Ranks, Twins, local
from ofengine._oneflow.lent_state import lend_state, take_state_back
from ofengine._oneflow.optimizer_copies import replace_state, state_of
from ofengine._oneflow.session import synchronize
from ofengine._oneflow.watched_options import watch_options
from ofengine.errors import warn
from ofengine.run.mode import ParameterStates
from ofengine.run.state import Run

_OFTEN = 5


class SharedState:
    """What the optimizer keeps of each parameter, and its count of steps.

    Args:
        rebuild: lets go of the graphs, saying why, where somebody asks the optimizer for its state:
            it has it then, and the next graphs begin with what it holds by that time.
    """

    def __init__(self, run: Run, task: nn.Module, rebuild: Callable[[str], None]) -> None:
        self._run = run
        self._task = task
        self._rebuild = rebuild
        self._kept: Dict[int, Tuple[Any, Dict[str, Any]]] = {}
        """Of each parameter it and what is kept of it, by the parameter's ``id``."""
        self._others: Dict[str, Any] = {}
        """What a graph keeps besides, by name: the count of steps. Empty before the first one."""
        self._times = 0
        """How often somebody asked."""

    def read(self) -> Tuple[int, ParameterStates]:
        """The steps, and what is kept of each parameter by name; live memory."""
        if not self._others:  # nothing was compiled yet, or the run is over
            return self._of_optimizer()
        synchronize()  # a graph's run is not waited for by reading what it writes
        names = self._names()
        states = {
            names[key]: {k: local(tensor) for k, tensor in kept.items()}
            for key, (_, kept) in self._kept.items()
            if key in names and kept
        }
        return self._steps(), states

    def _steps(self) -> int:
        return int(self._others[optimizer_state.TRAIN_STEP].item())

    def _of_optimizer(self) -> Tuple[int, ParameterStates]:
        made = self._run.optimization
        if made is None:
            return 0, {}
        return optimizer_state.optimizer_state(made.optimizer, self._names())

    def _names(self) -> Dict[int, str]:
        return {id(self._own(p)): name for name, p in self._task.named_parameters()}

    def _own(self, parameter: Any) -> Any:
        """The parameter that the optimizer keeps its state by."""
        return parameter

    def load(self, steps: int, states: ParameterStates) -> None:
        """Begin with these, as :meth:`read` of either mode's gave them."""
        parameters = dict(self._task.named_parameters())
        replace_state(self._run.made.optimizer, parameters, steps, states)

    def share_with(self, graph: nn.Graph) -> None:
        """Let ``graph``, not compiled yet, use this memory."""
        if not self._others:
            self._begin()
        tensors = dict(self._others)
        for name, parameter in graphs.parameter_names(graph).items():
            _, kept = self._kept.get(id(self._own(parameter)), (None, {}))
            for key, tensor in kept.items():
                tensors[optimizer_state.graph_state_name(name, key)] = tensor
        if tensors:
            graphs.share_optimizer_states(graph, tensors)

    def take_from(self, graph: nn.Graph) -> None:
        """Note the memory of ``graph``, which is compiled.

        Kept where a later one has it no more: what is frozen now may train again.
        """
        parameters = graphs.parameter_names(graph)
        for name, tensor in graphs.optimizer_states(graph).items():
            parameter, key = optimizer_state.split_graph_state(name)
            if parameter in parameters:
                own = self._own(parameters[parameter])
                self._kept.setdefault(id(own), (own, {}))[1][key] = tensor
            else:
                self._others[name] = tensor
        lend_state(self._run.made.optimizer, self._asked_for)
        watch_options(self._run.made.optimizer)

    def _asked_for(self) -> None:
        """Somebody reads or writes the optimizer's state, or makes a step with it by hand."""
        self.detach()
        self._rebuild("the optimizer's state was read or changed")
        self._times += 1
        if self._times == _OFTEN:
            warn(
                f"the optimizer's state was read or changed {_OFTEN} times between two steps, and "
                "each time the compiled update is compiled anew, which takes seconds: do it less "
                'often, or use Trainer(mode="eager").'
            )

    def detach(self) -> None:
        """Let the graphs' memory go, and the optimizer have what it holds."""
        if not self._others:
            return
        synchronize()
        optimizer, steps = self._run.made.optimizer, self._steps()
        take_state_back(optimizer)
        held = {
            id(p): (p, state_of(optimizer, p)) for g in optimizer.param_groups for p in g.parameters
        }
        held = {key: each for key, each in held.items() if each[1]}  # some may be in no graph
        for key, (parameter, kept) in self._kept.items():
            held[key] = parameter, {k: local(tensor) for k, tensor in kept.items()}
        self._kept, self._others = {}, {}
        parameters = {str(key): parameter for key, (parameter, _) in held.items()}
        states = {str(key): kept for key, (_, kept) in held.items()}
        replace_state(optimizer, parameters, steps, states)

    def _begin(self) -> None:
        """Take what the optimizer holds for the first graph."""
        steps, _ = self._of_optimizer()
        optimizer = self._run.made.optimizer
        for parameter in (self._own(p) for g in optimizer.param_groups for p in g.parameters):
            kept = state_of(optimizer, parameter)
            tensors = {
                k: self._as_graphs_have_it(each)
                for k, each in kept.items()
                if isinstance(each, flow.Tensor)
            }
            if tensors:
                self._kept[id(parameter)] = parameter, tensors
        if steps or self._kept:
            self._others[optimizer_state.TRAIN_STEP] = self._count(steps)

    def _as_graphs_have_it(self, tensor: Any) -> Any:
        return tensor

    def _count(self, steps: int) -> Any:
        return flow.tensor([steps], dtype=flow.int64).to(self._run.settings.device)


class StateOfRanks(SharedState):
    """The same as global tensors, which all ranks have whole."""

    def __init__(
        self,
        run: Run,
        task: nn.Module,
        rebuild: Callable[[str], None],
        ranks: Ranks,
        twins: Twins,
    ) -> None:
        super().__init__(run, task, rebuild)
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
