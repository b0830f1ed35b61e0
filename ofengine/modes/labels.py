"""Class indices that are none, told before they are trained on.

OneFlow leaves a sample out of ``cross_entropy`` and ``nll_loss`` without a word where its label is
below 0 or not below the number of classes; where it leaves out all, the loss is NaN. To look at
the labels of a step is to wait for the device, so it is done for the first batch of each epoch
and of each evaluation, in graph mode of each compiled step; and for all that follow, to the next
epoch's end, where a loss was read that is not finite.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from math import isfinite
from typing import Any, Callable, Dict, Hashable, Iterator, List, Sequence, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.labels import Source, sources_of_labels
from ofengine._oneflow.operators import functions_by_name
from ofengine.data.structure import flatten
from ofengine.errors import DataError
from ofengine.lines import line_being_run

_LOSSES = {
    "cross_entropy": ("input", "target", "weight", "ignore_index"),
    "nll_loss": ("input", "target", "weight", "ignore_index"),
    "sparse_softmax_cross_entropy": ("labels", "logits"),
}
"""OneFlow's functions that take class indices, and their first arguments."""
_INTEGERS = (flow.int8, flow.int32, flow.int64, flow.uint8)


@attrs.frozen
class _Loss:
    """A call of such a function."""

    name: str
    classes: int
    ignored: Any
    line: str

    def check(self, labels: np.ndarray) -> None:
        """Raise :class:`DataError` for class indices that are none."""
        wrong = (labels < 0) | (labels >= self.classes)
        if self.ignored is not None:
            wrong &= labels != self.ignored
        if not wrong.any():
            return
        values = np.unique(labels[wrong]).tolist()
        some = ", ".join(map(str, values[:8])) + (", ..." if values[8:] else "")
        at = f" at {self.line}" if self.line else ""
        given = "" if self.ignored is None else ", or give ignore_index for what is to be ignored"
        does = "leaves such samples out without a word, and the loss is NaN where no other is left"
        if self.name.startswith("sparse"):
            does = "ends the process over them"
        raise DataError(
            f"{self.name}{at} got {int(wrong.sum())} of {labels.size} labels that are no class: "
            f"{some}, where the {self.classes} classes are 0 to {self.classes - 1}. OneFlow "
            f"{does}: correct the labels or the number of outputs{given}."
        )


_Seen = Callable[[_Loss, Any], None]


class _Teller:
    """Stands where a loss over class indices was, and tells of each call."""

    def __init__(self, name: str, original: Any) -> None:
        self.name, self.original = name, original
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the loss gives; whoever listens in this thread sees its labels before."""
        listeners = getattr(_of_thread, "listeners", ())
        if listeners:
            self._tell(listeners[-1], {**dict(zip(_LOSSES[self.name], args)), **kwargs})
        return self.original(*args, **kwargs)

    def _tell(self, seen: _Seen, given: Dict[str, Any]) -> None:
        labels: Any = given.get("target", given.get("labels"))
        scores: Any = given.get("input", given.get("logits"))
        both = isinstance(labels, flow.Tensor) and isinstance(scores, flow.Tensor)
        if both and labels.dtype in _INTEGERS:
            last = self.name.startswith("sparse")
            classes = scores.shape[-1 if last or scores.ndim == 1 else 1]
            ignored = None if last else given.get("ignore_index", -100)
            seen(_Loss(self.name, int(classes), ignored, line_being_run()), labels)


_of_thread = threading.local()
_lock = threading.Lock()


@contextlib.contextmanager
def _telling(task: nn.Module, seen: _Seen) -> Iterator[None]:
    """In the block, call ``seen(loss, labels)`` for each call of a loss over class indices.

    Whoever looks one up in OneFlow, in a user's module that has imported it, on a layer or on its
    class finds one that tells; it is there as long as a thread is in such a block.
    """
    tellers: List[Tuple[Any, str, _Teller]] = []
    with _lock:
        for holder, key, name in _places(task):
            if not isinstance(vars(holder)[key], _Teller):
                _put(holder, key, _Teller(name, vars(holder)[key]))
            tellers.append((holder, key, vars(holder)[key]))
            tellers[-1][2].users += 1
    listeners = _of_thread.__dict__.setdefault("listeners", [])
    listeners.append(seen)
    try:
        yield
    finally:
        listeners.pop()
        with _lock:
            for _, _, teller in tellers:
                teller.users -= 1
            for holder, key, teller in tellers:  # one may be in several places by now
                if not teller.users and vars(holder).get(key) is teller:
                    _put(holder, key, teller.original)


def _places(task: nn.Module) -> List[Tuple[Any, str, str]]:
    """(holder, name there, name of the loss) of all that hold one, each once."""
    layers = list(task.modules())
    classes = [cls for each in layers for cls in type(each).__mro__]
    names = {cls.__module__ for cls in classes if not cls.__module__.startswith("oneflow")}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    holders = {id(h): h for h in (*modules, *layers, *classes)}
    places: Dict[Tuple[int, str], Tuple[Any, str, str]] = {}
    functions: Dict[int, str] = {}
    for name in _LOSSES:
        for holder, function in functions_by_name(name):
            places[id(holder), name] = (holder, name, name)
            functions[id(_original(function))] = name
    for holder in holders.values():
        for key, value in list(vars(holder).items()):
            known = functions.get(id(_original(value)))
            if known is not None:
                places[id(holder), key] = (holder, key, known)
    return list(places.values())


def _original(function: Any) -> Any:
    return function.original if type(function) is _Teller else function


def _put(holder: Any, key: str, value: Any) -> None:
    if isinstance(holder, nn.Module):
        vars(holder)[key] = value  # nobody is to be told of it
    else:
        setattr(holder, key, value)


def checking(task: nn.Module, mode: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` of eager mode with the labels looked at; that of graph mode, whose traces do so."""

    def checked(*args: Any) -> Any:
        with _telling(task, lambda loss, labels: loss.check(labels.numpy())):
            return step(*args)

    return checked if mode == "eager" else step


class LabelWatch:
    """Says how the next training step is to be called: with its labels looked at, or as it is.

    Args:
        task: the task that trains.
        mode: "eager" or "graph".
        step: ``train_step`` of that mode.
    """

    def __init__(self, task: nn.Module, mode: str, step: Callable[..., Any]) -> None:
        def checked(batch: Any, *args: Any) -> Any:
            _check_batch(task, batch)
            return step(batch, *args)

        self._usual = step
        self._first = checking(task, mode, step)
        self._distrusting = self._first if mode == "eager" else checked
        self._epochs = 0

    def begin_epoch(self) -> Callable[..., Any]:
        """The step for the first batch of an epoch."""
        self._epochs = max(self._epochs - 1, 0)
        return self._distrusting if self._epochs else self._first

    def step(self) -> Callable[..., Any]:
        """The step for those that follow."""
        return self._distrusting if self._epochs else self._usual

    def read(self, loss: Any) -> Callable[..., Any]:
        """As :meth:`step`, where a loss was read.

        One that is not finite has all labels looked at in the rest of this epoch and in the next.
        """
        if not isfinite(loss):
            self._epochs = 2
        return self.step()


# ---------------------------------------------------------------------- compiled steps

_Checks = List[Tuple[_Loss, Source]]
_checks_of: weakref.WeakKeyDictionary[Any, Dict[Hashable, Dict[Hashable, _Checks]]]
_checks_of = weakref.WeakKeyDictionary()
"""Of each task, what its compiled training steps take for labels, by the kind of batch and by the
optimizer that they are of, where there are several."""


@contextlib.contextmanager
def noting_labels(task: nn.Module, graph: nn.Graph, inputs: Sequence[Any]) -> Iterator[None]:
    """While ``graph`` is traced, note its losses; then check the labels in ``inputs``.

    Raises :class:`DataError` as in eager mode. Labels that the step computes from its inputs in
    more than simple ways are not known, and not looked at.
    """
    losses: List[_Loss] = []
    with _telling(task, lambda loss, labels: losses.append(loss)):
        yield
    if not losses:
        return
    tensors: List[Any] = []
    flatten(inputs, tensors)
    sources = sources_of_labels(graph, len(tensors))
    if len(sources) != len(losses):
        return
    checks = [(loss, source) for loss, source in zip(losses, sources) if source is not None]
    if getattr(graph, "step", None) == "training_step":
        key = _key(graph.structure, inputs[0])
        _checks_of.setdefault(task, {}).setdefault(key, {})[graph.extra] = checks
    for loss, source in checks:
        loss.check(source.indices(tensors))


def _check_batch(task: nn.Module, batch: Any) -> None:
    known = _checks_of.get(task)
    if known:
        tensors: List[Any] = []
        structure = flatten(batch, tensors)
        for checks in known.get(_key(structure, tensors), {}).values():
            for loss, source in checks:
                loss.check(source.indices(tensors))


def _key(structure: Any, tensors: Sequence[Any]) -> Hashable:
    return (structure, *[(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
