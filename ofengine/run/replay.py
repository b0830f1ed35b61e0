"""A training step computed once more, eagerly, with all that it computes looked at on the way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.lines import is_users_own, line_at, line_being_run
from ofengine.run.view import Step

NAN, INFINITE = "NaN", "an infinite number"
_DEPTH = 3
"""How deep tensors are looked for in lists and dicts."""


def odd(tensor: Any) -> Optional[str]:
    """What of ``tensor`` is not finite; None where all is. Waits for the device."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    array = tensor.detach().numpy()
    if np.isnan(array).any():
        return NAN
    return None if np.isfinite(array).all() else INFINITE


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, flow.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each, depth - 1)


class _Known:
    """A tensor that a module or a line of the user's put out, or a module took in.

    Written out, for what attrs would generate has no file, and would be followed as a user's own.
    """

    def __init__(self, tensor: Any, made_at: str, number: int) -> None:
        self.tensor = tensor
        self.made_at = made_at
        self.number = number
        """How many modules had been called by then."""
        self.users: List[Tuple[str, str, int]] = []
        """(module, in words, number of its call) of the modules that took it in."""


class Replay:
    """Computes a step and notes where numbers that are not finite come up first.

    Modules are looked at before and after their call, by hooks, which whoever keeps the task takes
    off again; the user's own functions after each of their lines, by Python's tracing.

    Args:
        task: the task, in training mode.
    """

    def __init__(self, task: nn.Module) -> None:
        self._task = task
        self._names = {
            id(module): f"{name!r} ({type(module).__name__})" if name else type(module).__name__
            for name, module in task.named_modules()
        }
        self._paths = {id(module): name for name, module in task.named_modules()}
        self._calls: Dict[int, int] = {}
        self._number = 0
        self._known: Dict[int, _Known] = {}
        self._first: Dict[str, str] = {}
        """Of each kind of odd number, where the first one came up."""
        self._backward: Optional[Tuple[int, str]] = None

    def find(self, step: Step, batch: Any, batch_idx: int) -> Optional[str]:
        """Where the first of them arose, as a clause; None where all are finite."""
        for name, tensor in [*self._task.named_parameters(), *self._task.named_buffers()]:
            if odd(tensor) == NAN:
                return f"{name!r} had NaN before the step already"
        for tensor in tensors_in(batch):
            kind = odd(tensor)
            if kind is not None:
                return f"the batch itself has {kind}, in a tensor of shape {tuple(tensor.shape)}"
        loss = self._forward(step, batch, batch_idx)
        kind = odd(loss)
        if kind is not None:
            return self._said_of_forward(kind)
        loss.backward()
        return self._said_of_backward()

    def _forward(self, step: Step, batch: Any, batch_idx: int) -> Any:
        for module in self._task.modules():
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)
        tracing = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return step(batch, batch_idx)
        finally:
            sys.settrace(tracing)

    # ------------------------------------------------------------------ what is looked at

    def _before(self, module: nn.Module, inputs: Any) -> None:
        self._number += 1
        self._calls[id(module)] = self._number
        name = self._names.get(id(module), type(module).__name__)
        at = line_being_run()
        for tensor in tensors_in(inputs):
            self._note(tensor, f"in what is given to {name} at {at}")
            known = self._known.get(id(tensor))
            if known is not None:
                path = self._paths.get(id(module), "")
                users = known.users
                if users and path.startswith(users[-1][0] + "." if users[-1][0] else ""):
                    users.pop()  # it hands the tensor on to this one
                users.append((path, f"{name}, called at {at}", self._number))

    def _after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        name = self._names.get(id(module), type(module).__name__)
        for tensor in tensors_in(outputs):
            self._note(tensor, f"in the forward of {name}, called at {line_being_run()}")

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Python calls it for each function that is called; the user's own are followed."""
        if not is_users_own(frame.f_code.co_filename):
            return None
        number = frame.f_lineno

        def follow(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal number
            if event in ("line", "return"):
                owner = self._names.get(id(frame.f_locals.get("self")))
                within = f" in the forward of {owner}" if owner else ""
                at = f"at {line_at(frame.f_code.co_filename, number)}{within}"
                for value in [argument, *frame.f_locals.values()]:
                    for tensor in tensors_in(value):
                        self._note(tensor, at)
                number = frame.f_lineno
            return follow

        return follow

    def _note(self, tensor: Any, where: str) -> None:
        known = self._known.get(id(tensor))
        if known is None:
            self._known[id(tensor)] = known = _Known(tensor, where, self._number)
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._gradient_hook(known))
        kind = odd(tensor)
        if kind is not None and not isinstance(tensor, nn.Parameter):
            self._first.setdefault(kind, where)

    def _gradient_hook(self, known: _Known) -> Callable[[Any], None]:
        def look(gradient: Any) -> None:
            if self._backward is None:
                kind = odd(gradient)
                if kind is not None:
                    self._backward = self._users_of(known, kind)

        return look

    # ------------------------------------------------------------------ in words

    def _said_of_forward(self, kind: str) -> str:
        where = self._first.get(kind)
        if where is None:
            return f"{kind} arose in the forward pass, where nothing is looked at"
        before = self._first.get(INFINITE) if kind == NAN else None
        of_before = "" if before in (None, where) else (
            f"; infinite numbers had come up before, {before}"
        )  # fmt: skip
        return f"{kind} arose first {where}{of_before}"

    def _users_of(self, known: _Known, kind: str) -> Tuple[int, str]:
        if known.users:
            said = " or ".join(dict.fromkeys(words for _, words, _ in known.users))
            return known.users[-1][2], f"{kind} arose first in the backward of {said}"
        return known.number, (
            f"{kind} arose first in the backward of what uses the result {known.made_at}"
        )

    def _said_of_backward(self) -> Optional[str]:
        """The latest in forward, which is the first in backward, of activations and parameters."""
        found = [] if self._backward is None else [self._backward]
        for name, parameter in self._task.named_parameters():
            kind = None if parameter.grad is None else odd(parameter.grad)
            if kind is None:
                continue
            owner, at = self._owner_of(name)
            number = self._calls.get(id(owner), 0)
            if self._backward is None or number > self._backward[0]:
                of = self._names.get(id(owner), "the task")
                found.append(
                    (number, f"{kind} arose first in the backward of {of}: in the gradient of {at}")
                )
        return max(found, key=lambda each: each[0])[1] if found else None

    def _owner_of(self, name: str) -> Tuple[nn.Module, str]:
        path = name.rpartition(".")[0]
        return dict(self._task.named_modules())[path], repr(name)


def gradients_odd(gradients: Sequence[Tuple[str, Any]]) -> Optional[str]:
    """The first of (name, gradient) that is not finite, in words."""
    for name, gradient in gradients:
        kind = odd(gradient)
        if kind is not None:
            return f"the gradient of {name!r} has {kind}"
    return None
