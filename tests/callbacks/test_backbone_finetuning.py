"""BackboneFinetuning: Lightning's recipe, in both modes, over a resume, against a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    assert_same_weights,
    bits,
    fill_deterministically,
    image_batches,
    quiet_trainer,
    weights_of,
)
from oneflow import nn

from ofengine import Callback, ConfigurationError, RateError, TaskModule
from ofengine.callbacks import BackboneFinetuning

HEAD_LR, MOMENTUM = 0.25, 0.5
EPOCHS, BATCHES, AT = 5, 3, 1
# From the initial 0.1 * 0.25, doubled in each epoch behind the first, at most the head's.
RATES = [0.025, 0.025, 0.05, 0.1, 0.2]


class Small(TaskModule):
    """A backbone with a batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        fill_deterministically(self, spread=0.4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"name": "head", "params": self.head.parameters(), "lr": HEAD_LR},
            {"name": "backbone", "params": self.backbone.parameters(), "lr": HEAD_LR},
        ]

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), momentum=MOMENTUM)


class Rates(Callback):
    def __init__(self) -> None:
        self.of_backbone: List[float] = []

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.of_backbone.append(trainer.rates.rate("backbone", trainer.global_step - 1))


def data() -> Any:
    return image_batches([8] * BATCHES, (4,), classes=3)


def trained(mode: str, callback: Optional[BackboneFinetuning] = None, **options: Any) -> Any:
    small, rates = Small(), Rates()
    callback = callback or BackboneFinetuning(AT)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(
        mode=mode, **{"max_epochs": EPOCHS, "callbacks": [callback, rates], **options}
    )
    trainer.fit(small, data(), ckpt_path=ckpt_path)
    return small, rates.of_backbone, trainer


@pytest.mark.parametrize("train_bn", [True, False])
def test_both_modes_equal_a_loop_by_hand(train_bn: bool) -> None:
    by_hand = Small()
    norm = list(by_hand.backbone[1].parameters())
    optimizer = flow.optim.SGD(by_hand.param_groups(), momentum=MOMENTUM)
    for epoch in range(EPOCHS):
        optimizer.param_groups[1]["lr"] = RATES[epoch]
        for parameter in by_hand.backbone.parameters():
            spared = train_bn and any(parameter is each for each in norm)
            parameter.requires_grad_(epoch >= AT or spared)
        for batch in data():
            optimizer.zero_grad(set_to_none=True)
            by_hand.training_step(batch, 0).backward()
            optimizer.step()
    for mode in ("eager", "graph"):
        small, rates, _ = trained(mode, BackboneFinetuning(AT, train_bn=train_bn))
        assert np.allclose(rates, RATES, rtol=1e-7)
        assert_same_weights(small, by_hand)
        assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (lambda: BackboneFinetuning(0, lambda epoch: epoch), [0.025, 0.05, 0.15, 0.25, 0.25]),
        (
            lambda: BackboneFinetuning(2, backbone_initial_lr=0.5, should_align=False),
            [0.5, 0.5, 0.5, 1.0, 2.0],
        ),
        (
            lambda: BackboneFinetuning(0, lambda epoch: 0.5, 1.0, should_align=False),
            [0.25, 0.125, 0.0625, 0.03125, 0.015625],
        ),
    ],
)
def test_the_rate_follows_the_arguments(callback: Any, expected: List[float]) -> None:
    """The closed form of Lightning's recursion."""
    assert np.allclose(trained("eager", callback())[1], expected, rtol=1e-7)


def test_a_resumed_run_goes_on_with_the_same_rates(mode: str, tmp_path: Path) -> None:
    whole, rates, _ = trained(mode)

    class Saving(Callback):
        fires_last = True

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step in (1, 7):  # frozen yet; in the middle of a doubled rate
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.safetensors")

    trained(mode, callbacks=[BackboneFinetuning(AT), Saving()], max_steps=8)
    for step, epoch in ((1, 0), (7, 2)):
        small, of_rest, _ = trained(mode, ckpt_path=tmp_path / f"{step}.safetensors")
        assert bits(small) == bits(whole)
        assert of_rest == rates[epoch:]


def test_a_part_of_a_model_is_named_by_its_path() -> None:
    class Nested(Small):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.features = self.backbone
            del self.backbone

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head(self.model.features(batch[0])).square().mean()

        def param_groups(self) -> List[Dict[str, Any]]:
            return [
                {"name": "body", "params": self.model.features.parameters(), "lr": 1.0},
                {"name": "head", "params": self.head.parameters(), "lr": HEAD_LR},
            ]

    nested = Nested()
    before = weights_of(nested)
    callback = BackboneFinetuning(1, train_bn=False, backbone="model.features")
    trainer = quiet_trainer(max_epochs=1, callbacks=callback)
    with pytest.warns(match="BackboneFinetuning unfreezes 'body' in epoch 1 or later"):
        trainer.fit(nested, data())
    assert trainer.rates.rate("body", 0) == np.float32(0.025)
    after = weights_of(nested)
    weights = [name for name in after if name.endswith(("weight", "bias"))]
    assert {name for name in weights if (after[name] != before[name]).any()} == {
        "head.weight", "head.bias",
    }  # fmt: skip


class OneGroup(Small):
    def param_groups(self) -> List[Dict[str, Any]]:
        return [{"name": "all", "params": self.parameters(), "lr": 0.1}]


class BackboneAlone(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [{"name": "all", "params": self.backbone.parameters(), "lr": 0.1}]


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (OneGroup, {}, r"group 'all' holds parameters of 'backbone' and others.*param_groups\(\)"),
        (BackboneAlone, {}, "one with others, and all hold the former"),
        (Small, {"backbone": "trunk"}, r"Small has no module 'trunk': .*\(backbone="),
        (Small, {"lambda_func": lambda epoch: None}, r"lambda_func\(2\) gave None: return"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(
    task: Any, arguments: Dict[str, Any], message: str
) -> None:
    with pytest.raises(RateError, match=message):
        quiet_trainer(max_epochs=2, callbacks=BackboneFinetuning(0, **arguments)).fit(
            task(), data()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unfreeze_backbone_at_epoch": -1}, "-1: give an epoch, from 0"),
        ({"lambda_func": 2}, "give a function of the epoch"),
        ({"backbone_initial_ratio_lr": 0}, "ratio_lr=0: give a number above 0"),
        ({"backbone_initial_lr": float("nan")}, "initial_lr=nan: give a number above 0"),
        ({"should_align": 1}, "should_align=1: give True or False"),
        ({"train_bn": None}, "train_bn=None: give True or False"),
        ({"initial_denom_lr": 10}, "'initial_denom_lr': backbone_initial_ratio_lr says it: leave"),
        ({"verbose": True}, "'verbose': each change is logged: leave it out"),
        ({"unfreeze": 3}, "no argument 'unfreeze'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: Dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BackboneFinetuning(**arguments)
