"""What a checkpoint is taken up into, remembered, to be put back where that fails half-way."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Tuple

import oneflow as flow
from oneflow import nn

from ofengine._oneflow.optimizer_copies import copied_state, put_state_back
from ofengine._oneflow.session import synchronize
from ofengine.data.generators import global_states, set_global_states
from ofengine.run.state import Run

_OF_A_RUN = ("id", "seed", "data_seed", "seconds_before", "should_stop", "cut_short", "at_cut")


class Attributes:
    """The attributes of some objects, and what the lists, dicts and sets among them hold.

    What other objects are held, is not looked into: they are put back, not what they were like.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self._owners: List[Tuple[Dict[str, Any], Dict[str, Any]]] = []
        self._contents: Dict[int, Tuple[Any, Any]] = {}
        for owner in owners:
            attributes = getattr(owner, "__dict__", None)
            if attributes is not None:
                self._owners.append((attributes, dict(attributes)))
                for value in attributes.values():
                    self._remember(value)

    def _remember(self, value: Any) -> None:
        if not isinstance(value, (list, dict, set)) or id(value) in self._contents:
            return
        self._contents[id(value)] = (value, value.copy())
        for each in value.values() if isinstance(value, dict) else value:
            self._remember(each)

    def put_back(self) -> None:
        """Let all be as it was."""
        for attributes, kept in self._owners:
            attributes.clear()
            attributes.update(kept)
        for value, kept in self._contents.values():
            if isinstance(value, list):
                value[:] = kept
            else:
                value.clear()
                value.update(kept)


class Undo:
    """The run as it is now: its task, optimizers, callbacks, loggers and generators.

    Args:
        run: the run.
        optimizers: those besides the run's own.
    """

    def __init__(self, run: Run, optimizers: Iterable[Any] = ()) -> None:
        self._run = run
        self._of_run = {name: getattr(run, name) for name in _OF_A_RUN}
        self._progress = run.progress.state()
        modules = list(run.task.modules())
        self._attributes = Attributes([*modules, *run.callbacks, *run.loggers])
        self._tensors = [(t, t.detach().clone()) for t in _tensors_of(modules)]
        own = [each.made.optimizer for each in run.each().values()]
        self._optimizers = [(each, copied_state(each)) for each in (*own, *optimizers)]
        self._generators = global_states()

    def put_back(self) -> None:
        """Let all be as it was."""
        run = self._run
        synchronize()
        self._attributes.put_back()
        with flow.no_grad():
            for tensor, values in self._tensors:
                tensor.copy_(values)
        for optimizer, state in self._optimizers:
            put_state_back(optimizer, state)
        for name, value in self._of_run.items():
            setattr(run, name, value)
        run.progress.load(self._progress)
        set_global_states(self._generators)
        synchronize()


def _tensors_of(modules: Iterable[nn.Module]) -> List[Any]:
    """The parameters, buffers and plain tensors of ``modules``, each once."""
    found: Dict[int, Any] = {}
    for module in modules:
        held: List[Optional[Any]] = [*module.parameters(False), *module.buffers(False)]
        held += vars(module).values()
        for each in held:
            if isinstance(each, flow.Tensor) and not getattr(each, "is_lazy", False):
                found[id(each)] = each
    return list(found.values())
