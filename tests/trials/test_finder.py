"""The lr finder raises all groups' rates together, and leaves no trace."""

from __future__ import annotations

import html
import math
import random
import re
import sys
from typing import Any, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer, weights_of
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset

from ofengine import Callback, ConfigurationError, DataError, RateError, TaskModule
from ofengine.callbacks import LRDecayCallback
from ofengine.rates.finder import LRFinder, smooth


class Samples(Dataset):
    """Forty samples, with noise from a generator of its own."""

    def __init__(self) -> None:
        numbers = np.random.RandomState(0)
        self.inputs = numbers.standard_normal((40, 6)).astype("float32")
        self.noise = np.random.RandomState(3)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        noise = self.noise.standard_normal(6) + random.random() + np.random.rand()
        inputs = self.inputs[index]
        return inputs + 0.01 * noise.astype("float32"), np.int64(inputs.sum() > 0)


class Everything(TaskModule):
    """Dropout, batch norm, a schedule, decay, and attributes that change as it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 2)
        self.register_buffer("ages", flow.zeros(1))
        self.batches_seen = 0
        self.history: List[int] = []
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        hidden = self.dropout(flow.relu(self.norm(self.stem(inputs))))
        return nn.functional.cross_entropy(self.head(hidden), labels)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches_seen += 1
        self.history.append(batch_idx)
        self.ages.add_(1.0)

    def param_groups(self) -> List[Dict[str, Any]]:
        stem = [*self.stem.parameters(), *self.norm.parameters()]
        return [
            {"name": "stem", "params": stem, "lr_scale": 0.1, "lr_decay_scale": 0.9},
            {"name": "head", "params": self.head.parameters()},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=1e-2, momentum=0.9)
        cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": cosine}


class OneOptimizer(Everything):
    """Makes its optimizer once."""

    def __init__(self) -> None:
        super().__init__()
        self.made = flow.optim.Adam(self.param_groups(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.made


def fitted(cls: Any, find: bool, **arguments: Any) -> TaskModule:
    random.seed(5)
    np.random.seed(5)
    generator = flow.Generator("cpu")
    generator.manual_seed(9)
    loader = DataLoader(Samples(), batch_size=8, shuffle=True, generator=generator)
    task = cls()
    trainer = quiet_trainer(max_epochs=2, **arguments)
    if cls is OneOptimizer:
        trainer.fit(task, loader)  # so that there is a state to be kept
    if find:
        before = dict(vars(trainer))
        found = trainer.lr_find(task, loader, num_steps=12, min_lr=1e-3, max_lr=10.0)
        assert len(found.rates) == 12
        assert dict(vars(trainer)) == before
    trainer.fit(task, loader)
    return task


@pytest.mark.parametrize("cls", [Everything, OneOptimizer])
@pytest.mark.parametrize("seed", [3, None])
def test_a_fit_afterwards_is_the_same_bit_for_bit(mode: str, cls: Any, seed: Optional[int]) -> None:
    without, after = (fitted(cls, find, mode=mode, seed=seed) for find in (False, True))
    assert_same_weights(after, without)
    assert after.batches_seen == without.batches_seen
    assert after.history == without.history


def test_the_same_with_accumulation_and_clipping(mode: str) -> None:
    arguments: Dict[str, Any] = {"mode": mode, "seed": 1, "accumulate_grad_batches": 2}
    arguments["gradient_clip_val"] = 0.1
    assert_same_weights(
        fitted(Everything, True, **arguments), fitted(Everything, False, **arguments)
    )


def test_generators_are_where_they_were() -> None:
    def drawn(find: bool) -> List[Any]:
        random.seed(1)
        np.random.seed(1)
        task, own = Everything(), Samples()
        flow.manual_seed(1)
        dropout = task.dropout.generator
        if find:
            quiet_trainer(seed=4).lr_find(task, DataLoader(own, batch_size=8), num_steps=4)
        assert task.dropout.generator is dropout
        masked = task.dropout(flow.ones(20)).numpy().tolist()
        return [random.random(), np.random.rand(), flow.rand(2).tolist(), own.noise.rand(), masked]

    assert drawn(True) == drawn(False)


class Linear(TaskModule):
    """Two layers in two groups; trains towards 0."""

    def __init__(
        self, lr: float = 0.5, key: str = "lr_scale", scale: float = 0.25, other: float = 0.01
    ) -> None:
        super().__init__()
        self.other = other
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 1, bias=False)
        self.options = {"lr": lr, key: scale}
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.second(self.first(batch)) ** 2).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        second = {"name": "second", "params": self.second.parameters(), "lr": self.other}
        return [{"name": "first", "params": self.first.parameters(), **self.options}, second]


def batches(count: int = 3) -> List[Any]:
    numbers = np.random.RandomState(2)
    return [flow.tensor(numbers.standard_normal((4, 3)).astype("float32")) for _ in range(count)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_equal_those_of_a_hand_written_loop(mode: str, accumulate: int) -> None:
    data = batches(4)
    trainer = quiet_trainer(mode=mode, accumulate_grad_batches=accumulate)
    found = trainer.lr_find(Linear(), data, min_lr=1e-2, max_lr=1.0, num_steps=5)
    # The largest rate is that of "first": 0.5 * 0.25. "second" keeps 0.01 / 0.125 of it.
    hand = Linear()
    optimizer = flow.optim.SGD(
        [{"params": hand.first.parameters()}, {"params": hand.second.parameters()}], lr=1.0
    )
    following, losses = iter(data * 4), []
    for step in range(5):
        rate = 1e-2 * 100 ** (step / 4)
        for group, ratio in zip(optimizer.param_groups, (1.0, 0.08)):
            group["lr"] = rate * ratio
        window = [hand.training_step(next(following), 0) for _ in range(accumulate)]
        for loss in window:
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in window) / accumulate)
        assert found.rates[step] == pytest.approx(rate, rel=1e-6)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.group == "first"


def test_a_linear_sweep_and_the_lr_to_write() -> None:
    found = quiet_trainer().lr_find(
        Linear(), batches(), min_lr=0.1, max_lr=0.5, num_steps=5, mode="linear"
    )
    assert found.rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert found.lrs(0.25) == pytest.approx({"first": 1.0, "second": 0.02})


def test_decay_and_the_cookbooks_key_are_left_out(mode: str) -> None:
    task = Linear(key="lr_scale", scale=0.5)
    callbacks = [LRDecayCallback(1, key="lr_scale")]  # here lr_scale decays, and scales nothing
    trainer = quiet_trainer(mode=mode, callbacks=callbacks)
    found = trainer.lr_find(task, batches(), min_lr=0.1, max_lr=0.2, num_steps=3)
    assert found.rates == pytest.approx([0.1, 0.1 * 2**0.5, 0.2])
    assert found.lrs(0.2) == pytest.approx({"first": 0.2, "second": 0.004})


def test_callbacks_and_validation_stay_out() -> None:
    class Never(Callback):
        def setup(self, trainer: Any, task: Any, stage: str) -> None:
            raise AssertionError("a callback of the Trainer ran")

    class Validates(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("validation ran")

        def val_dataloader(self) -> Any:
            return batches()

    trainer = quiet_trainer(callbacks=[Never()])
    assert len(trainer.lr_find(Validates(), batches(), num_steps=7).losses) == 7


def test_it_stops_where_the_loss_grows_or_is_not_finite() -> None:
    class Told(Linear):
        losses: List[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 0.0 + self.losses[self.trainer.global_step]

    def found(
        losses: List[float], settings: Optional[Dict[str, Any]] = None, **arguments: Any
    ) -> LRFinder:
        task = Told()
        task.losses = losses
        trainer = quiet_trainer(**(settings or {}))
        return trainer.lr_find(task, batches(), num_steps=6, **arguments)

    calm = found([1.0, 1.0, 1.0, 9.0, 1.0, 1.0])
    # The mean of 1, 1, 1, 9 is about 3; then of 1, 1, 1, 99 about 25.
    assert not calm.stopped_early
    wild = found([1.0, 1.0, 1.0, 99.0, 1.0, 1.0])
    assert (wild.stopped_early, wild.losses) == (True, [1.0, 1.0, 1.0, 99.0])
    assert not found([1.0, 1.0, 1.0, 99.0, 1.0, 1.0], early_stop_threshold=None).stopped_early
    broken = found([1.0, math.nan, 1.0, 1.0, 1.0, 1.0], early_stop_threshold=None)
    assert (broken.stopped_early, len(broken.losses)) == (True, 2)
    # What a fit would make of it is not asked.
    for settings in ({"min_epochs": 3}, {"min_steps": 6}, {"detect_anomaly": True}):
        wild = found([1.0, 1.0, 99.0, 1.0, 1.0, 1.0], settings)
        broken = found([1.0, math.nan, 1.0, 1.0, 1.0, 1.0], settings)
        assert (len(wild.losses), len(broken.losses)) == (3, 2)
    # A loss below 0 is not taken for one that grew.
    assert not found([-1.0, -0.9, -0.8, -0.9, -1.0, -1.0]).stopped_early


def test_all_is_put_back_after_an_error(mode: str) -> None:
    class Fails(Everything):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.batches_seen == 3:
                raise KeyError("in a hook")

    task = Fails()
    before = weights_of(task)
    with pytest.raises(KeyError, match="in a hook"):
        quiet_trainer(mode=mode).lr_find(task, DataLoader(Samples(), batch_size=8), max_lr=10.0)
    assert all(np.array_equal(before[name], array) for name, array in weights_of(task).items())
    assert (task.batches_seen, task.history) == (0, [])
    assert "configure_optimizers" not in vars(task)


def test_mistakes() -> None:
    trainer, task = quiet_trainer(), Linear()
    for wrong in (
        {"min_lr": 0.0}, {"min_lr": 2.0}, {"max_lr": math.inf}, {"num_steps": 1}, {"mode": "log"},
        {"early_stop_threshold": 1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            trainer.lr_find(task, batches(), **wrong)
    with pytest.raises(DataError, match="only once"):
        trainer.lr_find(task, iter(batches()))
    with pytest.raises(RateError, match="rate above 0"):
        trainer.lr_find(Linear(scale=0.0, other=0.0), batches())


def result(smoothed: List[float], mode: str = "exponential") -> LRFinder:
    """A finder's result whose smoothed losses are the given ones."""
    averages = [0.0, *(s * (1 - 0.98 ** (i + 1)) for i, s in enumerate(smoothed))]
    losses = [(b - 0.98 * a) / 0.02 for a, b in zip(averages, averages[1:])]
    count = len(smoothed)
    rates = [1e-5 * 1e5 ** (i / (count - 1)) for i in range(count)]
    return LRFinder(rates, losses, {"a": 0.1}, "a", 0.1, mode)


def test_smoothing_is_the_bias_corrected_average() -> None:
    # By hand: a1 = 0.02 * 2, a2 = 0.98 * a1 + 0.02 * 4, over 1 - 0.98 and 1 - 0.98 ** 2.
    assert smooth([2.0, 4.0]) == pytest.approx([2.0, (0.98 * 0.04 + 0.08) / 0.0396])
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)


def test_the_suggestion_is_where_the_loss_falls_most_steeply() -> None:
    # A logistic curve in the logarithm of the rate is steepest at its middle.
    curve = [2.0 - 1 / (1 + math.exp(-(i - 60) / 5)) for i in range(101)]
    found = result(curve)
    assert found.suggestion() == pytest.approx(1e-5 * 1e5**0.6)
    assert found.lrs() == pytest.approx({"a": 1e-5 * 1e5**0.6})
    assert "suggestion 0.01" in str(found)
    # Left out at the begin and at the end:
    early = result([3.0, 1.0, *curve])
    assert early.suggestion(skip_begin=0) == pytest.approx(early.rates[0], rel=0.2)
    assert early.suggestion() == pytest.approx(1e-5 * 1e5 ** (62 / 102))


def test_there_is_no_suggestion_where_the_loss_never_falls() -> None:
    found = result([1.0 + i for i in range(30)])
    assert found.suggestion() is None
    assert "no suggestion" in str(found)
    with pytest.raises(RateError, match="never fell"):
        found.lrs()
    assert result([1.0] * 5).suggestion() is None


def test_a_notebook_gets_the_rates_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    base = {"<b>": 0.1, "head": 0.4}
    found = LRFinder(rates * 4, [3.0] * 12 + [2.0] * 4, base, "<b>", 0.1)
    shown = found._repr_html_()
    assert html.escape(str(found)) in shown
    cells = [html.unescape(each) for each in re.findall(r">([^<>]*)</td>", shown)]
    expected = [[name, f"{base[name]:g}", f"{lr:.4g}"] for name, lr in found.lrs().items()]
    assert cells == [cell for row in expected for cell in row]
    assert cells[0] == "<b>"
    never = LRFinder(rates, [1.0, 2.0, 3.0, 4.0], base, "head", 0.4)._repr_html_()
    assert "no suggestion" in never
    assert "<td" not in never


def test_pictures(tmp_path: Any) -> None:
    curve = [2.0 - 1 / (1 + math.exp(-(i - 60) / 5)) for i in range(90)] + [9.0, 90.0]
    found = result(curve)
    for plain in (False, True):
        text = found.draw(plain=plain)
        assert max(map(len, text.splitlines())) <= 80
        assert f"suggestion {found.suggestion():.3g}" in text
        assert text.isascii() == plain
    assert "nothing to draw" in LRFinder([], [], {}, "a", 1.0).draw()
    with pytest.raises(ConfigurationError, match="at least 40"):
        found.draw(width=10)
    pytest.importorskip("matplotlib")
    assert found._repr_html_().count("</svg>") == 1
    assert found.plot(tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
