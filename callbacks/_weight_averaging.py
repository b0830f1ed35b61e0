"""What callbacks share that average the weights: the averages, and evaluation with them."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine.callback import Callback
from ofengine.checkpoint.checks import array, by_name, check_fits, listed, record, text, whole
from ofengine.errors import CheckpointError, ConfigurationError, quoted
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")

_STATE = record({"averaged": by_name(array("f")), "count": whole()}, {"without": listed(text)})


class WeightAveraging(Callback):
    """Averages of the task's trainable parameters, that evaluation may run with.

    A subclass calls :meth:`_update` when it is time.
    """

    include_buffers: bool
    """Whether floating-point buffers are averaged too."""
    evaluate: bool
    """Whether validation, test and prediction run with the averages."""
    averages_frozen = False
    """Whether what does not train is averaged too."""

    def __init__(self) -> None:
        self._stage = ""
        self._kept: List[Tuple[Any, Any]] = []
        self._forget()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _forget(self) -> None:
        self.count = 0
        self._names: List[str] = []
        self._average: Dict[str, Any] = {}
        self._loaded: Optional[Dict[str, np.ndarray]] = None
        self._loaded_without: List[str] = []
        self._flats: List[_Flat] = []
        self._trained: Optional[List[int]] = None
        """Whose weights are averaged, in which epoch."""
        self._left: Optional[bytes] = None

    @property
    def averaged(self) -> Dict[str, Any]:
        """A copy of the average of each parameter (and buffer), by name; empty before the first."""
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def copy_to(self, task: nn.Module) -> None:
        """Write the averages into ``task``, a module with parameters of these names and shapes.

        Raises :class:`ConfigurationError` where there are no averages yet, or ``task`` lacks one.
        """
        if not self._average:
            raise ConfigurationError(
                f"{self._name}.copy_to(): nothing was averaged yet; call it during or after "
                "a fit that has come to the first average."
            )
        own = self._tensors_of(task)
        for name, tensor in self._average.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ConfigurationError(
                    f"{self._name}.copy_to(): {type(task).__name__} has no {name!r} of the "
                    f"shape {tuple(tensor.shape)}: give a task of the class that was trained."
                )
        _copy([(own[name], tensor) for name, tensor in self._average.items()])

    # ------------------------------------------------------------------ state

    def state_dict(self) -> Dict[str, Any]:
        """The averages, their count, and the names of what has no average, being frozen so far."""
        without = [name for name in self._names if name not in self._average]
        return {"averaged": self.averaged, "count": self.count, "without": without}

    def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
        """Raise :class:`CheckpointError` where ``state`` holds no averages of this ``task``."""
        check_fits(state, _STATE, f"the state of {self._name} is wrong")
        averaged = state["averaged"]
        if averaged:
            # Files of earlier versions do not say what is without: that shows in on_fit_start.
            self._check(self._tensors_of(task), averaged, state.get("without"))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Keep ``state`` for ``on_fit_start``, which knows the task's device and its shapes."""
        if isinstance(state.get("averaged"), dict):
            averaged = {
                name: np.array(each.numpy() if isinstance(each, flow.Tensor) else each)
                for name, each in state["averaged"].items()
            }
            state = {**state, "averaged": averaged}
        check_fits(state, _STATE, f"the state of {self._name} is wrong")
        self.count = state["count"]
        self._loaded = state["averaged"]
        self._loaded_without = list(state.get("without", []))

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Take over what was loaded, where it fits the task."""
        own = self._tensors_of(task)
        self._names = list(own)
        if not self._loaded:
            return
        loaded, self._loaded = self._loaded, None
        self._check(own, loaded, self._loaded_without)
        self._average = {
            name: flow.tensor(loaded[name], dtype=own[name].dtype).to(own[name].device)
            for name in own
            if name in loaded
        }

    def _check(
        self, own: Dict[str, Any], loaded: Dict[str, np.ndarray], kept: Optional[Sequence[str]]
    ) -> None:
        """Do averages fit the tensors of a task? ``kept``: the names of what has none so far."""
        extra = sorted(set(loaded) - set(own))
        without = {name for name, tensor in own.items() if not _trains(tensor)}
        without |= set(own) if kept is None else set(kept)
        missing = sorted(set(own) - set(loaded) - without)
        start = f"the averages of {self._name} belong to another model"
        if extra or missing:
            raise CheckpointError(
                f"{start} or another include_buffers: they lack {quoted(missing)} of what is "
                f"averaged here, and have {quoted(extra)} beside it."
            )
        for name, values in loaded.items():
            if values.shape != tuple(own[name].shape):
                raise CheckpointError(
                    f"{start}: {name!r} has the shape {values.shape} there and "
                    f"{tuple(own[name].shape)} here."
                )
            if values.dtype != own[name].numpy().dtype:
                raise CheckpointError(
                    f"{start}: {name!r} holds {values.dtype} numbers there and "
                    f"{own[name].numpy().dtype} here."
                )

    # ------------------------------------------------------------------ averaging

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Start anew where training does."""
        self._stage = stage
        evaluating = [e for e in trainer.callbacks if isinstance(e, WeightAveraging)]
        if sum(each.evaluate for each in evaluating) > 1:
            raise ConfigurationError(
                f"an evaluation can run with the averages of one {self._name} only: give the "
                "others evaluate=False."
            )
        if stage == "fit":
            self._forget()

    def _update(self, trainer: RunView, task: TaskModule, decay: Optional[float] = None) -> None:
        """Take the weights of now into the averages; what is new is copied.

        With ``decay``: ``average = decay * average + (1 - decay) * w``. Without, all updates count
        the same: ``average += (w - average) / updates``.
        """
        joining: List[Tuple[Any, Any]] = []
        parameters = [p for g in trainer.param_groups for p in g.parameters if p.requires_grad]
        trained = [trainer.current_epoch, *map(id, parameters)]
        if trained != self._trained:
            self._trained = trained
            joining = self._follow(task, parameters)
        self.count += 1
        with flow.no_grad():
            for flat in self._flats:
                flat.update(decay, self.count)
        _copy(joining)

    def _follow(self, task: TaskModule, parameters: List[Any]) -> List[Tuple[Any, Any]]:
        """Average what trains now, and all that did; return the new averages and their weights.

        The weights of all parameters are averaged as one long vector, which costs a handful of
        operations instead of some for each parameter.
        """
        own = self._tensors_of(task)
        training = {id(parameter) for parameter in parameters}
        modules = dict(task.named_modules())

        def is_followed(name: str, tensor: Any) -> bool:
            trains = not isinstance(tensor, nn.Parameter) or id(tensor) in training
            return trains or self.averages_frozen or name in self._average

        by_dtype: Dict[Any, List[str]] = {}
        for name, tensor in own.items():
            if is_followed(name, tensor):
                by_dtype.setdefault(tensor.dtype, []).append(name)
        average: Dict[str, Any] = {}
        self._flats = []
        for names in by_dtype.values():
            owners = [modules[name.rpartition(".")[0]] for name in names]
            sources = [(owner, name.rpartition(".")[2]) for owner, name in zip(owners, names)]
            flat = _Flat(sources, [self._average.get(name, own[name]) for name in names])
            self._flats.append(flat)
            average.update(zip(names, flat.averages))
        new = [name for name in average if name not in self._average]
        self._average = {name: average[name] for name in own if name in average}
        return [(self._average[name], own[name]) for name in new]

    def _tensors_of(self, task: nn.Module) -> Dict[str, Any]:
        """The live tensors that can be averaged, by name."""
        tensors = dict(task.named_parameters())
        if self.include_buffers:
            tensors.update(
                (name, buffer)
                for name, buffer in task.named_buffers()
                if buffer.is_floating_point()
            )
        return tensors

    def _clones(self, task: nn.Module) -> Dict[str, Any]:
        """Copies of the task's own tensors that there are averages of, by name."""
        own = self._tensors_of(task)
        with flow.no_grad():
            return {name: own[name].clone() for name in self._average}

    # ------------------------------------------------------------------ evaluating

    def on_validation_start(self, trainer: RunView, task: TaskModule) -> None:
        """Put the averages in the place of the weights."""
        if not self.evaluate or not self._average or self._kept:
            return
        if self._stage != "fit" and _fingerprint(task) != self._left:
            log.info(
                "%s: %s uses the task's weights as they are, not the averages: they are not those "
                "that training ended with.",
                self._name,
                self._stage,
            )
            return
        own, kept = self._tensors_of(task), self._clones(task)
        self._kept = [(own[name], tensor) for name, tensor in kept.items()]
        trainer.set_weights_aside(kept)  # complete before the first weight is overwritten
        _copy([(own[name], tensor) for name, tensor in self._average.items()])

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Put the weights back."""
        self._restore(trainer)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """Take note of the weights that training ends with."""
        if self.evaluate and self._average:
            self._left = _fingerprint(task)

    def on_exception(self, trainer: RunView, task: TaskModule, exception: BaseException) -> None:
        """Put the weights back, where the exception came in the middle of an evaluation."""
        self._restore(trainer)

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Put the weights back, and let go of the task; the averages stay."""
        self._restore(trainer)
        self._flats, self._trained = [], None

    def _restore(self, trainer: RunView) -> None:
        if self._kept:
            _copy(self._kept)
            self._kept = []
            trainer.set_weights_aside({})


class _Flat:
    """Tensors of one dtype, averaged as one vector.

    Args:
        sources: where each is: a module and the name of its parameter or buffer.
        averages: the averages so far, in the same order.
    """

    def __init__(self, sources: Sequence[Tuple[nn.Module, str]], averages: Sequence[Any]) -> None:
        with flow.no_grad():
            self._average = flow.cat(_vectors(averages))
        self.averages: List[Any] = []
        start = 0
        for each in averages:
            part = self._average.narrow(0, start, each.numel())
            self.averages.append(part.view(*each.shape))
            start += each.numel()
        self._sources = list(sources)

    def update(self, decay: Optional[float], count: int) -> None:
        """One update of all averages, the ``count``-th."""
        # Looked up anew: a buffer may be assigned in a step, a parameter's data in a hook.
        tensors = [getattr(module, name) for module, name in self._sources]
        now = flow.cat(_vectors(tensors))
        if decay is None:  # in this form, what does not change stays as it is to the bit
            self._average.add_(now - self._average, alpha=1.0 / count)
        else:
            self._average.mul_(decay).add_(now, alpha=1.0 - decay)


def _vectors(tensors: Sequence[Any]) -> List[Any]:
    """Views of ``tensors`` as vectors, or copies of those that have no such view."""
    with flow.no_grad():  # and not detach(): of a view, that may view the wrong numbers
        return [tensor.reshape(-1) for tensor in tensors]


def _trains(tensor: Any) -> bool:
    return not isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _copy(pairs: Sequence[Tuple[Any, Any]]) -> None:
    """Write the second tensor of each pair into the first."""
    with flow.no_grad():
        for to, tensor in pairs:
            to.copy_(tensor)


def _fingerprint(task: nn.Module) -> bytes:
    """What tells whether the task's parameters are still the same."""
    digest = hashlib.blake2b()
    for name, parameter in task.named_parameters():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(parameter.numpy()).tobytes())
    return digest.digest()
