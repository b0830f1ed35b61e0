"""GradualUnfreezing: what trains when, in both modes alike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List

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
from oneflow import nn

from ofengine import Callback, OFEngineWarning, RateError, TaskModule
from ofengine.callbacks import GradualUnfreezing
from ofengine.rates import layer_decay, no_weight_decay

EPOCHS = 4
BATCHES = 3
STAGES = ["stem", "body", "head"]


class Small(TaskModule):
    """Three linear layers, a parameter group each."""

    def __init__(self, optimizer: str = "sgd", split: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.loss_fn = nn.CrossEntropyLoss()
        self.optimizer_name, self.split = optimizer, split
        fill_deterministically(self, spread=0.4)

    def forward(self, x: Any) -> Any:
        return self.head(flow.tanh(self.body(flow.tanh(self.stem(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss_fn(self(x), y)

    def param_groups(self) -> List[Dict[str, Any]]:
        groups = layer_decay(self, 0.5, stages=STAGES)
        return no_weight_decay(groups, self) if self.split else groups

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adamw":
            return flow.optim.AdamW(self.param_groups(), lr=1e-2, weight_decay=0.1)
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Moved(Callback):
    """Which of the three layers changed, epoch by epoch."""

    def __init__(self) -> None:
        self.layers: List[List[str]] = []
        self.before: Dict[str, np.ndarray] = {}

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.before = weights_of(task)

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        after = weights_of(task)
        moved = {name.split(".")[0] for name in after if (after[name] != self.before[name]).any()}
        self.layers.append([name for name in STAGES if name in moved])


def trained(mode: str, callback: GradualUnfreezing, **task: Any) -> Any:
    small, moved = Small(**task), Moved()
    trainer = quiet_trainer(mode=mode, max_epochs=EPOCHS, callbacks=[callback, moved])
    trainer.fit(small, image_batches([8] * BATCHES, (4,), classes=3))
    return small, moved.layers


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (
            lambda: GradualUnfreezing(),
            [["head"], ["body", "head"], ["stem", "body", "head"], ["stem", "body", "head"]],
        ),
        (
            lambda: GradualUnfreezing(every_n_epochs=2),
            [["head"], ["head"], ["body", "head"], ["body", "head"]],
        ),
        (
            lambda: GradualUnfreezing({0: ["head", "stem"], 3: "layer_1"}),
            [["stem", "head"], ["stem", "head"], ["stem", "head"], ["stem", "body", "head"]],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*will never train")
def test_groups_join_in_their_epoch(mode: str, callback: Any, expected: List[List[str]]) -> None:
    assert trained(mode, callback())[1] == expected


def test_both_modes_and_a_loop_by_hand_have_the_same_weights() -> None:
    by_hand = Small()
    order = [by_hand.head, by_hand.body, by_hand.stem]
    optimizer = flow.optim.SGD(
        [
            {"params": list(layer.parameters()), "lr": 0.1 * scale}
            for layer, scale in zip(order, (1.0, 0.5, 0.25))
        ],
        momentum=0.9,
        weight_decay=0.01,
    )
    for epoch in range(EPOCHS):
        for position, layer in enumerate(order):
            layer.requires_grad_(position <= epoch)
        for batch in image_batches([8] * BATCHES, (4,), classes=3):
            optimizer.zero_grad(set_to_none=True)
            by_hand.training_step(batch, 0).backward()
            optimizer.step()
    eager, _ = trained("eager", GradualUnfreezing())
    graph, _ = trained("graph", GradualUnfreezing())
    assert_same_weights(eager, graph)
    assert_same_weights(eager, by_hand)


def test_adamw_agrees_in_both_modes() -> None:
    eager, _ = trained("eager", GradualUnfreezing(), optimizer="adamw")
    graph, _ = trained("graph", GradualUnfreezing(), optimizer="adamw")
    assert_same_weights(eager, graph)


def test_a_name_stands_for_both_halves_without_and_with_weight_decay() -> None:
    expected = [["head"], ["body", "head"], ["stem", "body", "head"], ["stem", "body", "head"]]
    assert trained("eager", GradualUnfreezing(), split=True)[1] == expected
    schedule = {0: ["head"], 1: ["layer_1"], 2: ["stem"]}
    assert trained("eager", GradualUnfreezing(schedule), split=True)[1] == expected


def test_what_is_saved_after_fit_goes_on_with_the_groups_that_were_frozen(
    mode: str, tmp_path: Path
) -> None:
    whole, _ = trained(mode, GradualUnfreezing())

    def fit(path: Any = None, **limits: Any) -> Any:
        small = Small()
        trainer = quiet_trainer(
            mode=mode, max_epochs=EPOCHS, callbacks=GradualUnfreezing(), **limits
        )
        batches = image_batches([8] * BATCHES, (4,), classes=3)
        trainer.fit(small, batches, ckpt_path=path)
        return trainer, small

    trainer, small = fit(max_steps=BATCHES - 1)
    assert all(each.requires_grad for each in small.parameters())
    path = trainer.save_checkpoint(tmp_path / "after.safetensors")
    assert_same_weights(fit(path)[1], whole)


def test_requires_grad_is_as_before_once_fit_is_over(mode: str) -> None:
    small = Small()
    trainer = quiet_trainer(
        mode=mode, max_epochs=3, limit_train_batches=1, callbacks=GradualUnfreezing()
    )
    trainer.fit(small, image_batches([8] * BATCHES, (4,), classes=3))
    assert all(parameter.requires_grad for parameter in small.parameters())
    trainer.fit(
        small, image_batches([8] * BATCHES, (4,), classes=3)
    )  # finds all three groups again


def test_requires_grad_is_as_before_after_an_error() -> None:
    class Failing(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no")

    small = Failing()
    with pytest.raises(ValueError, match="no"):
        quiet_trainer(max_epochs=3, callbacks=GradualUnfreezing()).fit(
            small, image_batches([8] * BATCHES, (4,), classes=3)
        )
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.filterwarnings("ignore:group 'layer_1' holds 1 frozen")
def test_what_was_frozen_before_stays_frozen(mode: str) -> None:
    class Own(Small):
        def param_groups(self) -> List[Dict[str, Any]]:
            layers = (self.stem, self.body, self.head)
            return [
                {"name": name, "params": list(layer.parameters())}
                for name, layer in zip(("stem", "layer_1", "head"), layers)
            ]

    small = Own()
    small.body.bias.requires_grad_(False)
    before = weights_of(small)
    quiet_trainer(mode=mode, max_epochs=3, callbacks=GradualUnfreezing()).fit(
        small, image_batches([8] * BATCHES, (4,), classes=3)
    )
    after = weights_of(small)
    assert [name for name in after if (after[name] == before[name]).all()] == ["body.bias"]
    assert not small.body.bias.requires_grad


def test_each_unfreezing_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ofengine"):
        trained("eager", GradualUnfreezing({0: "head", 2: ["layer_1", "stem"]}))
    said = [text for text in caplog.messages if text.startswith("GradualUnfreezing")]
    assert said == [
        "GradualUnfreezing: epoch 0: head begins training; frozen: stem, layer_1.",
        "GradualUnfreezing: epoch 2: stem, layer_1 begin training, nothing is frozen.",
    ]


def test_a_schedule_longer_than_the_run_warns() -> None:
    with pytest.warns(OFEngineWarning, match="'stem' in epoch 4 or later, but max_epochs=4"):
        trained("eager", GradualUnfreezing({0: ["head", "layer_1"], 4: ["stem"]}))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({0: ["head"], 1: ["layer_2", "stem"]}, "'layer_2', which is not there"),
        ({0: ["head"], 1: ["stem"]}, "never unfreezes 'layer_1'"),
    ],
)
def test_a_schedule_that_does_not_fit_the_groups_is_refused_before_training(
    schedule: Dict[int, Any], message: str
) -> None:
    small = Small()
    before = weights_of(small)
    with pytest.raises(RateError, match=message):
        quiet_trainer(max_epochs=3, callbacks=GradualUnfreezing(schedule)).fit(
            small, image_batches([8] * BATCHES, (4,), classes=3)
        )
    after = weights_of(small)
    assert all((after[name] == before[name]).all() for name in after)
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": {}}, "give the groups by epoch"),
        ({"schedule": ["head"]}, "give the groups by epoch"),
        ({"schedule": {-1: ["head"]}}, "-1 is no epoch"),
        ({"schedule": {0.5: ["head"]}}, "0.5 is no epoch"),
        ({"schedule": {1: ["head"]}}, "no group for epoch 0"),
        ({"schedule": {0: []}}, "no group for epoch 0"),
        ({"schedule": {0: ["head"], 1: ["head"]}}, "'head' twice"),
        ({"every_n_epochs": 0}, "a whole number from 1 on"),
        ({"every_n_epochs": True}, "a whole number from 1 on"),
        ({"schedule": {0: ["head"]}, "every_n_epochs": 1}, "not both"),
    ],
)
def test_a_schedule_that_is_none_is_refused_at_once(
    arguments: Dict[str, Any], message: str
) -> None:
    with pytest.raises(RateError, match=message):
        GradualUnfreezing(**arguments)
