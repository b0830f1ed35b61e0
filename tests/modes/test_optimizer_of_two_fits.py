"""A fit begins with what its optimizer object holds, and leaves there what it ended with."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, bits, quiet_trainer, random_rows
from oneflow import nn
from oneflow.optim.lr_scheduler import StepLR

from ofengine import TaskModule

OPTIMIZERS: Dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: flow.optim.SGD(p, lr=0.05),
    "momentum": lambda p: flow.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: flow.optim.Adam(p, lr=0.05),
    "amsgrad": lambda p: flow.optim.Adam(p, lr=0.05, amsgrad=True),
    "adamw": lambda p: flow.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: flow.optim.RMSprop(p, lr=0.05, centered=True),
    "adagrad": lambda p: flow.optim.Adagrad(
        p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.2
    ),
    "adadelta": lambda p: flow.optim.Adadelta(p, lr=0.5),
    "lamb": lambda p: flow.optim.LAMB(p, lr=0.05),
}
BATCHES = random_rows([4] * 5, 3)
ORDERS = list(itertools.product(["eager", "graph"], repeat=3))
SOME_ORDERS = [
    ("eager", "graph", "eager"),
    ("graph", "graph", "eager"),
    ("graph", "eager", "graph"),
]
"""Each mode after each and at each place."""


class Holds(TaskModule):
    """Makes its optimizer once, for all its fits."""

    def __init__(self, kind: str, schedule: Any = None) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        generator = np.random.RandomState(3)
        with flow.no_grad():
            for parameter in self.parameters():
                values = generator.standard_normal(tuple(parameter.shape)).astype("float32")
                parameter.copy_(flow.tensor(values))
        self.own = OPTIMIZERS[kind](self.net.parameters())
        self.schedule = StepLR(self.own, 3, 0.5) if schedule == "steps" else schedule
        self.fails_at: Optional[int] = None

    def loss(self, batch: Any) -> Any:
        return (self.net(batch) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        if self.schedule is None:
            return self.own
        return {"optimizer": self.own, "lr_scheduler": self.schedule}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.fails_at:
            self.fails_at = None
            raise ValueError


def by_hand(task: Holds) -> None:
    """What one fit of an epoch does."""
    for batch in BATCHES:
        task.loss(batch).backward()
        task.own.step()
        task.own.zero_grad(set_to_none=True)
        if isinstance(task.schedule, StepLR):
            task.schedule.step()


def after(kind: str, how: Sequence[str], schedule: Any = None, **arguments: Any) -> Holds:
    """A task that was trained for an epoch in each of these ways, one after the other."""
    task = Holds(kind, schedule)
    for each in how:
        if each == "by hand":
            by_hand(task)
        else:
            quiet_trainer(mode=each, max_epochs=1, **arguments).fit(task, BATCHES)
    return task


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_second_fit_goes_on_in_either_mode(kind: str) -> None:
    expected = after(kind, ["eager"] * 3)
    assert expected.own.state_dict()["state"]["step"] == 15
    for how in ORDERS[1:] if kind == "adam" else SOME_ORDERS:
        task = after(kind, how)
        assert_same_weights(task, expected)
        assert task.own.state_dict()["state"]["step"] == 15


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
@pytest.mark.parametrize("schedule", [None, "steps"])
def test_it_is_a_loop_by_hand_that_goes_on(kind: str, schedule: Any) -> None:
    expected = after(kind, ["by hand"] * 3, schedule)
    orders = ORDERS if (kind, schedule) == ("momentum", "steps") else SOME_ORDERS
    for how in [*orders, ("graph", "by hand", "graph"), ("by hand", "graph", "by hand")]:
        assert_same_weights(after(kind, how, schedule), expected)


@pytest.mark.parametrize("kind", ["adam", "adagrad", "lamb"])
def test_a_loop_by_hand_between_two_fits(kind: str) -> None:
    expected = after(kind, ["eager", "by hand", "eager"])
    for how in (["graph", "by hand", "graph"], ["eager", "by hand", "graph"]):
        assert_same_weights(after(kind, how), expected)


def decays(step: int) -> float:
    return 1.0 / (1 + step)


@pytest.mark.parametrize("kind", ["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_are_those_of_the_fit_and_steps_those_of_the_optimizer(
    kind: str, accumulate: int
) -> None:
    arguments: Dict[str, Any] = {"accumulate_grad_batches": accumulate}
    expected = after(kind, ["eager"] * 2, decays, **arguments)
    for how in itertools.product(["eager", "graph"], repeat=2):
        assert_same_weights(after(kind, how, decays, **arguments), expected)


def test_after_a_fit_that_broke_off() -> None:
    weights: List[Any] = []
    for first, second in itertools.product(["eager", "graph"], repeat=2):
        task = Holds("momentum", decays)
        task.fails_at = 2
        with pytest.raises(ValueError):
            quiet_trainer(mode=first, max_epochs=1).fit(task, BATCHES)
        assert task.own.state_dict()["state"]["step"] == 3
        quiet_trainer(mode=second, max_epochs=1).fit(task, BATCHES)
        weights.append(bits(task))
    assert all(each == weights[0] for each in weights)


def test_what_is_frozen_in_between_keeps_its_state() -> None:
    def frozen_in_the_second(how: Sequence[str]) -> Holds:
        task = Holds("adam")
        for number, each in enumerate(how):
            task.net.bias.requires_grad_(number != 1)
            told: Any = pytest.warns(UserWarning) if number == 1 else contextlib.nullcontext()
            with told:
                quiet_trainer(mode=each, max_epochs=1).fit(task, BATCHES)
        return task

    expected = frozen_in_the_second(["eager"] * 3)
    for how in SOME_ORDERS:
        assert_same_weights(frozen_in_the_second(how), expected)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("other", ["eager", "graph"])
def test_a_second_fit_can_be_resumed(mode: str, other: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    whole = Holds(kind, decays)
    quiet_trainer(mode=mode, max_epochs=1).fit(whole, BATCHES)
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(whole, BATCHES)
    trainer.save_checkpoint(path)
    quiet = quiet_trainer(mode=mode, max_epochs=2)
    quiet.fit(whole, BATCHES, ckpt_path=path)
    assert whole.own.state_dict()["state"]["step"] == 15

    resumed = Holds(kind, decays)
    quiet_trainer(mode=other, max_epochs=2).fit(resumed, BATCHES, ckpt_path=path)
    assert_same_weights(resumed, whole)
    assert resumed.own.state_dict()["state"]["step"] == 15


@pytest.mark.parametrize("kind", ["momentum", "adagrad"])
def test_a_used_optimizer_that_is_resumed_holds_the_checkpoint_s_state_alone(
    mode: str, kind: str, tmp_path: Path
) -> None:
    # The bias had no state in the checkpoint, and has some in the optimizer of now.
    path = tmp_path / "saved.safetensors"
    first = Holds(kind)
    first.net.bias.requires_grad_(False)
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    with pytest.warns(UserWarning, match="frozen"):
        trainer.fit(first, BATCHES)
    trainer.save_checkpoint(path)
    used = after(kind, ["eager", mode])
    fresh = Holds(kind)
    for task in (used, fresh):
        quiet_trainer(mode=mode, max_epochs=2).fit(task, BATCHES, ckpt_path=path)
    assert_same_weights(used, fresh)
