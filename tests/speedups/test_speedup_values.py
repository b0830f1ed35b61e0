"""Faster operators compute what OneFlow's own layers do, as near to float64 as those are."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from flowvision.models import convnext
from oneflow import nn

from ofengine import ConfigurationError, cpu_speedups

# Of the largest number of its kind: eight units in the last place of float32.
TOLERANCE = 8 * 2.0**-23

CASES: Dict[str, Tuple[Callable[[], nn.Module], Tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(24, eps=1e-6), (3, 5, 24)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((4, 6)), (5, 4, 6)),
    "layer norm of one row": (lambda: nn.LayerNorm(7), (1, 7)),
    "layer norm of ConvNeXt": (lambda: convnext.LayerNorm(24), (2, 3, 5, 24)),
    "layer norm of ConvNeXt over channels": (
        lambda: convnext.LayerNorm(6, data_format="channels_first"), (2, 6, 3, 5)
    ),
    "lstm": (lambda: nn.LSTM(5, 6), (7, 3, 5)),
    "lstm of three layers": (lambda: nn.LSTM(5, 4, num_layers=3, batch_first=True), (3, 7, 5)),
    "lstm without biases": (lambda: nn.LSTM(5, 4, bias=False), (1, 1, 5)),
    "gelu": (nn.GELU, (4, 50)),
    "silu": (nn.SiLU, (4, 50)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (3, 6, 5, 7)),
    "depthwise of 7": (lambda: nn.Conv2d(2, 2, 7, padding=3, groups=2, bias=False), (2, 2, 4, 9)),
    "depthwise, 3 by 9": (lambda: nn.Conv2d(3, 3, (3, 9), padding=(1, 4), groups=3), (2, 3, 6, 2)),
}  # fmt: skip


def filled(layer: nn.Module) -> nn.Module:
    generator = np.random.RandomState(1)
    for parameter in layer.parameters():
        parameter.data = flow.tensor(generator.randn(*parameter.shape).astype(np.float32))
    return layer


def assert_near(ours: np.ndarray, true: np.ndarray) -> None:
    assert np.abs(ours - true).max() <= TOLERANCE * np.abs(true).max()


def results(layer: nn.Module, x: np.ndarray) -> List[np.ndarray]:
    """What comes out, and the gradients of the input and of each parameter."""
    given = flow.tensor(x, requires_grad=True)
    y = layer(given)
    if isinstance(y, tuple):  # an LSTM's
        y = flow.cat([each.reshape(-1) for each in (y[0], *y[1])])
    weights = np.random.RandomState(2).randn(*y.shape).astype(x.dtype)
    (y * flow.tensor(weights)).sum().backward()
    gradients = [given.grad, *(each.grad for each in layer.parameters())]
    return [y.detach().numpy(), *(each.numpy() for each in gradients)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_float64(case: str) -> None:
    make, shape = CASES[case]
    layer = filled(make())
    x = (np.random.RandomState(3).randn(*shape) * 2).astype(np.float32)
    exact = results(copy.deepcopy(layer).double(), x.astype(np.float64))
    assert sum(cpu_speedups(layer).layers.values()) == 1
    for ours, true in zip(results(layer, x), exact):
        assert ours.dtype == np.float32
        assert ours.shape == true.shape
        assert_near(ours, true)


def test_an_lstm_goes_on_from_a_given_state_and_passes_its_gradient_on() -> None:
    layer = filled(nn.LSTM(5, 4, num_layers=2))
    random = np.random.RandomState(5)
    x, h, c = random.randn(6, 3, 5), random.randn(2, 3, 4), random.randn(2, 3, 4)
    found = []
    for model, dtype in ((copy.deepcopy(layer).double(), np.float64), (layer, np.float32)):
        if dtype is np.float32:
            assert cpu_speedups(model).layers == {"LSTM": 1}
        given = [flow.tensor(each.astype(dtype), requires_grad=True) for each in (x, h, c)]
        y, (last_h, last_c) = model(given[0], (given[1], given[2]))
        assert (y[-1].numpy() == last_h[-1].numpy()).all()
        (last_h.sum() * 2 + (last_c * last_c).sum()).backward()
        found.append([each.grad.numpy() for each in given])
    for ours, true in zip(found[1], found[0]):
        assert_near(ours, true)


@pytest.mark.parametrize("used", ["all outputs", "the last output", "the last cells"])
@pytest.mark.parametrize("frozen", ["nothing", "weight_ih_l0", "weight_hh_l0", "everything"])
def test_an_lstm_of_which_a_part_is_used_or_trained(used: str, frozen: str) -> None:
    layer = filled(nn.LSTM(5, 4))
    x = np.random.RandomState(6).randn(3, 2, 5)
    found = []
    for model, dtype in ((copy.deepcopy(layer).double(), np.float64), (layer, np.float32)):
        if dtype is np.float32:
            cpu_speedups(model)
        for name, each in model.named_parameters():
            each.requires_grad_(frozen not in (name, "everything"))
        given = flow.tensor(x.astype(dtype), requires_grad=True)
        y, (last_h, last_c) = model(given)
        outputs = {"all outputs": y, "the last output": last_h, "the last cells": last_c}
        outputs[used].sum().backward()
        found.append([given.grad, *[each.grad for each in model.parameters()]])
    for true, ours in zip(*found):
        assert (true is None) == (ours is None)
        if true is not None:
            assert_near(ours.numpy(), true.numpy())


def test_what_is_no_batch_of_sequences_is_computed_by_oneflow() -> None:
    """A sequence by itself, and dropout between layers."""
    layer = filled(nn.LSTM(5, 4, num_layers=2, dropout=0.5))
    x = flow.randn(6, 5)
    flow.manual_seed(1)
    own = layer(x)[0].numpy(), layer(x.unsqueeze(1))[0].numpy()
    cpu_speedups(layer)
    flow.manual_seed(1)
    assert (layer(x)[0].numpy() == own[0]).all()
    assert (layer(x.unsqueeze(1))[0].numpy() == own[1]).all()


@pytest.mark.parametrize("kind", [nn.GELU, nn.SiLU])
def test_activations_of_unusual_numbers(kind: Any) -> None:
    x = [0.0, -0.0, 1e-39, 1e-3, -1e-3, 30.0, -30.0, 200.0, -200.0, float("inf"), float("nan")]
    given = flow.tensor(x, requires_grad=True)
    layer = kind()
    cpu_speedups(layer)
    y = layer(given)
    y.sum().backward()
    own = kind()(flow.tensor(x)).numpy()
    np.testing.assert_allclose(y.detach().numpy(), own, rtol=1e-6, atol=1e-12)
    slopes = given.grad.numpy()
    assert slopes[0] == slopes[1] == 0.5
    np.testing.assert_allclose(slopes[5:9], [1, 0, 1, 0], atol=1e-10)
    assert np.isnan(slopes[10])


def test_gelu_is_exact_far_out_where_oneflow_s_own_cancels() -> None:
    x = np.linspace(-12, 0, 2401).astype(np.float32)
    layer = nn.GELU()
    cpu_speedups(layer)
    exact = _gelu_of_float64(x.astype(np.float64))
    ours = layer(flow.tensor(x)).numpy()
    assert np.abs(ours / np.where(exact, exact, 1.0) - 1.0)[exact != 0].max() < 1e-5


def _gelu_of_float64(x: np.ndarray) -> np.ndarray:
    from math import erfc, sqrt

    return np.array([each * 0.5 * erfc(-each / sqrt(2)) for each in x])


def test_images_for_which_oneflow_s_own_is_faster_have_its_bits() -> None:
    layer = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    x = flow.randn(1, 4, 3, 65)
    own = layer(x).numpy()
    assert cpu_speedups(layer).layers == {"Conv2d": 1}
    assert np.array_equal(layer(x).numpy(), own)


def test_a_frozen_layer_passes_gradients_through() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(2, 2, 5, padding=2, groups=2),
        nn.LayerNorm((14, 14)),
    )
    cpu_speedups(model)
    for layer in (model[1], model[2]):
        layer.requires_grad_(False)
    model(flow.randn(2, 2, 14, 14)).sum().backward()
    assert model[0].weight.grad is not None
    assert all(each.grad is None for each in model[1].parameters())


@pytest.mark.parametrize("kind", ["gelu", "silu", "layer norm", "lstm"])
def test_a_second_derivative_is_refused(kind: str) -> None:
    make, shape = CASES[kind]
    layer = make()
    cpu_speedups(layer)
    x = flow.randn(*shape).requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"no second derivatives.*create_graph=True"):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        flow.autograd.grad(flow.square(y).sum(), x, create_graph=True)
