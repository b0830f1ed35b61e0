"""Every optimizer computes the same in both modes, bit for bit.

Both modes run the same kernels. What differed was bias correction, ``1 - beta ** step``, of Adam,
AdamW and LAMB: OneFlow's eager optimizers compute it in Python, in float64, and round it; a graph
computes ``beta ** step`` by repeated squaring in float32 (``Fastpow`` in
model_update_kernel_util.cpp). Eager mode here corrects as graphs do. With beta2 = 0.999 the factor
of the first steps is 0.001 and its rounding error 6e-5 of it, so a step is up to 3e-5 of itself
apart from OneFlow's own eager loop, at first. Both ways are retraced here in numpy, to the bit.
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
    quiet_trainer,
    weights_of,
)
from helpers.resuming import some_slow
from oneflow import nn

from ofengine import TaskModule

Make = Callable[[Any], Any]

OPTIMIZERS: Dict[str, Make] = {
    "SGD": lambda g: flow.optim.SGD(g, lr=0.05, weight_decay=0.1),
    "SGD, maximize": lambda g: flow.optim.SGD(g, lr=0.0003, momentum=0.9, maximize=True),
    "SGD, dampening": lambda g: flow.optim.SGD(
        g, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1
    ),
    "SGD, nesterov": lambda g: flow.optim.SGD(g, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, weight_decay=0.1),
    "RMSprop, centered": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, centered=True),
    "Adagrad": lambda g: flow.optim.Adagrad(
        g, lr=0.05, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5
    ),
    "Adadelta": lambda g: flow.optim.Adadelta(g, lr=1.0, weight_decay=0.1),
    "Adam": lambda g: flow.optim.Adam(g, lr=0.01),
    "Adam, weight decay": lambda g: flow.optim.Adam(g, lr=0.01, weight_decay=0.1),
    "Adam, amsgrad": lambda g: flow.optim.Adam(g, lr=0.01, amsgrad=True),
    "Adam, other betas": lambda g: flow.optim.Adam(g, lr=0.01, betas=[0.0, 0.99999]),
    "Adam without bias correction": lambda g: flow.optim.Adam(g, 0.01, do_bias_correction=False),
    "AdamW": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    "AdamW, amsgrad": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW without bias correction": lambda g: flow.optim.AdamW(
        g, 0.01, weight_decay=0.1, amsgrad=True, do_bias_correction=False
    ),
    "LAMB": lambda g: flow.optim.LAMB(g, lr=0.01, weight_decay=0.1),
    "LAMB, L2 penalty": lambda g: flow.optim.LAMB(g, 0.01, weight_decay=0.1, adam_w_mode=False),
    "LAMB without bias correction": lambda g: flow.optim.LAMB(
        g, 0.01, weight_decay=0.1, do_bias_correction=False
    ),
}


class Attention(nn.Module):
    """One head over rows of four numbers; the true gradient of its key's bias is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        scores = flow.matmul(self.query(x), self.key(x).transpose(-2, -1))
        return x + flow.matmul((scores * 0.5).softmax(-1), self.value(x))


class Classifier(TaskModule):
    """A small net in two groups, one of them with a scaled and decaying rate.

    The true gradients of two biases, before the batch norm and of the attention's key, are 0: what
    is computed is rounding noise, of which Adam and LAMB make steps of full length. Whatever
    differs between the modes in one last bit is largest there.
    """

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2)
        )
        self.attention = Attention()
        self.head = nn.Linear(36, 5)
        self.make = make
        fill_deterministically(self, spread=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        rows = self.attention(self.body(images).transpose(1, 2))
        return nn.functional.cross_entropy(self.head(rows.flatten(1)), labels)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": self.body.parameters(), "lr_scale": 0.5, "lr_decay_scale": 0.9},
            {"params": [*self.attention.parameters(), *self.head.parameters()]},
        ]

    def configure_optimizers(self) -> Any:
        return self.make(self.param_groups())


def in_both_modes(make: Make, epochs: int = 3, **asked: Any) -> List[Classifier]:
    tasks = []
    for mode in ("eager", "graph"):
        task = Classifier(make)
        quiet_trainer(mode=mode, max_epochs=epochs, **asked).fit(task, image_batches([6, 6, 4, 6]))
        tasks.append(task)
    eager, start = weights_of(tasks[0]), weights_of(Classifier(make))
    assert np.abs(eager["head.weight"] - start["head.weight"]).max() > 1e-3
    return tasks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gives_the_same_bits(name: str) -> None:
    """Batches of two sizes, layerwise rates and decay, gradients of 0: not one bit differs."""
    assert_same_weights(*in_both_modes(OPTIMIZERS[name]))


@pytest.mark.parametrize("name", some_slow(OPTIMIZERS, "AdamW, amsgrad", "LAMB"))
def test_the_same_bits_after_300_steps(name: str) -> None:
    assert_same_weights(*in_both_modes(OPTIMIZERS[name], epochs=75))


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW, amsgrad", "LAMB"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_same_bits_with_windows_and_clipping(name: str, accumulate: int) -> None:
    """With accumulation and clipping over all groups too; all graphs count steps together."""
    asked = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    assert_same_weights(*in_both_modes(OPTIMIZERS[name], **asked))


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


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_retraced_in_numpy(mode: str, amsgrad: bool) -> None:
    """The weights to the bit, with the bias correction of graphs."""
    gradients = random_vectors(30, seed=6)
    task = OneVector(lambda g: flow.optim.Adam(g, lr=0.01, amsgrad=amsgrad))
    weight = task.weight.numpy().copy()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.tensor(g) for g in gradients])
    m, v, largest_v = np.zeros(40, F), np.zeros(40, F), np.zeros(40, F)
    beta1, beta2 = 0.9, 0.999
    for step, gradient in enumerate(gradients, 1):
        correction1, correction2 = (correction_by_squaring(b, step) for b in (beta1, beta2))
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
