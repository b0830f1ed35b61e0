"""What a compiled step draws is what eager mode draws, after a resume too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import oneflow as flow
import pytest
from flowvision.layers.regularization import DropPath, StochasticDepth
from helpers import (
    MODES,
    assert_same_weights,
    fill_deterministically,
    quiet_trainer,
    random_rows,
    resuming,
)
from helpers.resuming import Net, check_exact
from oneflow import nn

from ofengine import Callback, GraphModeError, TaskModule
from ofengine.modes.draws import Feed

functional = nn.functional


def levit_drop(x: Any) -> Any:
    return x * (flow.rand(x.size(0), 1, device=x.device) > 0.4)


def from_generator(x: Any) -> Any:
    return x + flow.rand(6, generator=GENERATOR) + functional.dropout(x, 0.5, generator=GENERATOR)


GENERATOR = flow.Generator("cpu")

CALLS: Dict[str, Callable[[Any], Any]] = {
    "functional.dropout": lambda x: functional.dropout(x, p=0.3),
    "functional.dropout in place": lambda x: functional.dropout(x * 1.0, 0.3, True, True),
    "functional.dropout with addend": lambda x: functional.dropout(x, 0.3, addend=x),
    "DropPath": DropPath(0.4).train(),
    "StochasticDepth of rows": StochasticDepth(0.4, "row").train(),
    "StochasticDepth of batches": StochasticDepth(0.4, "batch").train(),
    "a drop as in LeViT": levit_drop,
    "bernoulli of what was computed": lambda x: x * flow.bernoulli(x.sigmoid()),
    "bernoulli of p": lambda x: x * flow.bernoulli(x, 0.3),
    "rand and randn": lambda x: x * flow.rand(6) + flow.randn(x.shape[0], 1),
    "randn_like": lambda x: x + 0.1 * flow.randn_like(x),
    "randint": lambda x: x * flow.randint(1, 3, (6,)).to(flow.float32),
    "randint_like": lambda x: x * flow.randint_like(x, 1, 3).to(flow.float32),
    "normal": lambda x: x + flow.normal(0.0, 0.1, (6,)),
    "randperm": lambda x: x[:, flow.randperm(6)],
    "a single number": lambda x: x * (flow.rand(()) + functional.dropout(x.mean(), 0.3)),
    "a generator": from_generator,
}


class Draws(TaskModule):
    def __init__(self, call: Callable[[Any], Any], layer: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.dropout = nn.Dropout(0.2 if layer else 0.0)
        self.head = nn.Linear(6, 2)
        self.call = [call]  # in a list, or a module would be part of the task
        fill_deterministically(self, spread=0.5)

    def forward(self, x: Any) -> Any:
        return self.head(self.call[0](self.dropout(self.body(x).relu())))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.05, momentum=0.9)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: List[bytes] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.seen.append(outputs["loss"].numpy().tobytes())


def batches(sizes: Sequence[int] = (5, 5, 3, 5)) -> List[Any]:
    return random_rows(sizes, 4)


def run(mode: str, call: Callable[[Any], Any], layer: bool = False, **arguments: Any) -> Any:
    flow.manual_seed(5)
    GENERATOR.manual_seed(6)
    task, losses = Draws(call, layer), Losses()
    task.dropout.generator.manual_seed(7)
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=losses, **arguments)
    trainer.fit(task, batches(), batches((4, 4)))
    return task, losses.seen, trainer.callback_metrics["val"], flow.rand(3).numpy().tobytes()


WITHOUT_A_LAYER = ["functional.dropout", "StochasticDepth of rows", "rand and randn", "a generator"]
"""The others alone are slow ones; with a layer that draws too, every call is run."""
_ALONE = [
    pytest.param(n, False, marks=() if n in WITHOUT_A_LAYER else pytest.mark.slow) for n in CALLS
]


@pytest.mark.parametrize(("name", "layer"), [*_ALONE, *((n, True) for n in CALLS)])
def test_both_modes_draw_the_same_and_nothing_is_told(
    name: str, layer: bool, recwarn: pytest.WarningsRecorder
) -> None:
    ours, theirs = (run(mode, CALLS[name], layer) for mode in ("graph", "eager"))
    assert_same_weights(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]
    assert len(set(ours[1])) == len(ours[1])
    assert not [each for each in recwarn if "draws inside" in str(each.message)]


@pytest.mark.parametrize("name", ["functional.dropout", "StochasticDepth of rows"])
def test_with_accumulation(name: str) -> None:
    ours, theirs = (run(m, CALLS[name], accumulate_grad_batches=2) for m in ("graph", "eager"))
    assert_same_weights(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]


def test_what_draws_is_seen_to_draw() -> None:
    # Else the tests above would hold for steps without any randomness.
    for name, call in CALLS.items():
        x = flow.arange(1, 31).reshape(5, 6).to(flow.float32)
        assert len({call(x).numpy().tobytes() for _ in range(20)}) > 1, name


class Drops(Net):
    def forward(self, x: Any) -> Any:
        x = functional.dropout(self.norm(self.body(x)).relu(), 0.3, self.training)
        x = x * flow.bernoulli(flow.ones(x.shape[0], 1) * 0.8)
        return self.head(x + 0.1 * flow.randn(x.shape[0], 8))


@pytest.mark.parametrize(
    ("mode", "other"),
    [
        ("eager", "graph"),
        ("graph", "eager"),
        *(pytest.param(each, each, marks=pytest.mark.slow) for each in MODES),
    ],
)
def test_a_resumed_run_draws_on(
    mode: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "KINDS", ("batch", "epoch_end"))
    check_exact(tmp_path, mode, other, 1, task=Drops)


def test_oneflow_has_its_functions_back(mode: str) -> None:
    before = (flow.rand, flow._C.rand, flow._C.dropout, functional.dropout, flow.bernoulli)
    run(mode, CALLS["functional.dropout"])
    with pytest.raises(ZeroDivisionError), Feed(lambda example: example).replacing_calls():
        assert flow.rand is not before[0]
        raise ZeroDivisionError
    after = (flow.rand, flow._C.rand, flow._C.dropout, functional.dropout, flow.bernoulli)
    assert all(one is other for one, other in zip(after, before))


by_another_name = flow.rand

NOT_FED: Dict[str, Callable[[Any], Any]] = {
    "exponential": lambda x: x * flow.multinomial(flow.ones(6), 6).to(flow.float32),
    "uniform": lambda x: x * by_another_name(6),
    "bernoulli": lambda x: x * (x * 0.0 + 0.5).bernoulli_(0.5),
}


@pytest.mark.parametrize("operation", NOT_FED)
def test_what_cannot_be_drawn_ahead_is_told(operation: str) -> None:
    told = rf"training_step draws inside the compiled graph \({operation}\)"
    with pytest.warns(UserWarning, match=told):
        run("graph", NOT_FED[operation])


def test_draws_in_a_graph_of_ones_own_are_told(recwarn: pytest.WarningsRecorder) -> None:
    class Own(nn.Graph):
        def __init__(self, task: Draws) -> None:
            super().__init__()
            self.task = task
            self.add_optimizer(task.optimizer)

        def build(self, x: Any) -> Any:
            loss = self.task(x).square().mean()
            loss.backward()
            return loss

    class WithOwn(Draws):
        def build_graph(self) -> nn.Graph:
            return Own(self)

    task = WithOwn(levit_drop, layer=True)
    quiet_trainer(mode="graph", max_epochs=1).fit(task, batches())
    texts = [str(each.message) for each in recwarn]
    assert any("Own.build draws inside the compiled graph (dropout, uniform)" in t for t in texts)


@pytest.mark.parametrize("name", ["random", "numpy.random"])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_numbers_that_would_be_frozen_are_refused(name: str, step: str) -> None:
    draw = random.random if name == "random" else np.random.rand

    class Mixes(Draws):
        def forward(self, x: Any) -> Any:
            mixes = self.training is (step == "training_step")
            return super().forward(x * draw() if mixes else x)

    trainer = quiet_trainer(mode="graph", max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(GraphModeError, match=f"{step} draws from {name} inside a compiled step"):
        trainer.fit(Mixes(levit_drop), batches(), batches())
    trainer = quiet_trainer(mode="eager", max_epochs=1)
    trainer.fit(Mixes(levit_drop), batches(), batches())
