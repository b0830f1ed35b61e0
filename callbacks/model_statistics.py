"""ModelStatistics: how large gradients and activations are, module by module, in the logs."""

from __future__ import annotations

import fnmatch
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.callback import Callback
from ofengine.checkpoint.checks import check_fits, record, whole
from ofengine.errors import ConfigurationError, quoted
from ofengine.run.arguments import check_choice, check_count, check_flag
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_STATE = record({"step": whole()})
QUANTITIES: Dict[str, Callable[[np.ndarray], Any]] = {
    "norm": lambda x: np.sqrt(np.square(x).sum()),
    "mean": np.mean,
    "std": np.std,
    "max": lambda x: np.abs(x).max(),
    "zeros": lambda x: np.mean(x == 0),
    "not_finite": lambda x: np.mean(~np.isfinite(x)),
}
"""What is said of all numbers of a tensor, in float64."""


class ModelStatistics(Callback):
    """Logs statistics of gradients and activations every so many steps, the same in both modes.

    ``gradients/<module>/norm`` and so on: of the parameters that are the module's own, the gradient
    of the batch's loss, before clipping and before any weight by accumulation.
    ``activations/<module>/...``: of all tensors that a module without submodules put out. Where
    that is due, before the step, the batch is computed once more by itself, eagerly, with the same
    weights and random numbers, and all that this did is undone: training is what it would be
    without. So it costs the time of one more eager step, a copy of the model, and the numbers of
    all activations in the memory of the process, every ``every_n_steps`` steps; nothing in between.

    Of several optimizers the steps of those whose turn it is are computed, all with the weights of
    before the batch: a parameter's gradient is that of its own optimizer's loss, and activations
    are those of all these steps.

    Quantities, in float64 of all numbers: "norm" (the 2-norm), "mean", "std" (of all, not of a
    sample), "max" (of absolute values), "zeros" and "not_finite" (shares from 0 to 1).

    Args:
        every_n_steps: optimizer steps from one look to the next. Default: the Trainer's
            ``log_every_n_steps``. With accumulation, the first batch of a step counts.
        gradients: those of gradients.
        activations: those of activations.
        by: "module", or "group" for gradients of each parameter group.
        modules: patterns (``*`` and ``?``) of names of modules; others are left out.
        quantities: some of those above. Default: all.

    Raises:
        ConfigurationError: at once for a wrong argument; at ``fit`` for a pattern that fits no
            module, and on several ranks.
    """

    def __init__(
        self,
        every_n_steps: Optional[int] = None,
        gradients: bool = True,
        activations: bool = True,
        by: str = "module",
        modules: Union[str, Sequence[str]] = "*",
        quantities: Sequence[str] = tuple(QUANTITIES),
    ) -> None:
        own = "ModelStatistics: "
        if every_n_steps is not None:
            check_count(
                own + "every_n_steps", every_n_steps, 1, "a whole number from 1 on, or None"
            )
        self.every_n_steps = every_n_steps
        self.gradients = check_flag(own + "gradients", gradients)
        self.activations = check_flag(own + "activations", activations)
        if not gradients and not activations:
            raise ConfigurationError(
                "ModelStatistics(gradients=False, activations=False) would log nothing: leave one "
                "of them on."
            )
        self.by = check_choice(own + "by", by, ("module", "group"))
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        self.quantities = [quantities] if isinstance(quantities, str) else list(quantities)
        for name in self.quantities:
            check_choice(own + "quantities", name, QUANTITIES)
        self._every = 1
        self._step = -1
        """The step that was looked at last."""

    def state_dict(self) -> Dict[str, Any]:
        """The step that was looked at last: a resumed run does not look at it again."""
        return {"step": self._step} if self._step >= 0 else {}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a ModelStatistics."""
        check_fits(state, _STATE, "the state of ModelStatistics is wrong")

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from there."""
        self._step = state["step"]

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Begin anew."""
        if stage == "fit":
            self._step = -1

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Check that there is something to look at."""
        if trainer.world_size > 1:
            raise ConfigurationError(
                "ModelStatistics computes the step of one process, and several ranks train "
                "together: leave it out, or train with devices=1."
            )
        names = [name for name, _ in task.named_modules() if name]
        for pattern in self.modules:
            if not fnmatch.filter(names, pattern):
                raise ConfigurationError(
                    f"ModelStatistics(modules={pattern!r}): no module of {type(task).__name__} is "
                    f"called so; it has {quoted(names, most=10)}."
                )
        self._every = self.every_n_steps or trainer.log_every_n_steps

    def on_train_batch_start(
        self, trainer: RunView, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Where it is due, compute the step that is to come, and log what was seen of it."""
        step = trainer.global_step
        if step % self._every or step == self._step:
            return
        self._step = step
        seen: Dict[str, List[np.ndarray]] = {}
        with trainer.leaving_no_trace() as compute:
            if self.activations:
                self._listen(task, seen)
            loss = compute(batch, batch_idx)
            if self.gradients:
                loss.backward()
                for name, parameters in self._owners(trainer, task):
                    arrays = [p.grad.numpy() for p in parameters if p.grad is not None]
                    if arrays:
                        seen[f"gradients/{name}"] = arrays
        trainer.log_metrics(
            {
                f"{name}/{quantity}": value
                for name, arrays in seen.items()
                for quantity, value in self._statistics(arrays).items()
            }
        )

    def _listen(self, task: TaskModule, seen: Dict[str, List[np.ndarray]]) -> None:
        for name, module in task.named_modules():
            if name and not list(module.children()) and self._wants(name):
                arrays = seen.setdefault(f"activations/{name}", [])
                module.register_forward_hook(_noting(arrays))

    def _owners(self, trainer: RunView, task: TaskModule) -> List[Tuple[str, List[Any]]]:
        """Whose gradients are taken together."""
        if self.by == "group":
            groups = zip(trainer.rates.names, trainer.param_groups)
            return [(name, list(group.parameters)) for name, group in groups]
        return [
            (name or "task", list(module.parameters(recurse=False)))
            for name, module in task.named_modules()
            if self._wants(name)
        ]

    def _wants(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.modules)

    def _statistics(self, arrays: List[np.ndarray]) -> Dict[str, float]:
        if not arrays:
            return {}
        numbers = np.concatenate([each.reshape(-1) for each in arrays]).astype(np.float64)
        if not numbers.size:
            return {}
        with np.errstate(all="ignore"):  # of what is not finite, nothing is
            return {name: float(QUANTITIES[name](numbers)) for name in self.quantities}


def _noting(arrays: List[np.ndarray]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, flow.Tensor):
            if outputs.is_floating_point():
                arrays.append(np.array(outputs.detach().numpy()))  # what follows may write into it
        elif isinstance(outputs, (list, tuple)):
            for each in outputs:
                note(module, inputs, each)
        elif isinstance(outputs, dict):
            note(module, inputs, list(outputs.values()))

    return note
