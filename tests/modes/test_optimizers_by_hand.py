"""How far every optimizer is from OneFlow's own loops by hand, eager and as a graph."""

from __future__ import annotations

from typing import Any, Callable, Dict

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    assert_same_arrays,
    fill_deterministically,
    image_batches,
    largest_difference,
    quiet_trainer,
    weights_of,
)
from oneflow import nn

from ofengine import TaskModule

Make = Callable[[Any], Any]

UNCORRECTED: Dict[str, Make] = {
    "SGD": lambda p: flow.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: flow.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: flow.optim.RMSprop(p, lr=0.01, alpha=0.9, centered=True),
    "Adagrad": lambda p: flow.optim.Adagrad(p, lr=0.05, lr_decay=0.1, weight_decay=0.1),
    "Adadelta": lambda p: flow.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "AdamW": lambda p: flow.optim.AdamW(p, 0.01, weight_decay=0.1, do_bias_correction=False),
    "LAMB": lambda p: flow.optim.LAMB(p, 0.01, weight_decay=0.1, do_bias_correction=False),
}
CORRECTED: Dict[str, Make] = {
    "Adam": lambda p: flow.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: flow.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: flow.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "LAMB": lambda p: flow.optim.LAMB(p, lr=0.01, weight_decay=0.1),
}
BATCHES = image_batches([6] * 50)


class Classifier(TaskModule):
    """A small net without a bias whose true gradient is 0."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(36, 5)
        self.make = make
        fill_deterministically(self, spread=0.3)

    def forward(self, images: Any) -> Any:
        return self.head(self.norm(self.conv(images)).relu().flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def trained(make: Make, mode: str) -> Dict[str, np.ndarray]:
    task = Classifier(make)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, BATCHES)
    return counted_out(task)


def eagerly_by_hand(make: Make) -> Dict[str, np.ndarray]:
    task = Classifier(make)
    optimizer = task.configure_optimizers()
    for batch in BATCHES:
        task.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return counted_out(task)


def as_a_graph_by_hand(make: Make) -> Dict[str, np.ndarray]:
    class Graph(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = task
            self.add_optimizer(task.configure_optimizers())

        def build(self, images: Any, labels: Any) -> Any:
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            return loss

    task = Classifier(make)
    graph = Graph()
    for batch in BATCHES:
        graph(*batch)
    return counted_out(task)


def counted_out(task: Classifier) -> Dict[str, np.ndarray]:
    """The weights without the count of batches, which OneFlow's graphs leave at 0."""
    weights = weights_of(task)
    del weights["norm.num_batches_tracked"]
    return weights


@pytest.mark.parametrize("name", UNCORRECTED)
def test_without_bias_correction_all_four_are_one(name: str) -> None:
    make = UNCORRECTED[name]
    right = eagerly_by_hand(make)
    assert_same_arrays(as_a_graph_by_hand(make), right)
    for mode in ("eager", "graph"):
        assert_same_arrays(trained(make, mode), right)


@pytest.mark.parametrize("name", CORRECTED)
def test_with_bias_correction_both_modes_are_oneflow_s_graph(name: str) -> None:
    """OneFlow's own eager loop is a little apart from all of them."""
    make = CORRECTED[name]
    right = as_a_graph_by_hand(make)
    for mode in ("eager", "graph"):
        assert_same_arrays(trained(make, mode), right)
    difference, where = largest_difference(eagerly_by_hand(make), right)
    assert 0 < difference < 3e-5, where
