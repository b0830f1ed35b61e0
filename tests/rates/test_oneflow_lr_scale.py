"""The figures of OneFlow's own test of ``lr_scale``, in both modes.

OneFlow tests (python/oneflow/test/graph/test_graph_lr_scale.py) that a graph multiplies the
rate of layer i with ``base_scale ** (i + 1)``, and that eager mode does not. Through the engine
both do, and give the figures that OneFlow expects of the graph.
"""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import TaskModule


class Shift(nn.Module):
    """Adds a parameter, whose gradient is therefore the number of rows."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.param = nn.Parameter(flow.ones(features))

    def forward(self, x: Any) -> Any:
        return x + self.param


class Layers(TaskModule):
    """OneFlow's test model and groups."""

    def __init__(self, depth: int, base_scale: float, lr: float, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Shift(features) for _ in range(depth)])
        self.base_scale = base_scale
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for layer in self.layers:
            batch = layer(batch)
        return batch.sum()

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": layer.parameters(), "lr_scale": self.base_scale ** (index + 1)}
            for index, layer in enumerate(self.layers)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=self.lr)
        scheduler = flow.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=100)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def rows(count: int, features: int) -> Any:
    return flow.tensor(np.random.RandomState(0).rand(count, features).astype("float32"))


@pytest.mark.parametrize("lr", [1.0, 0.1])
@pytest.mark.parametrize("base_scale", [0.1, 0.2])
@pytest.mark.parametrize("depth", [3, 4])
def test_oneflow_s_figures(mode: str, depth: int, base_scale: float, lr: float) -> None:
    """After one step layer i stands at 1 - rows * lr * base_scale ** (i + 1), in both modes."""
    features = 10
    for batch_size in (2, 4):
        task = Layers(depth, base_scale, lr, features)
        quiet_trainer(mode=mode, max_steps=1).fit(task, [rows(batch_size, features)])
        for index, layer in enumerate(task.layers):
            expected = 1.0 - batch_size * lr * base_scale ** (index + 1)
            assert layer.param.shape == (features,)
            np.testing.assert_allclose(layer.param.numpy(), expected, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("depth", [3, 4])
def test_the_figures_over_several_steps(mode: str, depth: int) -> None:
    """Three steps move a layer three times as far: the scale is not multiplied in again."""
    task = Layers(depth, 0.2, 0.1, 13)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [rows(4, 13) for _ in range(3)])
    for index, layer in enumerate(task.layers):
        expected = 1.0 - 3 * 4 * 0.1 * 0.2 ** (index + 1)
        np.testing.assert_allclose(layer.param.numpy(), expected, rtol=4e-7)


def test_both_modes_give_the_same_bits() -> None:
    """The two modes' weights are equal, not only close."""
    weights = []
    for mode in ("eager", "graph"):
        task = Layers(4, 0.2, 0.1, 13)
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [rows(4, 13) for _ in range(3)])
        weights.append([layer.param.numpy().tobytes() for layer in task.layers])
    assert weights[0] == weights[1]


def test_oneflow_alone_ignores_lr_scale_in_eager_mode() -> None:
    """Why the engine must act: a bare eager step takes the whole rate, as OneFlow asserts."""
    model = nn.ModuleList([Shift(10) for _ in range(3)])
    groups = [{"params": m.parameters(), "lr_scale": 0.1 ** (i + 1)} for i, m in enumerate(model)]
    optimizer = flow.optim.SGD(groups, lr=0.1)
    x = rows(4, 10)
    for layer in model:
        x = layer(x)
    x.sum().backward()
    optimizer.step()
    for layer in model:
        np.testing.assert_allclose(layer.param.numpy(), 1.0 - 4 * 0.1, rtol=2e-7)
