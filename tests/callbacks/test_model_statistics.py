"""ModelStatistics and ``trainer.leaving_no_trace``: exact, equal in both modes, without a trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, fill_deterministically, image_batches, quiet_trainer
from helpers.tiny import Tiny, tiny_batches
from oneflow import nn

from ofengine import Callback, ConfigurationError, NonFiniteError, TaskModule
from ofengine.callbacks import ModelStatistics
from ofengine.metrics import Accuracy

ROWS = 8


class Net(TaskModule):
    """What a second computation could leave traces of: buffers, generators, metrics, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.accuracy = Accuracy()
        fill_deterministically(self.body, spread=0.4)
        fill_deterministically(self.head, spread=0.4, seed=3)
        fill_deterministically(self.frozen, spread=0.4, seed=5)

    def forward(self, x: Any) -> Any:
        return self.frozen(self.head(self.drop(self.body(x)) + flow.rand(6) * 0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.accuracy.update(scores, y)
        self.log("acc", self.accuracy, on_epoch=True)
        self.log("again", loss, on_step=True, on_epoch=True)
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"name": "body", "params": self.body.parameters(), "lr": 0.1},
            {"name": "head", "params": self.head.parameters(), "lr": 0.2},
        ]

    def configure_optimizers(self) -> Any:
        return flow.optim.AdamW(self.param_groups())


def data(count: int = 4) -> Any:
    return image_batches([ROWS] * count, (4,), classes=3)


def trained(mode: str, *callbacks: Any, **options: Any) -> Any:
    net = Net()
    trainer = quiet_trainer(
        mode=mode, **{"max_epochs": 2, "seed": 7, "callbacks": list(callbacks), **options}
    )
    trainer.fit(net, data())
    return net, trainer


def statistics(trainer: Any) -> Dict[int, Dict[str, float]]:
    rows = {}
    for row in trainer.history:
        found = {n: v for n, v in row.items() if n.startswith(("gradients/", "activations/"))}
        if found:
            rows[int(row["step"])] = found
    return rows


def rest(trainer: Any) -> List[Dict[str, float]]:
    kept = [
        {n: v for n, v in row.items() if not n.startswith(("gradients/", "activations/"))}
        for row in trainer.history
    ]
    return [row for row in kept if len(row) > 2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_what_it_would_be_without(mode: str, accumulate: int) -> None:
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    without, plain = trained(mode, **options)
    net, trainer = trained(mode, ModelStatistics(every_n_steps=2), **options)
    assert bits(net) == bits(without)
    assert rest(trainer) == rest(plain)
    assert list(statistics(trainer)) == list(range(0, 8 // accumulate, 2))
    assert not any(module._forward_hooks for module in net.modules())


def test_both_modes_have_the_same_numbers() -> None:
    both = [statistics(trained(m, ModelStatistics(2))[1]) for m in ("eager", "graph")]
    assert both[0] == both[1]
    assert len(both[0][4]) == 6 * (3 + 6)  # the gradients of three modules, the activations of six


class ByHand(Callback):
    """The gradients of each step as eager mode has them anyway."""

    def __init__(self) -> None:
        self.seen: Dict[int, Dict[str, np.ndarray]] = {}

    def on_after_backward(self, trainer: Any, task: Any) -> None:
        self.seen[trainer.global_step] = {
            name: p.grad.numpy().copy() for name, p in task.named_parameters() if p.requires_grad
        }


def expected(arrays: List[np.ndarray]) -> Dict[str, float]:
    """By the definitions, number by number."""
    x = [float(each) for array in arrays for each in array.reshape(-1)]
    mean = sum(x) / len(x)
    return {
        "norm": sum(each * each for each in x) ** 0.5,
        "mean": mean,
        "std": (sum((each - mean) ** 2 for each in x) / len(x)) ** 0.5,
        "max": max(abs(each) for each in x),
        "zeros": sum(each == 0 for each in x) / len(x),
        "not_finite": 0.0,
    }


@pytest.mark.parametrize("by", ["module", "group"])
def test_gradients_are_those_of_the_step(by: str) -> None:
    by_hand = ByHand()
    _, trainer = trained("eager", ModelStatistics(3, activations=False, by=by), by_hand)
    owners = {"module": ["body.0", "body.1", "head"], "group": ["body", "head"]}[by]
    for step, row in statistics(trainer).items():
        seen = by_hand.seen[step]
        assert len(row) == 6 * len(owners)
        for owner in owners:
            arrays = [seen[name] for name in seen if name.startswith(owner + ".")]
            for quantity, value in expected(arrays).items():
                assert row[f"gradients/{owner}/{quantity}"] == pytest.approx(value, rel=1e-12)


def test_activations_are_those_of_the_modules_in_place_ones_too(mode: str) -> None:
    task, batch = Tiny(), tiny_batches()[0]
    weights, bias = task.body.weight.numpy(), task.body.bias.numpy()
    after_body = batch[0].numpy() @ weights.T + bias
    after_head = after_body @ task.head.weight.numpy().T + task.head.bias.numpy()
    statistic = ModelStatistics(100, gradients=False, quantities=["norm", "mean", "max"])
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=statistic)
    trainer.fit(task, tiny_batches())
    (row,) = statistics(trainer).values()
    assert len(row) == 6
    for name, array in (("body", after_body), ("head", after_head)):
        for quantity in ("norm", "mean", "max"):
            wanted = expected([array])[quantity]
            assert row[f"activations/{name}/{quantity}"] == pytest.approx(wanted, rel=1e-6)
    _, trainer = trained(mode, ModelStatistics(100, gradients=False))
    row = statistics(trainer)[0]
    assert row["activations/body.1/zeros"] == 0  # seen before the ReLU wrote into it
    assert 0 < row["activations/body.2/zeros"] < 1


def test_modules_and_shares_of_what_is_not_finite(mode: str) -> None:
    task = Tiny()
    with flow.no_grad():
        task.head.weight[0, 0] = float("inf")
    batches = [(flow.ones(2, 2), flow.zeros(2, 1))]
    trainer = quiet_trainer(
        mode=mode, max_epochs=1, max_steps=1,
        callbacks=ModelStatistics(1, modules=["h*"], quantities=["not_finite", "max"]),
    )  # fmt: skip
    with pytest.warns(match="not finite"), pytest.raises(NonFiniteError):
        trainer.fit(task, batches)
    (row,) = statistics(trainer).values()
    assert set(row) == {
        "gradients/head/not_finite", "gradients/head/max",
        "activations/head/not_finite", "activations/head/max",
    }  # fmt: skip
    assert row["activations/head/not_finite"] == 1.0


def test_a_resumed_run_looks_at_the_same_steps(mode: str, tmp_path: Path) -> None:
    class Saving(Callback):
        fires_last = True

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.batches_seen == 5:  # in the middle of a window that was looked at
                trainer.save_checkpoint(tmp_path / "x.safetensors")

    options = {"accumulate_grad_batches": 2}
    whole, trainer = trained(mode, ModelStatistics(2), Saving(), **options)
    resumed, again = Net(), quiet_trainer(
        mode=mode, max_epochs=2, seed=7, callbacks=[ModelStatistics(2)], **options
    )  # fmt: skip
    again.fit(resumed, data(), ckpt_path=tmp_path / "x.safetensors")
    assert bits(resumed) == bits(whole)
    assert statistics(again) == statistics(trainer)


def test_leaving_no_trace_undoes_what_a_step_does_besides(mode: str) -> None:
    class Busy(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.notes = 0, {"list": [0]}
            self.register_buffer("seen_rows", flow.zeros(1))
            self.generator = np.random.default_rng(0)

    class Meddling(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
            with trainer.leaving_no_trace() as step:
                step(batch, batch_idx).backward()
                task.count, task.more = 5, 1
                task.notes["more"] = 1
                with flow.no_grad():
                    task.seen_rows.add_(1)
                    task.body.weight.mul_(0)
                task.head.weight.requires_grad_(False)
                task.eval()
                for each in (random.random, np.random.rand, task.generator.random):
                    each()
                flow.rand(3)

    class Draws(Callback):
        def __init__(self) -> None:
            self.drawn: List[Any] = []

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            own = task.generator.random()
            self.drawn += [random.random(), np.random.rand(), own, flow.rand(1).numpy().tolist()]

    found = []
    for callbacks in ([], [Meddling()]):
        draws, task = Draws(), Busy()
        quiet_trainer(mode=mode, max_epochs=2, seed=1, callbacks=[*callbacks, draws]).fit(
            task, tiny_batches()
        )
        assert (task.count, task.notes, hasattr(task, "more")) == (0, {"list": [0]}, False)
        found.append((bits(task), draws.drawn))
    assert found[0] == found[1]


def test_leaving_no_trace_is_for_training() -> None:
    message = "use it in a fit, from on_train_start on"
    with pytest.raises(ConfigurationError, match=message), quiet_trainer().leaving_no_trace():
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: give a whole number from 1 on, or None"),
        ({"gradients": 1}, "gradients=1: give True or False"),
        ({"gradients": False, "activations": False}, "would log nothing: leave one"),
        ({"by": "layer"}, r"by='layer': use one of \['group', 'module'\]"),
        ({"quantities": ["median"]}, r"quantities='median': use one of \['max', 'mean'"),
        ({"modules": "trunk*"}, r"modules='trunk\*'\): no module of Tiny is called so; it has 'bo"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: Dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(callbacks=ModelStatistics(**arguments)).fit(Tiny(), tiny_batches())
