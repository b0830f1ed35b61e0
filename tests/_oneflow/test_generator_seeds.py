"""A generator seeded in the device's turn gives what one gives that ``manual_seed`` has seeded."""

from __future__ import annotations

import gc
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from oneflow import nn

from ofengine import TaskModule
from ofengine._oneflow import generator_seeds
from ofengine._oneflow.generator_seeds import GeneratorSeeds

SEEDS = (0, 1, 2**32 - 1, 2**32, 12345678901234, 2**63 - 1)
MAKERS = {
    "cpu": lambda: flow.Generator("cpu"),
    "auto": lambda: flow.Generator("auto"),
    "a dropout layer's": lambda: nn.Dropout(0.5).generator,
}
"""Of generators that nobody has drawn from."""


def draw(generator: Any, count: int) -> List[Any]:
    """Hand over draws of several kinds, more than a twister has words; they are not read."""
    return [
        flow.rand(count, generator=generator),
        flow.randn(3, count, generator=generator),
        flow.randperm(count, generator=generator),
        flow._C.dropout(flow.ones(count, 5), 0.4, True, False, generator, addend=None),
    ]


def numbers(drawn: List[Any]) -> np.ndarray:
    return np.concatenate([each.numpy().astype(np.float64).ravel() for each in drawn])


def counted(monkeypatch: pytest.MonkeyPatch) -> List[Any]:
    """Each seed that is written in the device's turn from now on."""
    written: List[Any] = []
    write = generator_seeds.write_into
    monkeypatch.setattr(
        generator_seeds, "write_into", lambda *pair: (written.append(pair), write(*pair))
    )
    return written


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_draws_what_manual_seed_makes_it_draw(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, written = make(), make(), counted(monkeypatch)
    seeds, found, expected = GeneratorSeeds(ours), [], []
    for count, seed in enumerate(SEEDS, 100):
        seeds.seed(seed)
        found += draw(ours, count)  # all of it handed over in one go
    for count, seed in enumerate(SEEDS, 100):
        theirs.manual_seed(seed)
        expected += [flow.tensor(each.numpy()) for each in draw(theirs, count)]
    np.testing.assert_array_equal(numbers(found), numbers(expected))
    in_turn = len(SEEDS) - (1 if ours.device.type == "cpu" else 2)  # an "auto" one draws first
    assert len(written) == in_turn
    assert ours.initial_seed() == theirs.initial_seed() == SEEDS[-1]
    assert (ours.get_state().numpy() == theirs.get_state().numpy()).all()


def test_the_default_generator_is_seeded_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    written, seeds = counted(monkeypatch), GeneratorSeeds(flow.default_generator)
    for seed in (5, 6):
        seeds.seed(seed)
        found = [flow.rand(700), flow.nn.functional.dropout(flow.ones(700), 0.5)]
        flow.manual_seed(seed)
        again = [flow.rand(700), flow.nn.functional.dropout(flow.ones(700), 0.5)]
        np.testing.assert_array_equal(numbers(found), numbers(again))
    assert len(written) == 1


def test_states_and_other_seeds_in_between_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    written, generator, other = counted(monkeypatch), flow.Generator("auto"), flow.Generator("auto")
    draw(generator, 3), draw(other, 3)
    seeds = GeneratorSeeds(generator)
    seeds.seed(1)
    seeds.seed(2)
    other.manual_seed(2)
    state = generator.get_state()
    draw(generator, 50)
    generator.set_state(state)
    np.testing.assert_array_equal(numbers(draw(generator, 9)), numbers(draw(other, 9)))
    generator.manual_seed(3), other.manual_seed(3)
    np.testing.assert_array_equal(numbers(draw(generator, 9)), numbers(draw(other, 9)))
    seeds.seed(4), other.manual_seed(4)
    np.testing.assert_array_equal(numbers(draw(generator, 9)), numbers(draw(other, 9)))
    assert len(written) == 2


def test_a_generator_that_is_elsewhere_in_memory_is_left_to_manual_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, generator = counted(monkeypatch), flow.Generator("cpu")
    for place in (0, 5, 100, 2**61 - 1):  # a pointer, other words, no memory, no address
        monkeypatch.setattr(generator_seeds, "_TWISTER", place)
        seeds = GeneratorSeeds(generator)
        for seed in (1, 2):
            seeds.seed(seed)
            assert generator.initial_seed() == seed
    assert not written


def test_what_is_handed_over_outlives_generator_and_seeds() -> None:
    for seed in range(200):
        generator = flow.Generator("cpu")
        seeds = GeneratorSeeds(generator)
        seeds.seed(seed), seeds.seed(seed + 1)
        drawn = flow.rand(2000, generator=generator)
        seeds.seed(seed + 2)
        del generator, seeds
    gc.collect()
    again = flow.Generator("cpu")
    again.manual_seed(200)
    np.testing.assert_array_equal(drawn.numpy(), flow.rand(2000, generator=again).numpy())


class Drawn(TaskModule):
    """Dropout of two kinds and a draw of the step's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = nn.functional.dropout(self.net(batch[0]), 0.2) + flow.rand(4, 1)
        return ((out - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_run_is_the_same_as_with_manual_seed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(flow.randn(4, 6), flow.randn(4, 1)) for _ in range(6)]

    def weights() -> Dict[str, bytes]:
        flow.manual_seed(1)
        task = Drawn()
        trainer = quiet_trainer(mode=mode, max_epochs=2, accumulate_grad_batches=2, seed=3)
        trainer.fit(task, batches)
        return bits(task)

    written = counted(monkeypatch)
    ours = weights()
    assert len(written) >= 2 * 2 * (6 - 2)  # two generators, two epochs, all but the first batches
    monkeypatch.setattr(generator_seeds, "_find", lambda *found: None)
    del written[:]
    assert ours == weights()
    assert not written
