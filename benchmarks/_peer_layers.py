"""What the layers of a step take in PyTorch and in OneFlow, one by one."""

from __future__ import annotations

import importlib
import time
import warnings
from typing import Any, Callable, Dict, List, Tuple

from _peers import BATCH, network, sgd, synchronizer


def operators(framework_name: str, name: str, rounds: int) -> Dict[str, List[float]]:
    """Of each kind of layer: how many, and milliseconds of forward and backward in a step.

    The loss and the optimizer's step are among them.
    """
    warnings.filterwarnings("ignore")
    framework = importlib.import_module(framework_name)
    nn = importlib.import_module(f"{framework_name}.nn")
    model = network(name, nn)
    loss_fn = nn.CrossEntropyLoss()
    images = framework.randn(BATCH, 3, 32, 32)
    labels = framework.zeros(BATCH, dtype=framework.int64)
    times = LayerTimes(framework, model, lambda: loss_fn(model(images), labels).backward())
    optimizer = sgd(framework, model.parameters())
    found = times.by_class(rounds)
    logits = framework.randn(BATCH, 10).requires_grad_()
    found["loss"] = [1, times.timed(lambda: loss_fn(logits, labels).backward(), rounds)]
    found["optimizer"] = [1, times.timed(optimizer.step, rounds)]
    return found


class LayerTimes:
    """What each kind of layer takes in a step of ``model``.

    Each layer by itself, on random numbers of the shape that it sees in the network; the fastest
    of some runs after one more: what disturbs a layer only makes it slower.

    Args:
        framework: the module ``torch`` or ``oneflow``.
        model: the network.
        step: its forward and backward pass.
    """

    def __init__(self, framework: Any, model: Any, step: Callable[[], Any]) -> None:
        self._framework = framework
        self._synchronize = synchronizer(framework)
        self._calls: List[Tuple[Any, Tuple[int, ...], bool]] = []
        leaves = [layer for layer in model.modules() if not list(layer.children())]
        for layer in leaves:
            if getattr(layer, "inplace", False):
                layer.inplace = False  # refused on the random numbers, which are leaves
            layer.register_forward_hook(self._note)
        step()
        for layer in leaves:
            layer._forward_hooks.clear()  # OneFlow gives no handle to remove one by
        self._first = self._calls[0][1]

    def _note(self, layer: Any, inputs: Any, outputs: Any) -> None:
        x = inputs[0]
        self._calls.append((layer, tuple(x.shape), "float" in str(x.dtype)))

    def by_class(self, rounds: int) -> Dict[str, List[float]]:
        """Of each kind: how many, and milliseconds of forward and backward in a step."""
        found: Dict[str, List[float]] = {}
        known: Dict[Any, float] = {}
        for layer, shape, is_float in self._calls:
            key = repr(layer), shape
            if key not in known:
                known[key] = self._forward_and_backward(layer, shape, is_float, rounds)
            row = found.setdefault(_class_of(layer), [0, 0.0])
            row[0] += 1
            row[1] += known[key]
        return found

    def timed(self, run: Callable[[], Any], rounds: int) -> float:
        """The fastest of so many runs, in milliseconds."""
        taken = []
        for _ in range(rounds + 1):
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            taken.append((time.perf_counter() - start) * 1e3)
        return min(taken[1:])

    def _forward_and_backward(
        self, layer: Any, shape: Tuple[int, ...], is_float: bool, rounds: int
    ) -> float:
        framework = self._framework
        x = framework.randn(*shape) if is_float else framework.zeros(*shape, dtype=framework.int64)
        if is_float and shape != self._first:  # nobody asks for the gradient of the images
            x.requires_grad_()
        gradient = framework.ones(*_output(layer(x)).shape)
        if not x.requires_grad and not list(layer.parameters()):
            return self.timed(lambda: layer(x), rounds)
        return self.timed(lambda: _output(layer(x)).backward(gradient), rounds)


def _output(given: Any) -> Any:
    return given[0] if isinstance(given, tuple) else given


_OF_THEIR_OWN = ("LayerNorm", "GELU", "SiLU", "Hardswish", "LSTM", "Embedding", "Attention")


def _class_of(layer: Any) -> str:
    name = type(layer).__name__
    if name == "Conv2d":
        if layer.groups > 1:
            return "depthwise convolutions"
        return "1x1 convolutions" if tuple(layer.kernel_size) == (1, 1) else "other convolutions"
    known = {"BatchNorm2d": "batch norms", "Linear": "linear layers"}
    if name in _OF_THEIR_OWN:
        return name
    return known.get(name, "ReLU and ReLU6" if name.startswith("ReLU") else "other layers")
