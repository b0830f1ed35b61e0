"""Batches that say what they weigh: a window is their weighted mean, equal in both modes."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, fill_deterministically, quiet_trainer, refused
from helpers.stopping import check_stopping
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule
from ofengine.errors import OFEngineWarning

TOKENS = [6, 2, 5, 4, 3]
"""How many tokens each batch has; of each, some are masked."""


def token_batches() -> List[Any]:
    generator = np.random.RandomState(0)
    made = []
    for count in TOKENS:
        x = generator.standard_normal((count, 3)).astype("float32")
        mask = (generator.rand(count) < 0.7).astype("float32")
        mask[0] = 1.0
        made.append((flow.tensor(x), flow.tensor(mask)))
    return made


class Tokens(TaskModule):
    """The mean loss of the tokens of a batch; ``kind`` says how their number is told."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.kind = kind
        fill_deterministically(self, 0, 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, mask = batch
        loss = (self.layer(x).pow(2).sum(1) * mask).sum() / mask.sum()
        if self.kind == "none":
            return loss
        weights = {
            "tensor": mask.sum(),
            "one element": mask.sum().reshape(1),
            "whole": mask.sum().to(flow.int64),
            "number": float(len(x)),
            "nothing": mask.sum() * 0,
        }
        return {"loss": loss, "weight": weights[self.kind]}

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fitted(mode: str, kind: str = "tensor", **arguments: Any) -> Tokens:
    return fitted_task(mode, Tokens(kind), **arguments)


def fitted_task(mode: str, task: Tokens, **arguments: Any) -> Tokens:
    quiet_trainer(mode=mode, max_epochs=2, **arguments).fit(task, token_batches())
    return task


def by_hand(window: int, weigh: Any, clip: float = 0.0) -> Tokens:
    """OneFlow's own loop: sums of w * gradient, divided by the sum of w."""
    task = Tokens("none")
    optimizer, batches = task.configure_optimizers(), token_batches()
    for _ in range(2):
        for start in range(0, len(batches), window):
            total: Any = None
            for x, mask in batches[start : start + window]:
                weight = weigh(x, mask)
                (task.training_step((x, mask), 0) * weight).backward()
                total = weight if total is None else total + weight
            for parameter in task.parameters():
                parameter.grad = parameter.grad / total
            if clip:
                nn.utils.clip_grad_norm_(task.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return task


@pytest.mark.parametrize("kind", ["tensor", "one element", "whole", "number"])
def test_a_window_is_what_a_loop_by_hand_makes_of_it(mode: str, kind: str) -> None:
    def weigh(x: Any, mask: Any) -> Any:
        return flow.tensor(float(len(x))) if kind == "number" else mask.sum()

    assert bits(fitted(mode, kind, accumulate_grad_batches=2)) == bits(by_hand(2, weigh))


def test_it_is_clipped_after_it_is_weighed(mode: str) -> None:
    ours = fitted(mode, accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert bits(ours) == bits(by_hand(3, lambda x, mask: mask.sum(), clip=0.1))


def test_a_window_of_all_batches_is_one_batch_of_all_tokens(mode: str) -> None:
    whole = Tokens("none")
    together = [tuple(flow.cat(each) for each in zip(*token_batches()))]
    quiet_trainer(max_epochs=2).fit(whole, together)
    ours = fitted(mode, accumulate_grad_batches=5)
    unweighed = fitted(mode, "none", accumulate_grad_batches=5)
    for name, parameter in whole.named_parameters():
        expected = parameter.numpy()
        assert np.allclose(dict(ours.named_parameters())[name].numpy(), expected, atol=1e-6)
        assert not np.allclose(
            dict(unweighed.named_parameters())[name].numpy(), expected, atol=1e-3
        )


def test_without_accumulation_a_weight_changes_no_bit(mode: str) -> None:
    assert bits(fitted(mode)) == bits(fitted(mode, "none"))


def test_windows_that_weigh_nothing_train_nothing(mode: str) -> None:
    assert bits(fitted(mode, "nothing", accumulate_grad_batches=2)) == bits(Tokens())


def test_the_weight_is_among_the_outputs(mode: str) -> None:
    class Outputs(Callback):
        def __init__(self) -> None:
            self.weights: List[float] = []

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Dict[str, Any], batch: Any, i: int
        ) -> None:
            self.weights.append(float(outputs["weight"].numpy()))

    outputs = Outputs()
    fitted(mode, accumulate_grad_batches=2, callbacks=outputs)
    assert outputs.weights == [float(mask.numpy().sum()) for _, mask in token_batches()] * 2


@pytest.mark.parametrize(
    ("mode", "other"),
    [
        pytest.param(*both, marks=[] if both == ("graph", "eager") else pytest.mark.slow)
        for both in itertools.product(["eager", "graph"], repeat=2)
    ],
)
def test_a_run_goes_on_within_a_window(mode: str, other: str, tmp_path: Path) -> None:
    setting: Dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 2}
    check_stopping(tmp_path, mode, token_batches, every=3, other=other, task=Tokens, **setting)


# ---------------------------------------------------------------------- mistakes


class Wrong(Tokens):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)["loss"], "weight": self.weight}


@pytest.mark.parametrize("accumulate", [2, 1, {0: 1, 5: 4}], ids=str)
@pytest.mark.parametrize("weight", [-1, float("nan"), True, "3", None])
def test_a_weight_that_is_none_is_told(mode: str, weight: Any, accumulate: Any) -> None:
    refused(
        Wrong(weight), ConfigurationError, "Wrong.training_step returned the weight", "from 0 on",
        mode=mode, train=token_batches(), accumulate_grad_batches=accumulate,
    )  # fmt: skip


class Keyed(Tokens):
    """Returns its weight under another key."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        returned = super().training_step(batch, batch_idx)
        return {"loss": returned["loss"], self.key: returned["weight"]}


@pytest.mark.parametrize("key", ["wieght", "weights", "weigth", "wight"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_key_that_is_almost_weight_is_told_once(mode: str, key: str, accumulate: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted_task(mode, Keyed(key), accumulate_grad_batches=accumulate)
    told = [str(each.message) for each in caught if key in str(each.message)]
    assert told == [
        f"Keyed.training_step returned a dict with the key {key!r}: did you mean 'weight', by "
        "which batches are averaged?"
    ]


@pytest.mark.parametrize("key", ["height", "eight", "width", "scores", "loss_1"])
def test_other_keys_are_the_user_s(mode: str, key: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        fitted_task(mode, Keyed(key))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_weight_of_many_elements_is_told(mode: str, accumulate: int) -> None:
    class Many(Tokens):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx)["loss"], "weight": batch[1]}

    refused(
        Many(), ConfigurationError, r"a weight of shape \(6,\)", r"\.sum\(\)", mode=mode,
        train=token_batches(), accumulate_grad_batches=accumulate,
    )  # fmt: skip


def test_a_weight_for_a_part_of_a_window_is_told(mode: str) -> None:
    class Part(Tokens):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return outputs if len(batch[0]) == 6 else outputs["loss"]

    refused(
        Part(), ConfigurationError, "returned a weight for 1 of the 2 batches", mode=mode,
        train=token_batches(), accumulate_grad_batches=2, trained=1,
    )  # fmt: skip
