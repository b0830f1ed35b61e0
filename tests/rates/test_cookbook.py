"""OneFlow's cookbook on layerwise rates, written out by hand, against the engine.

The two loops of https://docs.oneflow.org/master/cookies/lr_scale.html: MobileNetV2, three
groups, SGD. In the eager one each group has its own rate, which is multiplied with the group's
``lr_scale`` after every tenth batch; in the graph one ``lr_scale`` is a constant multiplier.
Nothing of the engine is used in the hand-written loops.

Each loop is compared over the whole network in the mode that it is written for, and over its
first stages in what compiles the network once more.
"""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from flowvision.models import mobilenet_v2
from helpers import assert_same_arrays, quiet_trainer, weights_of
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback
from ofengine.errors import OFEngineWarning

pytestmark = pytest.mark.filterwarnings("ignore:ReLU6 module do not support inplace now")

EPOCHS = 2
BATCHES = 12
"""So that decay happens after the batches 0 and 10 of both epochs."""
FIRST_STAGES = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
"""Of MobileNetV2's seven: expansion, channels, blocks and stride of each."""


def cifar_like_batches(sizes: List[int]) -> List[Tuple[Any, Any]]:
    """Random images and labels of CIFAR-10's shape and range."""
    generator = np.random.RandomState(7)
    return [
        (
            flow.tensor(generator.rand(size, 3, 32, 32).astype("float32")),
            flow.tensor(generator.randint(0, 10, size)),
        )
        for size in sizes
    ]


EVEN = [3] * BATCHES
"""An epoch as the graph loop needs it: all batches alike."""
UNEVEN = [3] * (BATCHES - 1) + [2]
"""An epoch whose last batch is of another size."""


def pretrained_model(short: bool) -> Any:
    """The same weights every time; a short one has the first stages only."""
    flow.manual_seed(0)
    model = mobilenet_v2(inverted_residual_setting=FIRST_STAGES if short else None)
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(model.last_channel, 10))
    model.train()
    return model


def eager_groups(model: Any) -> List[Dict[str, Any]]:
    return [
        {"params": model.features.parameters(), "lr": 1e-3, "lr_scale": 0.9},
        {"params": model.adaptive_avg_pool2d.parameters(), "lr": 1e-4, "lr_scale": 0.8},
        {"params": model.classifier.parameters(), "lr": 1e-5, "lr_scale": 0.7},
    ]


def graph_groups(model: Any) -> List[Dict[str, Any]]:
    return [
        {"params": model.features.parameters(), "lr_scale": 0.9},
        {"params": model.adaptive_avg_pool2d.parameters(), "lr_scale": 0.8},
        {"params": model.classifier.parameters(), "lr_scale": 0.7},
    ]


# ---------------------------------------------------------------------- the loops by hand


@functools.lru_cache(maxsize=None)
def cookbook_eager_loop(short: bool, even: bool) -> Dict[str, np.ndarray]:
    model, batches = pretrained_model(short), cifar_like_batches(EVEN if even else UNEVEN)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = flow.optim.SGD(eager_groups(model))
    for _ in range(EPOCHS):
        for batch, (x, y) in enumerate(batches):
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if batch % 10 == 0:
                for param_group in optimizer.param_groups:
                    param_group["lr"] *= param_group["lr_scale"]
    return weights_of(model)


@functools.lru_cache(maxsize=None)
def cookbook_graph_loop(short: bool) -> Dict[str, np.ndarray]:
    model, batches = pretrained_model(short), cifar_like_batches(EVEN)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = flow.optim.SGD(graph_groups(model), lr=1e-3)

    class GraphMobileNetV2(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss_fn = loss_fn
            self.add_optimizer(optimizer)

        def build(self, x: Any, y: Any) -> Any:
            y_pred = self.model(x)
            loss = self.loss_fn(y_pred, y)
            loss.backward()
            return loss

    graph_mobile_net_v2 = GraphMobileNetV2()
    for _ in range(EPOCHS):
        for x, y in batches:
            loss = graph_mobile_net_v2(x, y)
    loss.numpy()
    return weights_of(model)


# ---------------------------------------------------------------------- the task


class Cookbook(TaskModule):
    """What both loops train."""

    def __init__(self, short: bool) -> None:
        super().__init__()
        self.model = pretrained_model(short)
        self.loss_fn = nn.CrossEntropyLoss()
        self.steps_called: List[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps_called.append(1)
        images, labels = batch
        return self.loss_fn(self.model(images), labels)


class CookbookEager(Cookbook):
    def param_groups(self) -> List[Dict[str, Any]]:
        return eager_groups(self.model)


class CookbookGraph(Cookbook):
    def param_groups(self) -> List[Dict[str, Any]]:
        return graph_groups(self.model)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=1e-3)


class CookbookOwnGraph(CookbookGraph):
    """With the cookbook's nn.Graph subclass, not a letter of it changed."""

    def build_graph(self) -> nn.Graph:
        model, loss_fn, optimizer = self.model, self.loss_fn, self.optimizer

        class GraphMobileNetV2(nn.Graph):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.loss_fn = loss_fn
                self.add_optimizer(optimizer)

            def build(self, x: Any, y: Any) -> Any:
                y_pred = self.model(x)
                loss = self.loss_fn(y_pred, y)
                loss.backward()
                return loss

        return GraphMobileNetV2()


class CookbookWithTypo(CookbookEager):
    """The new head is assigned to ``classifer``, as in the cookbook: nothing trains it."""

    def __init__(self, short: bool) -> None:
        super().__init__(short)
        self.model.classifer = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(self.model.last_channel, 10)
        )


def train(task: Cookbook, sizes: List[int], mode: str, *callbacks: Any) -> Dict[str, np.ndarray]:
    trainer = quiet_trainer(mode=mode, max_epochs=EPOCHS, callbacks=list(callbacks))
    with pytest.warns(OFEngineWarning, match="'group_1' is empty"):  # pooling has no parameters
        trainer.fit(task, cifar_like_batches(sizes))
    return weights_of(task.model)


def but_for_counts(
    weights: Dict[str, np.ndarray], by_hand: Dict[str, np.ndarray]
) -> Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]:
    """A graph by hand leaves batch norm's batches uncounted; the engine counts them."""
    counts = [name for name in by_hand if name.endswith("num_batches_tracked")]
    assert counts
    for name in counts:
        assert int(by_hand[name]) == 0
        assert int(weights[name]) == EPOCHS * BATCHES
    weights, by_hand = dict(weights), dict(by_hand)
    for name in counts:
        del weights[name], by_hand[name]
    return weights, by_hand


# ---------------------------------------------------------------------- the proof


def test_the_eager_loop_bit_for_bit() -> None:
    """``LRDecayCallback(key="lr_scale")`` is the cookbook's eager code to the letter."""
    decay = LRDecayCallback(every_n_batches=10, key="lr_scale")
    weights = train(CookbookEager(short=False), UNEVEN, "eager", decay)
    assert_same_arrays(weights, cookbook_eager_loop(short=False, even=False))


def test_the_eager_loop_in_graph_mode() -> None:
    """The same task compiled: layerwise decay and a last batch of another size, bit for bit."""
    pair = [LRDecayCallback(key="lr_scale"), GraphLRScaleCallback()]
    weights = train(CookbookEager(short=True), UNEVEN, "graph", *pair)
    by_hand = cookbook_eager_loop(short=True, even=False)
    for name, array in by_hand.items():
        if name.endswith("num_batches_tracked"):
            assert int(array) == int(weights[name]) == EPOCHS * BATCHES
    assert_same_arrays(weights, by_hand)


def test_the_graph_loop_bit_for_bit() -> None:
    """``lr_scale`` through the engine's own graph is the cookbook's graph loop."""
    weights = train(CookbookGraph(short=False), EVEN, "graph")
    assert_same_arrays(*but_for_counts(weights, cookbook_graph_loop(short=False)))


def test_the_cookbook_s_graph_class_as_it_stands() -> None:
    """``build_graph`` returns the cookbook's GraphMobileNetV2, and the weights are its own."""
    weights = train(CookbookOwnGraph(short=True), EVEN, "graph")
    assert_same_arrays(*but_for_counts(weights, cookbook_graph_loop(short=True)))


def test_the_graph_loop_in_eager_mode() -> None:
    """Eager mode, where OneFlow ignores ``lr_scale``, trains as the cookbook's graph does."""
    weights = train(CookbookGraph(short=True), EVEN, "eager")
    assert_same_arrays(*but_for_counts(weights, cookbook_graph_loop(short=True)))


def test_the_loops_differ_from_each_other() -> None:
    """The proofs above are not void: other rates give other weights."""
    eager, graph, untrained = (
        weights["classifier.1.weight"]
        for weights in (
            cookbook_eager_loop(short=True, even=True),
            cookbook_graph_loop(short=True),
            weights_of(pretrained_model(short=True)),
        )
    )
    assert np.abs(eager - graph).max() > 0
    assert np.abs(eager - untrained).max() > 0


def test_the_cookbook_s_typo_is_caught(mode: str) -> None:
    """``model.classifer = ...`` makes parameters that no group has: an error, before training."""
    task = CookbookWithTypo(short=True)
    before = weights_of(task)
    with pytest.warns(OFEngineWarning), pytest.raises(RateError) as caught:
        quiet_trainer(mode=mode, max_epochs=1).fit(task, cifar_like_batches(EVEN))
    for part in (
        "'model.classifer.1.weight'",
        "'model.classifer.1.bias'",
        "'model.classifer' stands beside 'model.classifier'",
    ):
        assert part in str(caught.value)
    assert not task.steps_called
    assert_same_arrays(weights_of(task), before)
