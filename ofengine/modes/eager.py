"""Eager mode: each operation runs as Python reaches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Tuple

import oneflow as flow
from oneflow import Tensor
from oneflow.optim import Optimizer

from ofengine import _oneflow
from ofengine.hooks import HookRunner
from ofengine.modes.steps import clip_in_groups, split_outputs, step_arity

if TYPE_CHECKING:
    from ofengine.task import TaskModule
    from ofengine.trainer import Trainer


class EagerMode:
    """Runs the steps of one task eagerly."""

    def __init__(self, trainer: Trainer, task: TaskModule, hooks: HookRunner) -> None:
        self._trainer = trainer
        self._task = task
        self._before_backward = hooks.calls["on_before_backward"]
        self._after_backward = hooks.calls["on_after_backward"]
        self._before_update = hooks.calls["on_before_optimizer_step"]
        self._before_zero_grad = hooks.calls["on_before_zero_grad"]
        self._arity: Dict[str, int] = {}
        self._task_name = type(task).__name__

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """Forward and backward of one batch; the update where it ``closes`` its window."""
        rest: Dict[str, Any] = {}
        step: Callable[..., Any] = self._task.training_step
        loss = step(batch, batch_idx) if self._takes_both else step(batch)
        if type(loss) is not Tensor or loss.dim() or not loss.requires_grad:
            loss, rest = split_outputs(loss, self._task_name)
        for call in self._before_backward:
            call(loss)
        _oneflow.backward_of(loss if window == 1 else loss / window)
        for call in self._after_backward:
            call()
        if closes:
            optimizer = self._optimizer
            for call in self._before_update:
                call(optimizer)
            if self._trainer.gradient_clip_val is not None:
                self._trainer.clip()
            if self._clips_groups:
                clip_in_groups(optimizer)
            optimizer.step()
            for call in self._before_zero_grad:
                call(optimizer)
            optimizer.zero_grad(set_to_none=True)
        rest["loss"] = loss.detach()
        return rest

    def start(self, optimizer: Optimizer) -> None:
        """Training with ``optimizer`` is about to begin."""
        self._optimizer = optimizer
        self._takes_both = step_arity(self._task, "training_step", 2) == 2
        optimizer.zero_grad(set_to_none=True)  # what a run that was cut off left behind
        self._clips_groups = any("clip_grad_max_norm" in g for g in optimizer.param_groups)

    def optimizer_state(self) -> Tuple[int, _oneflow.ParameterStates]:
        """The optimizer's steps, and what it keeps of each parameter by name; live memory."""
        names = {id(p): name for name, p in self._task.named_parameters()}
        return _oneflow.optimizer_state(self._trainer.optimizer, names)

    def load_optimizer_state(self, steps: int, states: _oneflow.ParameterStates) -> None:
        """Go on from what :meth:`optimizer_state` of either mode gave."""
        parameters = dict(self._task.named_parameters())
        _oneflow.load_optimizer_state(self._trainer.optimizer, parameters, steps, states)

    def gradients(self) -> Dict[str, Any]:
        """What an accumulation window that is not closed yet has added up, by parameter."""
        return {n: p.grad for n, p in self._task.named_parameters() if p.grad is not None}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """Go on from what :meth:`gradients` of either mode gave."""
        for name, parameter in self._task.named_parameters():
            parameter.grad = gradients.get(name)

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """``validation_step``, ``test_step`` or ``predict_step`` on one batch, no gradients."""
        with flow.no_grad():
            return self._call(step, batch, batch_idx, dataloader_idx)

    def rebuild(self, reason: str) -> None:
        """Write the rates into the groups now; all else is made anew at every step anyway."""
        self._trainer.rates.write(self._trainer.global_step)

    def settle(self) -> None:
        """Nothing to bring up to date."""

    def close(self) -> None:
        """Nothing to let go of."""

    def _call(self, step: str, *args: Any) -> Any:
        arity = self._arity.get(step)
        if arity is None:
            arity = self._arity[step] = step_arity(self._task, step, len(args))
        return getattr(self._task, step)(*args[:arity])
