"""A trial run: its settings; and a task, its data and the generators put back behind it."""

from __future__ import annotations

import copy
import random
import types
from typing import Any, Dict, List, Optional, Set, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.loaders import SHARED_GENERATOR, forget_workers
from ofengine._oneflow.session import synchronize
from ofengine.data.generator_state import set_state_of, state_of
from ofengine.run.settings import Settings
from ofengine.run.undone import Kept

_Generator = type(flow.default_generator)
_DEPTH = 4
"""How far down in the dataloader attributes are looked at: sampler, dataset, transforms, ..."""
_PASSED_BY = (
    flow.Tensor, np.ndarray, nn.Module, Optimizer, type, types.ModuleType, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip


def of_trial(settings: Settings, steps: int, **changes: Any) -> Settings:
    """``settings`` for so many steps, with nothing around them, and with these ``changes``."""
    return attrs.evolve(
        settings, max_epochs=-1, max_steps=steps, max_time=None, num_sanity_val_steps=0,
        fast_dev_run=0, restart_on_crash=0, **changes,
    )  # fmt: skip


def of_sweep(settings: Settings, steps: int, **changes: Any) -> Settings:
    """The same in one mode, where whoever tries decides when to end, and a NaN is a result."""
    return of_trial(
        settings, steps, eval_mode=settings.mode, min_epochs=0, min_steps=0, detect_anomaly=False,
        **changes,
    )  # fmt: skip


class Restorer(Kept):
    """A context that undoes at its end what happened to a task and its data in between.

    OneFlow's generators do not tell how far they have been used, so they cannot be put back.
    Instead each that is found as an attribute is exchanged for another one with the same seed
    in between, and never drawn from.

    Args:
        task: see :class:`Kept`.
        source: the dataloader; the attributes of it and of what it holds are put back.
    """

    def __init__(self, task: nn.Module, source: Any) -> None:
        super().__init__(task)
        self._source = source

    def __enter__(self) -> Restorer:
        self._random = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._default_seed = flow.default_generator.initial_seed()
        self._default_state = state_of(flow.default_generator)
        self._shared_state = state_of(SHARED_GENERATOR)
        self._states: List[Tuple[Any, Any]] = []
        self._substitutes: Dict[int, Any] = {}
        self.remember()
        self._walk(self._source, set(), _DEPTH)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.put_back()
        for generator, state in self._states:
            _set_state(generator, state)
        flow.manual_seed(self._default_seed)  # on all devices
        set_state_of(flow.default_generator, self._default_state)
        set_state_of(SHARED_GENERATOR, self._shared_state)
        np.random.set_state(self._numpy)
        random.setstate(self._random)
        synchronize()

    def remember_attributes(self, attributes: Dict[str, Any]) -> None:
        """Keep ``attributes``, and put other generators into it."""
        super().remember_attributes(attributes)
        for name, value in attributes.items():
            if isinstance(value, _Generator):
                attributes[name] = self._substitute(value)
            else:
                state = _get_state(value)
                if state is not None:
                    self._states.append((value, state))

    def _substitute(self, generator: Any) -> Any:
        if generator is flow.default_generator:
            return generator
        other = self._substitutes.get(id(generator))
        if other is None:
            other = flow.Generator(str(generator.device).split(":")[0])
            other.manual_seed(generator.initial_seed())
            self._substitutes[id(generator)] = other
        return other

    def _walk(self, value: Any, seen: Set[int], depth: int) -> None:
        """Remember the attributes of ``value`` and of what it holds."""
        if id(value) in seen or isinstance(value, _PASSED_BY) or not hasattr(value, "__dict__"):
            return
        seen.add(id(value))
        attributes = vars(value)
        children = list(attributes.values())
        self.remember_attributes(attributes)
        if isinstance(value, flow.utils.data.DataLoader):
            forget_workers(value)  # those kept alive have gone on by themselves
        for child in children if depth else []:
            inside = child[:100] if isinstance(child, (list, tuple)) else [child]
            for each in inside:
                self._walk(each, seen, depth - 1)


def _get_state(value: Any) -> Optional[Any]:
    """The state of a numpy or Python generator; None for anything else."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    return value.getstate() if isinstance(value, random.Random) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


class OptimizerLoan:
    """Groups and states of an optimizer, copied for a trial run and then put back.

    The optimizer works on the copies in between; its own groups and tensors are not touched.

    Args:
        optimizer: the optimizer; the parameters themselves are shared, not copied.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._own = dict(vars(optimizer))
        memo = {id(p): p for group in optimizer.param_groups for p in group.parameters}
        for name, value in self._own.items():
            if isinstance(value, (dict, list)):
                try:
                    vars(optimizer)[name] = copy.deepcopy(value, memo)
                except TypeError:  # OneFlow's operations: they hold no state
                    continue

    def give_back(self) -> None:
        """Put the optimizer's own groups and states back."""
        vars(self._optimizer).clear()
        vars(self._optimizer).update(self._own)
