"""flowvision's schedulers (timm's form) as they stand, in both modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from flowvision import scheduler as fv
from helpers import quiet_trainer
from oneflow_steps import SHORT, Make, Moves, Task, Weights, engine_steps, ones, refused, sgd

from ofengine import Callback, ConfigurationError

BASE = ({"lr": 0.5}, {"lr": 0.2, "name": "second"})
STEPS: Dict[str, Any] = {"t_in_epochs": False}
WARM: Dict[str, Any] = {"warmup_t": 3, "warmup_lr_init": 1e-3, **STEPS}
SCHEDULERS: Dict[str, Make] = {
    "cosine": lambda o: fv.CosineLRScheduler(o, 4, t_mul=2.0, lr_min=0.01, decay_rate=0.7, **STEPS),
    "cosine, warm-up": lambda o: fv.CosineLRScheduler(o, 6, warmup_prefix=True, **WARM),
    "step": lambda o: fv.StepLRScheduler(o, 2, 0.5, **STEPS),
    "multi-step, warm-up": lambda o: fv.MultiStepLRScheduler(o, [4, 6], 0.3, **WARM),
    "linear, warm-up": lambda o: fv.LinearLRScheduler(o, 9, 0.1, **WARM),
    "polynomial": lambda o: fv.PolyLRScheduler(o, 6, power=0.9, cycle_limit=1, **STEPS),
    "tanh, warm-up": lambda o: fv.TanhLRScheduler(o, 9, cycle_limit=1, **WARM),
    "noise": lambda o: fv.StepLRScheduler(o, 3, 0.5, noise_range_t=(2, 5), **STEPS),
}


def by_hand(make: Make, count: int) -> List[List[float]]:
    """The rates of each step of a loop that calls ``step_update`` after each update."""
    optimizer = sgd(Weights(2), *BASE)
    scheduler = make(optimizer)
    rates = []
    for number in range(count):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step_update(number + 1)
    return rates


def kept_apart(rates: List[List[float]]) -> List[List[float]]:
    """What steps of these rates move two weights by that start at 0, in float32."""
    weights, rows = np.zeros(2, dtype=np.float32), []
    for row in rates:
        after = weights - np.array(row, dtype=np.float32)
        rows.append([float(a) - float(b) for a, b in zip(weights, after)])
        weights = after
    return rows


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_counts_steps(mode: str, name: str) -> None:
    make = SCHEDULERS[name]
    assert engine_steps(mode, Task(BASE, make), 8) == kept_apart(by_hand(make, 8))


def test_a_scheduler_that_counts_epochs(mode: str) -> None:
    """Of itself, without an interval."""

    def make(optimizer: Any) -> Any:
        return fv.CosineLRScheduler(optimizer, 4, warmup_t=2, warmup_lr_init=0.01)

    optimizer = sgd(Weights(2), *BASE)
    scheduler, rates = make(optimizer), []
    for epoch in range(4):
        rates += [[group["lr"] for group in optimizer.param_groups]] * 2
        scheduler.step(epoch + 1)
    assert engine_steps(mode, Task(BASE, make), 2, max_epochs=4) == kept_apart(rates)


def test_groups_and_scheduler_are_left_as_a_loop_by_hand_leaves_them(mode: str) -> None:
    make = SCHEDULERS["linear, warm-up"]
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(Task(BASE, make), [ones()] * 5)
    last = [group["lr"] for group in trainer.optimizer.param_groups]
    assert last == by_hand(make, 6)[-1]


@pytest.mark.parametrize("name", ["linear, warm-up", "tanh, warm-up", "polynomial"])
def test_a_base_rate_that_is_set_in_mid_run(mode: str, name: str) -> None:
    """The rates from then on are those of a scheduler that was made with it."""
    make = SCHEDULERS[name]

    def meddle(trainer: Any, task: Any) -> None:
        if trainer.global_step == 2:
            trainer.set_lr("second", 0.4)

    other = (BASE[0], {**BASE[1], "lr": 0.4})
    optimizer = sgd(Weights(2), *other)
    scheduler = make(optimizer)
    rates = by_hand(make, 2)
    for number in range(2, 6):
        scheduler.step_update(number)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert engine_steps(mode, Task(BASE, make), 6, meddle) == kept_apart(rates)


class SavesAtFour(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def saved(mode: str, task: Task, folder: Path) -> Path:
    path = folder / "x.safetensors"
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[SavesAtFour(path)]).fit(task, [ones()] * 8)
    return path


@pytest.mark.parametrize("policy", ["checkpoint", "config"])
def test_a_resumed_run_has_the_rates_of_the_whole(mode: str, tmp_path: Path, policy: str) -> None:
    make = SCHEDULERS["cosine, warm-up"]
    path, moves = saved(mode, Task(BASE, make), tmp_path), Moves()
    second = quiet_trainer(mode=mode, max_epochs=1, callbacks=[moves])
    second.fit(Task(BASE, make), [ones()] * 8, ckpt_path=path, rates_on_resume=policy)
    assert moves.rows == kept_apart(by_hand(make, 8))[4:]


def test_a_resumed_run_goes_on_with_the_checkpoint_s_base_rates(tmp_path: Path) -> None:
    make = SCHEDULERS["linear, warm-up"]
    path, moves = saved("eager", Task(BASE, make), tmp_path), Moves()
    second = quiet_trainer(mode="eager", max_epochs=1, callbacks=[moves])
    changed = Task(({"lr": 3.0}, {"lr": 4.0, "name": "second"}), make)
    second.fit(changed, [ones()] * 8, ckpt_path=path)
    assert moves.rows == kept_apart(by_hand(make, 8))[4:]


class AsFunction(Task):
    """The scheduler is made, and its factors are given as a function."""

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self, *self.options)
        scheduler = SCHEDULERS["linear, warm-up"](optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 2
        factor: Callable[[int], float] = lambda n: scheduler.get_update_values(n)[0] / 0.5  # noqa: E731
        return {"optimizer": optimizer, "lr_scheduler": factor}


def test_its_factors_as_a_function_multiply_the_base_rates(mode: str) -> None:
    factors = [row[0] / 0.5 for row in by_hand(SCHEDULERS["linear, warm-up"], 5)]
    steps = engine_steps(mode, AsFunction(BASE), 5)
    np.testing.assert_allclose(steps, [[0.5 * f, 0.2 * f] for f in factors], rtol=0, atol=2e-7)


def returning(task: Task, returned: Callable[[Any], Any]) -> Task:
    task.configure_optimizers = lambda: returned(sgd(task, *task.options))  # type: ignore[method-assign]
    return task


@SHORT
def test_mistakes(mode: str) -> None:
    make = SCHEDULERS["step"]
    each = {"interval": "epoch", "frequency": 1}
    refused(
        mode,
        returning(
            Task(BASE),
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": make(o), **each}},
        ),
        "interval='epoch' .* counts steps: leave the interval out, or .* t_in_epochs=True",
    )
    refused(
        mode,
        returning(
            Task(BASE),
            lambda o: {
                "optimizer": o,
                "lr_scheduler": {"group_0": make(o), "second": fv.StepLRScheduler(o, 2)},
            },
        ),
        "count steps and others that count epochs: give all of them the same t_in_epochs",
    )
    with pytest.raises(ConfigurationError, match="made for another optimizer"):
        other = flow.optim.SGD([{"params": Weights(1).parameters()}], lr=1.0)
        task = returning(Task(BASE), lambda o: {"optimizer": o, "lr_scheduler": make(other)})
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [ones()])
