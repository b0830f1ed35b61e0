"""ModelStatistics and ``trainer.leaving_no_trace`` with several optimizers, in both modes."""

from __future__ import annotations

import copy
import logging
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, bits, fill_deterministically, quiet_trainer
from helpers.duels import Duel
from helpers.resuming import shuffled

from ofengine import Callback
from ofengine.callbacks import GradualUnfreezing, ModelStatistics


def trained(mode: str, *callbacks: Callback, **options: Any) -> Any:
    np.random.seed(0)
    flow.manual_seed(0)
    task = Duel()
    fill_deterministically(task, 1, 0.5)
    given = {"max_epochs": 2, "seed": 4, "log_every_n_steps": 1, **options}
    trainer = quiet_trainer(mode=mode, callbacks=[*callbacks], **given)
    trainer.fit(task, shuffled()(3))
    return task, trainer


def rows_of(trainer: Any) -> Dict[int, Dict[str, float]]:
    found: Dict[int, Dict[str, float]] = {}
    for row in trainer.history:
        seen = {n: v for n, v in row.items() if n.startswith(("gradients/", "activations/"))}
        if seen:
            found[int(row["step"])] = seen
    return found


def others(trainer: Any) -> List[Dict[str, float]]:
    rows = [
        {n: v for n, v in row.items() if not n.startswith(("gradients/", "activations/"))}
        for row in trainer.history
    ]
    return [row for row in rows if len(row) > 2]


def test_training_is_what_it_would_be_without(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ofengine")
    plain, without = trained(mode)
    compiled = caplog.text.count("compil")
    caplog.clear()
    task, trainer = trained(mode, ModelStatistics(1))
    assert bits(task) == bits(plain)
    assert others(trainer) == others(without)
    assert list(rows_of(trainer)) == list(range(trainer.global_step))
    assert all(each.requires_grad and each.grad is None for each in task.parameters())
    assert caplog.text.count("compil") == compiled


@pytest.mark.slow
def test_both_modes_have_the_same_numbers() -> None:
    both = [rows_of(trained(each, ModelStatistics(1))[1]) for each in MODES]
    assert both[0] == both[1]
    generators = [row for row in both[0].values() if "gradients/generator.0/norm" in row]
    assert 0 < len(generators) < len(both[0])  # it steps in every second batch


class ByHand(Callback):
    """The norms of each optimizer's gradients, of a copy of the task as it is before a batch."""

    def __init__(self) -> None:
        self.norms: List[Dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        state = flow.get_rng_state()
        norms: Dict[str, float] = {}
        for name in ("discriminator", "generator") if batch_idx % 2 == 0 else ("discriminator",):
            twin = copy.deepcopy(task).eval()
            twin.loss_of(batch[0], name).backward()
            for path, parameter in getattr(twin, name).named_parameters():
                layer = f"{name}.{path.rpartition('.')[0]}"
                square = float(np.square(parameter.grad.numpy().astype(np.float64)).sum())
                norms[layer] = norms.get(layer, 0.0) + square
        flow.set_rng_state(state)
        self.norms.append({layer: square**0.5 for layer, square in norms.items()})


def test_gradients_are_those_of_the_weights_before_the_batch(mode: str) -> None:
    by_hand = ByHand()

    class Still(Callback):
        """No dropout, and running statistics: the same wherever it is computed."""

        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            task.eval()

    looks = ModelStatistics(1, activations=False, quantities=["norm"])
    _, trainer = trained(mode, Still(), by_hand, looks)
    rows = rows_of(trainer)
    assert len(rows) == len(by_hand.norms)
    for row, norms in zip(rows.values(), by_hand.norms):
        assert row == pytest.approx(
            {f"gradients/{layer}/norm": norm for layer, norm in norms.items()}, rel=1e-6
        )


def test_activations_are_those_of_all_steps(mode: str) -> None:
    looks = ModelStatistics(1, gradients=False, modules="generator.4", quantities=["norm"])
    _, trainer = trained(mode, looks)
    first, second, *_ = rows_of(trainer).values()
    assert list(first) == list(second) == ["activations/generator.4/norm"]


def test_by_groups_and_while_one_is_frozen(mode: str) -> None:
    late = {0: ["discriminator/group_0"], 1: ["generator/first", "generator/last"]}
    looks = ModelStatistics(1, activations=False, by="group", quantities=["norm"])
    _, trainer = trained(mode, GradualUnfreezing(late), looks)
    rows = [*rows_of(trainer).values()]
    assert list(rows[0]) == ["gradients/discriminator/group_0/norm"]
    half = len(rows) // 2
    assert set(rows[half]) == {
        f"gradients/{name}/norm"
        for name in ("discriminator/group_0", "generator/first", "generator/last")
    }
