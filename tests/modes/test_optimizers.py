"""How far the modes are apart with every optimizer, and why.

Most optimizers run through the same kernels in both modes, which differ in nothing: equal bits
are asked for. The exception is bias correction, ``1 - beta ** step``, of Adam, AdamW and LAMB:
OneFlow's eager optimizers compute it in Python, in float64, and round it; a graph computes
``beta ** step`` by repeated squaring in float32 (``Fastpow`` in model_update_kernel_util.cpp).
With beta2 = 0.999 the factor of the first steps is 0.001 and its rounding error 6e-5 of it, so
a step is up to 3e-5 of itself apart, at first. Both ways are retraced here in numpy, to the bit.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    assert_same_weights,
    fill_deterministically,
    image_batches,
    largest_difference,
    quiet_trainer,
    weights_of,
)
from oneflow import nn

from ofengine import TaskModule

Make = Callable[[Any], Any]

SAME_BITS: Dict[str, Make] = {
    "SGD, maximize": lambda g: flow.optim.SGD(g, lr=0.01, momentum=0.9, maximize=True),
    "RMSprop": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, weight_decay=0.1),
    "RMSprop, centered": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, centered=True),
    "Adagrad": lambda g: flow.optim.Adagrad(
        g, lr=0.05, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5
    ),
    "Adadelta": lambda g: flow.optim.Adadelta(g, lr=1.0, weight_decay=0.1),
    "Adam without bias correction": lambda g: flow.optim.Adam(g, 0.01, do_bias_correction=False),
    "AdamW without bias correction": lambda g: flow.optim.AdamW(
        g, 0.01, weight_decay=0.1, amsgrad=True, do_bias_correction=False
    ),
    "LAMB without bias correction": lambda g: flow.optim.LAMB(
        g, 0.01, weight_decay=0.1, do_bias_correction=False
    ),
}

# After the 12 steps of the test below, at lr=0.01; seen 1e-6 and less.
APART = 5e-6
BIAS_CORRECTED: Dict[str, Make] = {
    "Adam": lambda g: flow.optim.Adam(g, lr=0.01),
    "Adam, weight decay": lambda g: flow.optim.Adam(g, lr=0.01, weight_decay=0.1),
    "Adam, amsgrad": lambda g: flow.optim.Adam(g, lr=0.01, amsgrad=True),
    "AdamW": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    "AdamW, amsgrad": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1, amsgrad=True),
    "LAMB": lambda g: flow.optim.LAMB(g, lr=0.01, weight_decay=0.1),
    "LAMB, L2 penalty": lambda g: flow.optim.LAMB(g, 0.01, weight_decay=0.1, adam_w_mode=False),
}


class Classifier(TaskModule):
    """A small net in two groups, one of them with a scaled and decaying rate."""

    def __init__(self, make: Make, bias: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(36, 5)
        self.make = make
        fill_deterministically(self, spread=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.body(images)), labels)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": self.body.parameters(), "lr_scale": 0.5, "lr_decay_scale": 0.9},
            {"params": self.head.parameters()},
        ]

    def configure_optimizers(self) -> Any:
        return self.make(self.param_groups())


def in_both_modes(make: Make, bias: bool = False, **asked: Any) -> List[Classifier]:
    tasks = []
    for mode in ("eager", "graph"):
        task = Classifier(make, bias)
        quiet_trainer(mode=mode, max_epochs=3, **asked).fit(task, image_batches([6, 6, 4, 6]))
        tasks.append(task)
    moved = np.abs(
        weights_of(tasks[0])["head.weight"] - weights_of(Classifier(make))["head.weight"]
    )
    assert moved.max() > 1e-3
    return tasks


@pytest.mark.parametrize("name", SAME_BITS)
def test_optimizers_that_give_the_same_bits(name: str) -> None:
    """Batches of two sizes, layerwise rates and decay: not one bit differs."""
    assert_same_weights(*in_both_modes(SAME_BITS[name]))


@pytest.mark.parametrize("name", ["RMSprop", "LAMB without bias correction"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_same_bits_with_windows_and_clipping(name: str, accumulate: int) -> None:
    """With accumulation and clipping over all groups too."""
    asked = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    assert_same_weights(*in_both_modes(SAME_BITS[name], **asked))


@pytest.mark.parametrize("name", BIAS_CORRECTED)
def test_optimizers_with_bias_correction_are_close(name: str) -> None:
    """No weight is further apart than 5e-6 after 12 steps of 0.01."""
    eager, graph = map(weights_of, in_both_modes(BIAS_CORRECTED[name]))
    difference, where = largest_difference(eager, graph)
    assert difference <= APART, where


@pytest.mark.parametrize("name", ["Adam", "AdamW, amsgrad"])
def test_bias_correction_counts_steps_across_windows_and_shapes(name: str) -> None:
    """All graphs of a run count its steps together, windows as one: else 1e-2 would differ."""
    asked = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    eager, graph = map(weights_of, in_both_modes(BIAS_CORRECTED[name], **asked))
    difference, where = largest_difference(eager, graph)
    assert difference <= APART, where


def test_a_bias_under_batch_norm_is_noise_to_adam() -> None:
    """The one weight that is far apart with Adam: a bias that batch norm subtracts again.

    Its true gradient is 0. What is computed is rounding noise, of which Adam makes steps of
    full length. The running mean follows it; what the net computes in training stays the same.
    """
    tasks = in_both_modes(BIAS_CORRECTED["Adam"], bias=True)
    eager, graph = map(weights_of, tasks)
    apart = {name: np.abs(eager[name] - graph[name]).max() for name in eager}
    noisy = ("body.0.bias", "body.1.running_mean")
    assert max(apart[name] for name in noisy) > 10 * APART
    assert max(value for name, value in apart.items() if name not in noisy) < 1e-4
    images, _ = image_batches([6])[0]
    outputs = [task.head(task.body(images)).numpy() for task in tasks]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- retraced in numpy

F = np.float32


class OneVector(TaskModule):
    """Its gradient is the batch, to the bit."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.tensor(random_vectors(1, seed=5)[0]))
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return self.make(self.param_groups())


def random_vectors(count: int, seed: int) -> List[np.ndarray]:
    return list(np.random.RandomState(seed).standard_normal((count, 40)).astype(F))


def correction_in_float64(beta: float, step: int) -> np.float32:
    return F(1.0 - beta**step)


def correction_by_squaring(beta: float, step: int) -> np.float32:
    power, square = F(1), F(beta)
    while step:
        if step & 1:
            power = power * square
        square = square * square
        step >>= 1
    return F(1.0 - float(power))


CORRECTIONS = {"eager": correction_in_float64, "graph": correction_by_squaring}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_retraced_in_numpy(mode: str, amsgrad: bool) -> None:
    """Each mode's weights to the bit, which shows that bias correction is all that differs."""
    gradients = random_vectors(30, seed=6)
    task = OneVector(lambda g: flow.optim.Adam(g, lr=0.01, amsgrad=amsgrad))
    weight = task.weight.numpy().copy()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.tensor(g) for g in gradients])
    m, v, largest_v = np.zeros(40, F), np.zeros(40, F), np.zeros(40, F)
    beta1, beta2 = 0.9, 0.999
    for step, gradient in enumerate(gradients, 1):
        correction1 = CORRECTIONS[mode](beta1, step)
        correction2 = CORRECTIONS[mode](beta2, step)
        m = F(beta1) * m + (F(1) - F(beta1)) * gradient
        v = F(beta2) * v + (F(1) - F(beta2)) * gradient * gradient
        largest_v = np.maximum(largest_v, v)
        denominator = np.sqrt(largest_v if amsgrad else v) / np.sqrt(correction2) + F(1e-8)
        weight = weight - (F(0.01) / correction1) * (m / denominator)
    assert weight.dtype == F
    assert task.weight.numpy().tobytes() == weight.tobytes()


def test_the_two_bias_corrections_differ_as_stated() -> None:
    """Up to 6e-5 of the factor in the first steps, and less and less from there on."""
    apart = [
        abs(float(correction_by_squaring(0.999, t)) / float(correction_in_float64(0.999, t)) - 1)
        for t in (1, 2, 3, 10, 100, 1000)
    ]
    assert max(apart[:3]) < 6e-5
    assert apart[4] < 2e-5
    assert apart[5] < 2e-5


def test_adagrad_retraced_in_numpy(mode: str) -> None:
    """Adagrad with lr_decay and an L2 penalty follows its formula in both modes."""
    gradients = random_vectors(20, seed=7)
    task = OneVector(lambda g: flow.optim.Adagrad(g, lr=0.05, lr_decay=0.1, weight_decay=0.5))
    weight = task.weight.numpy().copy()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.tensor(g) for g in gradients])
    total = np.zeros(40, F)
    for step, gradient in enumerate(gradients):
        rate = F(0.05) / (F(1) + F(step) * F(0.1))
        penalized = gradient + F(0.5) * weight
        total = total + penalized * penalized
        weight = weight - rate / (np.sqrt(total) + F(1e-10)) * penalized
    np.testing.assert_allclose(task.weight.numpy(), weight, rtol=0, atol=3e-7)
