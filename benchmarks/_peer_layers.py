"""What the layers of a step take in PyTorch and in OneFlow, one by one."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from typing import Any, Callable, Dict, List, Tuple

from _peers import BATCH, network, sgd, synchronizer


def operators(framework_name: str, name: str, rounds: int) -> Dict[str, List[float]]:
    """Of each kind of layer: how many, and milliseconds of forward and backward in a step.

    Each layer by itself, on random numbers of the shape that it sees in the network; the median of
    ``rounds`` runs after one more.
    """
    warnings.filterwarnings("ignore")
    framework = importlib.import_module(framework_name)
    nn = importlib.import_module(f"{framework_name}.nn")
    model = network(name, nn)
    loss_fn = nn.CrossEntropyLoss()
    synchronize = synchronizer(framework)
    met: List[Tuple[Any, Tuple[int, ...]]] = []

    def note(layer: Any, inputs: Any, outputs: Any) -> None:
        met.append((layer, tuple(inputs[0].shape)))

    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    labels = framework.zeros(BATCH, dtype=framework.int64)
    loss_fn(model(framework.randn(BATCH, 3, 32, 32)), labels).backward()
    calls, optimizer = list(met), sgd(framework, model.parameters())

    def timed(run: Callable[[], Any]) -> float:
        taken = []
        for _ in range(rounds + 1):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            taken.append((time.perf_counter() - start) * 1e3)
        return statistics.median(taken[1:])

    def forward_and_backward(layer: Any, shape: Tuple[int, ...]) -> float:
        x = framework.randn(*shape)
        if shape[1:] != (3, 32, 32):  # nobody asks for the gradient of the images
            x.requires_grad_()
        gradient = framework.ones(*layer(x).shape)
        if not x.requires_grad and not list(layer.parameters()):
            return timed(lambda: layer(x))
        return timed(lambda: layer(x).backward(gradient))

    found: Dict[str, List[float]] = {}
    known: Dict[Tuple[str, Tuple[int, ...]], float] = {}
    for layer, shape in calls:
        key = repr(layer), shape
        if key not in known:
            known[key] = forward_and_backward(layer, shape)
        row = found.setdefault(_class_of(layer), [0, 0.0])
        row[0] += 1
        row[1] += known[key]
    logits = framework.randn(BATCH, 10).requires_grad_()
    found["loss"] = [1, timed(lambda: loss_fn(logits, labels).backward())]
    found["optimizer"] = [1, timed(optimizer.step)]
    return found


def _class_of(layer: Any) -> str:
    name = type(layer).__name__
    if name == "Conv2d":
        if layer.groups > 1:
            return "depthwise convolutions"
        return "1x1 convolutions" if tuple(layer.kernel_size) == (1, 1) else "other convolutions"
    known = {"BatchNorm2d": "batch norms", "Linear": "linear layers"}
    return known.get(name, "ReLU and ReLU6" if name.startswith("ReLU") else "other layers")
