"""A random generator can be put at the very number where another one stood."""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from hypothesis import example, given, settings, strategies as st
from oneflow import nn
from oneflow.utils.data import DataLoader, RandomSampler, TensorDataset

from ofengine import CheckpointError
from ofengine.checkpoint import encode, put, read
from ofengine.data.generators import (
    find_generators,
    global_states,
    is_generator,
    set_global_states,
    set_state_of,
    set_states_in,
    state_of,
    states_in,
)

WORDS = 624
"""The twister makes so many numbers at a time."""

SEEDS = st.integers(0, 2**63 - 1)
COUNTS = st.one_of(
    st.sampled_from([0, 1, 2, 622, 623, 624, 625, 1247, 1248, 1249]), st.integers(0, 20_000)
)


def generator_of(kind: str, seed: int) -> Any:
    generator = flow.Generator(kind)
    generator.manual_seed(seed)
    return generator


def draw(generator: Any, count: int) -> np.ndarray:
    if count == 0:
        return np.zeros(0, dtype="float32")
    drawn: np.ndarray = flow.rand(count, generator=generator).numpy()
    return drawn


def reference(seed: int, skipped: int, count: int) -> np.ndarray:
    """Numbers of numpy's Mersenne Twister, seeded as C++'s std::mt19937 is."""
    twister = np.random.MT19937()
    twister._legacy_seeding(seed % 2**32)  # type: ignore[attr-defined]
    words = twister.random_raw(skipped + count)[skipped:]
    return words.astype("float32") / np.float32(2**32)


# ---------------------------------------------------------------------- OneFlow's generators


@pytest.mark.parametrize("kind", ["cpu", "auto"])
@settings(max_examples=60)
@given(seed=SEEDS, drawn=COUNTS)
@example(seed=0, drawn=0)
@example(seed=0, drawn=624)
@example(seed=2**63 - 1, drawn=624)
@example(seed=5489, drawn=1_000_000)
def test_another_generator_goes_on_where_this_one_stood(kind: str, seed: int, drawn: int) -> None:
    generator = generator_of(kind, seed)
    draw(generator, drawn)
    state = state_of(generator)
    expected = draw(generator, 2 * WORDS + 1)
    other = generator_of(kind, 99)
    draw(other, 3)
    set_state_of(other, state)
    assert draw(other, 2 * WORDS + 1).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["cpu", "auto"])
@settings(max_examples=60)
@given(seed=SEEDS, drawn=COUNTS)
def test_the_numbers_that_follow_are_those_of_numpys_twister(
    kind: str, seed: int, drawn: int
) -> None:
    generator = generator_of(kind, seed)
    draw(generator, drawn)
    other = generator_of(kind, seed ^ 1)
    set_state_of(other, state_of(generator))
    follow = draw(other, WORDS + 1)
    np.testing.assert_allclose(follow, reference(seed, drawn, WORDS + 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["cpu", "auto"])
@settings(max_examples=40)
@given(seed=SEEDS, drawn=COUNTS, times=st.integers(1, 3))
def test_taking_the_state_changes_nothing(kind: str, seed: int, drawn: int, times: int) -> None:
    asked, undisturbed = generator_of(kind, seed), generator_of(kind, seed)
    draw(asked, drawn)
    draw(undisturbed, drawn)
    for _ in range(times):
        state_of(asked)
    assert draw(asked, WORDS + 1).tobytes() == draw(undisturbed, WORDS + 1).tobytes()
    assert asked.initial_seed() == undisturbed.initial_seed()


@settings(max_examples=40)
@given(seed=SEEDS, counts=st.lists(st.integers(0, 700), min_size=1, max_size=6))
def test_states_can_be_taken_and_set_again_and_again(seed: int, counts: List[int]) -> None:
    # What is set is made of "the words before"; its own state must not wear off.
    generator, undisturbed = generator_of("cpu", seed), generator_of("cpu", seed)
    for count in counts:
        state = state_of(generator)
        generator = generator_of("cpu", 1)
        set_state_of(generator, state)
        assert draw(generator, count).tobytes() == draw(undisturbed, count).tobytes()


@pytest.mark.slow
def test_every_position_of_a_round_of_the_twister_is_found() -> None:
    generator, other = generator_of("cpu", 11), generator_of("cpu", 12)
    numbers = reference(11, 0, WORDS + 4)
    for drawn in range(WORDS + 2):
        set_state_of(other, state_of(generator))
        np.testing.assert_allclose(draw(other, 2), numbers[drawn : drawn + 2], rtol=0, atol=1e-7)
        np.testing.assert_allclose(draw(generator, 1), numbers[drawn], rtol=0, atol=1e-7)


DRAWS: Dict[str, Callable[[Any], Any]] = {
    "normal, an odd count": lambda g: flow.randn(3, generator=g),
    "doubles": lambda g: flow.rand(5, dtype=flow.float64, generator=g),
    "normal doubles": lambda g: flow.randn(5, dtype=flow.float64, generator=g),
    "a permutation": lambda g: flow.randperm(13, generator=g),
    "whole numbers": lambda g: flow.randint(0, 1000, (7,), generator=g),
    "coins": lambda g: flow.bernoulli(flow.full((9,), 0.5), generator=g),
    "normal, in place": lambda g: flow.normal(0.0, 1.0, 3, generator=g),
}


@pytest.mark.parametrize("before", DRAWS)
@pytest.mark.parametrize("after", DRAWS)
def test_it_goes_on_behind_and_with_any_kind_of_numbers(before: str, after: str) -> None:
    generator = generator_of("cpu", 3)
    DRAWS[before](generator)
    state = state_of(generator)
    expected = [DRAWS[after](generator).numpy().tobytes() for _ in range(3)]
    other = generator_of("cpu", 4)
    set_state_of(other, state)
    assert [DRAWS[after](other).numpy().tobytes() for _ in range(3)] == expected


@settings(max_examples=40)
@given(seed=SEEDS, size=st.integers(0, 800))
def test_a_dropout_layer_goes_on_with_the_masks_that_would_have_followed(
    seed: int, size: int
) -> None:
    first, second = nn.Dropout(0.5), nn.Dropout(0.5)
    first.generator.manual_seed(seed)
    second.generator.manual_seed(seed ^ 1)
    if size:
        first(flow.ones(size))
    set_state_of(second.generator, state_of(first.generator))
    for _ in range(3):
        assert first(flow.ones(333)).numpy().tobytes() == second(flow.ones(333)).numpy().tobytes()


# ---------------------------------------------------------------------- others' generators

BIT_GENERATORS: Tuple[Any, ...] = (
    np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64,
)  # fmt: skip


def numpys(bits: Any) -> Callable[[int], Any]:
    return lambda seed: np.random.Generator(bits(seed))


OTHERS: Dict[str, Tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    **{
        bits.__name__: (numpys(bits), lambda g: (g.normal(), g.integers(0, 9, dtype=np.int32)))
        for bits in BIT_GENERATORS
    },
    "RandomState": (lambda s: np.random.RandomState(s % 2**32), lambda g: (g.randn(), g.rand())),
    "Random": (random.Random, lambda g: (g.gauss(0, 1), g.random(), g.getrandbits(5))),
}


@pytest.mark.parametrize("name", OTHERS)
@given(seed=SEEDS, drawn=st.one_of(st.integers(0, 5), st.integers(0, 700)))
@example(seed=1, drawn=1)  # a Gaussian number is kept for the next call
@example(seed=1, drawn=312)
def test_generators_of_numpy_and_python_go_on_too(name: str, seed: int, drawn: int) -> None:
    make, use = OTHERS[name]
    generator, undisturbed, other = make(seed), make(seed), make(99)
    for _ in range(drawn):
        use(generator), use(undisturbed)
    use(other)
    set_state_of(other, state_of(generator))
    expected = [use(undisturbed) for _ in range(5)]
    assert [use(generator) for _ in range(5)] == expected
    assert [use(other) for _ in range(5)] == expected


@pytest.mark.parametrize("name", [*OTHERS, "cpu", "auto"])
@pytest.mark.parametrize("drawn", [0, 1, 7])
def test_a_state_goes_on_from_a_file(name: str, drawn: int, tmp_path: Any) -> None:
    if name in OTHERS:
        make, use = OTHERS[name]
    else:
        make = lambda seed: generator_of(name, seed)  # noqa: E731
        use = lambda g: flow.rand(3, generator=g).numpy().tobytes()  # noqa: E731
    generator, other = make(2**62 + 5), make(6)
    for _ in range(drawn):
        use(generator)
    state = read(put(tmp_path / "state", encode({}, {"state": state_of(generator)}))).state
    assert state is not None
    set_state_of(other, state["state"])
    assert [use(other) for _ in range(250)] == [use(generator) for _ in range(250)]


def test_a_state_of_another_kind_is_refused_and_changes_nothing() -> None:
    makers = {**{name: make for name, (make, _) in OTHERS.items()}}
    kinds = {"PCG64": "numpy", "MT19937": "numpy", "RandomState": "old", "Random": "python"}
    generators = {name: makers[name](1) for name in kinds}
    generators["cpu"] = generator_of("cpu", 1)
    for name, generator in generators.items():
        for other, another in generators.items():
            if other == name:
                continue
            before = repr(state_of(generator))
            with pytest.raises(CheckpointError, match="random generator does not fit"):
                set_state_of(generator, state_of(another))
            assert repr(state_of(generator)) == before, (name, other)


@given(seed=st.integers(0, 2**32 - 1), drawn=st.integers(0, 1300))
def test_the_global_generators_go_on_together(seed: int, drawn: int) -> None:
    def numbers() -> List[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.randn(),
            flow.rand(3).numpy().tolist(),
        ]

    random.seed(seed), np.random.seed(seed), flow.manual_seed(seed)
    for _ in range(drawn % 7):
        numbers()
    draw(flow.default_generator, drawn)
    states = global_states()
    expected = [numbers() for _ in range(3)]
    random.seed(0), np.random.seed(0), flow.manual_seed(0)
    set_global_states(states)
    assert [numbers() for _ in range(3)] == expected


# ---------------------------------------------------------------------- where they are


class Augmented(TensorDataset):
    def __init__(self) -> None:
        super().__init__(flow.arange(6))
        self.generator = np.random.default_rng(0)
        self.old = np.random.RandomState(0)
        self.transforms = [Jitter(), Jitter()]


class Jitter:
    def __init__(self) -> None:
        self.python = random.Random(0)


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.1))
        self.own = np.random.default_rng(0)
        self.shared = self.own
        self.default = flow.default_generator


def test_generators_of_modules_are_found_once_and_the_default_one_is_left_out() -> None:
    found = dict(find_generators(Task(), None))
    assert set(found) == {"task.own", "task.layers.1.generator", "task.layers.2.generator"}
    assert all(is_generator(each) for each in found.values())


def test_generators_of_samplers_and_datasets_are_found_once() -> None:
    dataset, generator = Augmented(), generator_of("cpu", 1)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)
    found = [each for _, each in find_generators(None, loader)]
    assert len({id(each) for each in found}) == len(found) == 5
    owned = (generator, dataset.generator, dataset.old, *(t.python for t in dataset.transforms))
    assert {id(each) for each in found} == {id(each) for each in owned}


def test_a_sampler_without_a_generator_of_its_own_leaves_only_the_loaders() -> None:
    loader = DataLoader(TensorDataset(flow.arange(6)), sampler=RandomSampler(range(6)))
    assert [each for _, each in find_generators(None, loader)] == [loader.generator]


def test_what_refers_to_itself_is_gone_through_once() -> None:
    jitter: Any = Jitter()
    jitter.itself, jitter.many = jitter, [jitter, jitter]
    assert [each for _, each in find_generators(None, jitter)] == [jitter.python]


def test_all_that_are_found_go_on_and_those_that_are_gone_are_named() -> None:
    task, other = Task(), Task()
    for layer in (task.layers[1], task.layers[2]):
        layer(flow.ones(5))
    task.own.random(3)
    states = states_in(task, None)
    assert set_states_in(other, None, states) == []
    assert other.own.random() == task.own.random()
    for index in (1, 2):
        ours, theirs = task.layers[index], other.layers[index]
        assert ours(flow.ones(99)).numpy().tobytes() == theirs(flow.ones(99)).numpy().tobytes()
    del other.layers[2]
    assert set_states_in(other, None, states) == ["task.layers.2.generator"]
