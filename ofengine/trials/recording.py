"""What a proof writes down of a run: every batch of it to the bit, and one step in full."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import attrs
import numpy as np
import oneflow as flow

from ofengine._oneflow.session import synchronize
from ofengine._oneflow.tracing import module_of
from ofengine.callback import Callback
from ofengine.run.view import RunView
from ofengine.task import TaskModule

QUANTITIES = ("data", "loss", "weights", "metrics", "rates")
"""What is compared of a batch: the batch itself, its loss, all parameters and buffers, the logged
values, the rate of every group."""
_OUTPUTS = "outputs of modules, for ofengine's proof"


@attrs.frozen
class Record:
    """A training batch: its number and optimizer step, from 1, and bits by quantity and name."""

    batch: int
    step: int
    values: Mapping[str, Mapping[str, bytes]]


class Recorder(Callback):
    """Records every training batch of a run.

    Args:
        save_to: where to save a checkpoint on the way, or None.
        save_after: how many optimizer steps are done before that.
        whole_at: the batch, from 1, of which all numbers are kept; none after it is recorded, and
            the run stops there, unless it has to go on. None for none.
    """

    fires_last = True
    watches_losses = True

    def __init__(
        self, save_to: Optional[Path] = None, save_after: int = 0, whole_at: Optional[int] = None
    ) -> None:
        self.records: List[Record] = []
        self.arrays: Dict[str, np.ndarray] = {}
        """Every parameter and buffer after the batch ``whole_at``."""
        self.outputs: Dict[str, np.ndarray] = {}
        """What the modules put out for it, by name, in the order of their calls."""
        self.attributes: Dict[str, str] = {}
        """Every number, text and flag that is an attribute of the task or of a module, then."""
        self.saved_at: Optional[int] = None
        """The batch after which the checkpoint was saved."""
        self._save_to, self._save_after, self._whole_at = save_to, save_after, whole_at
        self._steps = 0

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Steps are counted from where the run begins."""
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch; save after it, or stop, where that was asked for."""
        if self._whole_at is not None and trainer.batches_seen > self._whole_at:
            return
        trainer.settle()
        synchronize()  # a graph's run is not waited for by reading what it writes
        closed, self._steps = trainer.global_step > self._steps, trainer.global_step
        step, number = self._steps + (not closed), trainer.batches_seen
        rates = zip(trainer.rates.groups, trainer.rates.rates(step - 1))
        values = {
            "data": {"batch": digest(batch)},
            "loss": {"loss": outputs["loss"].numpy().tobytes()},
            "weights": {name: digest(tensor) for name, tensor in tensors_of(task).items()},
            "metrics": {n: struct.pack("d", v) for n, v in trainer.callback_metrics.items()},
            "rates": {group.name: struct.pack("d", rate) for group, rate in rates},
        }
        self.records.append(Record(number, step, values))
        if number == self._whole_at:
            self.arrays = {name: array_of(each) for name, each in tensors_of(task).items()}
            self.attributes = plain_attributes(task)
            recorded = {"": outputs} if _OUTPUTS in outputs else outputs  # or of each optimizer
            self.outputs = {
                f"{name} in the step of {owner}" if owner else name: array_of(each)
                for owner, of_step in recorded.items()
                if isinstance(of_step, dict)
                for name, each in of_step.get(_OUTPUTS, {}).items()
            }
            trainer.should_stop = True
        # With accumulation, in the middle of a window.
        accumulates = trainer.accumulate_grad_batches > 1
        due = self._steps >= self._save_after and not (accumulates and closed)
        if self._save_to is not None and self.saved_at is None and due:
            trainer.save_checkpoint(self._save_to)
            self.saved_at = number


def tensors_of(task: TaskModule) -> Dict[str, Any]:
    """Every parameter and buffer of ``task`` by name."""
    return {**dict(task.named_parameters()), **dict(task.named_buffers())}


def plain_attributes(task: TaskModule) -> Dict[str, str]:
    """Every number, text and flag on ``task`` and its modules, as "self.layer.name"."""
    return {
        ".".join(filter(None, ("self", path, name))): repr(value)
        for path, module in task.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and not name.startswith("_")
    }


def array_of(tensor: Any) -> np.ndarray:
    """A copy of the numbers of ``tensor``."""
    array: np.ndarray = tensor.detach().numpy().copy()
    return array


def digest(value: Any) -> bytes:
    """What tells the content of a batch or tensor from any other: 16 bytes."""
    total = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        total.update(part)
    return total.digest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, flow.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, dict):
        for key, each in value.items():
            yield repr(key).encode()
            yield from _parts(each)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for each in value:
            yield from _parts(each)
    elif isinstance(value, (int, float, str, bytes, type(None))):
        yield repr(value).encode()
    else:  # its text may hold an address
        yield type(value).__qualname__.encode()


# ---------------------------------------------------------------------- outputs of modules


class _Seen:
    """Outputs by name. An object of the engine: what a trace puts into a user's is taken out."""

    def __init__(self) -> None:
        self.outputs: Dict[str, Any] = {}


@contextlib.contextmanager
def recording_outputs(task: TaskModule) -> Iterator[None]:
    """Have ``training_step`` return besides what each module within ``task`` puts out.

    No hooks: graphs do not call them. Subclasses, not attributes: a trace calls some modules by
    their class. What a step returns comes out of a graph as out of eager mode. A step or forward
    that is an attribute of its object is left as it is, and tells nothing.
    """
    cls = type(task)
    seen = _Seen()
    kept: List[Tuple[Any, type]] = [(module, type(module)) for module in task.modules()]
    for name, module in task.named_modules():
        if name and "forward" not in vars(module):
            forward = _recording(name, type(module).forward, seen)
            module.__class__ = _with(type(module), forward=forward)

    @functools.wraps(cls.training_step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.outputs.clear()
        returned = cls.training_step(self, *args, **kwargs)
        parts = dict(returned) if isinstance(returned, dict) else {"loss": returned}
        return {**parts, _OUTPUTS: dict(seen.outputs)}

    if "training_step" not in vars(task):
        task.__class__ = _with(cls, training_step=training_step)
    try:
        yield
    finally:
        for module, own in kept:
            module.__class__ = own


def _with(cls: type, **methods: Any) -> Any:
    """A subclass that passes for ``cls``, with other methods."""
    told = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**told, **methods})


def _recording(name: str, forward: Any, seen: _Seen) -> Callable[..., Any]:
    @functools.wraps(forward)
    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        label = f"{name} ({type(module_of(self)).__name__})"
        _note(output, label, seen.outputs)
        return output

    return record


def _note(output: Any, label: str, seen: Dict[str, Any]) -> None:
    if isinstance(output, flow.Tensor):
        calls, key = 1, label
        while key in seen:
            calls += 1
            key = f"{label}, call {calls}"
        seen[key] = output.detach().clone()  # what follows may write into it
    elif isinstance(output, (list, tuple)):
        for each in output:
            _note(each, label, seen)
    elif isinstance(output, dict):
        for each in output.values():
            _note(each, label, seen)
