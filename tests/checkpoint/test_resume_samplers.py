"""Whatever draws the order of the batches: a run stopped at any moment sees the rest of them."""

from __future__ import annotations

import functools
import random
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers.resuming import some_slow
from helpers.stopping import check_stopping, run_once
from oneflow.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

from ofengine import OFEngineWarning

N = 7
DATA = TensorDataset(flow.arange(N, dtype=flow.float32))
SOME = [1, 2, 4, 5, 6]


def generator() -> Any:
    made = flow.Generator("cpu")
    made.manual_seed(5)
    return made


class Weighted(Sampler):
    """As PyTorch's WeightedRandomSampler: with replacement, all at once."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng
        self.weights = np.arange(1.0, N + 1) / sum(range(1, N + 1))

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.choice(N, N, p=self.weights).tolist())


class OneByOne(Sampler):
    """Draws each index when it is asked for, and remembers which are left."""

    def __init__(self, draw: Optional[Callable[[int], int]] = None) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        left = list(range(N))
        while left:
            yield left.pop((self.draw or np.random.randint)(len(left)))


OF_MODULE = np.random.default_rng(0)


class OfModule(Sampler):
    """Draws from a generator that is no attribute of anything, but a global name."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(OF_MODULE.permutation(N).tolist())


def of_module() -> DataLoader:
    global OF_MODULE
    OF_MODULE = np.random.default_rng(3)  # as in another process
    return DataLoader(DATA, batch_size=2, sampler=OfModule(None))


class OfClass(OfModule):
    """Draws from a generator of its class."""

    rng: Any = None

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(N).tolist())


def of_class() -> DataLoader:
    OfClass.rng = np.random.RandomState(3)
    return DataLoader(DATA, batch_size=2, sampler=OfClass(None))


class Deep(Sampler):
    """Holds its generator in a dict in a list; the function that draws, in a closure."""

    def __init__(self) -> None:
        self.parts = [{"rng": random.Random(3)}]
        own = random.Random(4)
        self.pick = lambda n: own.randrange(n)

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        order = list(range(N))
        self.parts[0]["rng"].shuffle(order)
        order.append(order.pop(self.pick(N)))
        return iter(order)


class Noisy(Dataset):
    """Numbers with noise, of its own generator or of the global ones."""

    def __init__(self, rng: Any = None) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        noise = np.random.rand() + random.random() if self.rng is None else self.rng.random()
        return flow.tensor([index + float(noise)])


class Stream(IterableDataset):
    """Draws its numbers; as a list they can be had as often as one likes."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[Any]:
        return (flow.tensor([float(self.rng.random())]) for _ in range(N))


def with_sampler(sampler: Any, **options: Any) -> DataLoader:
    return DataLoader(DATA, batch_size=2, sampler=sampler, **options)


LOADERS: Dict[str, Callable[[], DataLoader]] = {
    "RandomSampler": lambda: with_sampler(RandomSampler(DATA)),
    "RandomSampler, generator": lambda: with_sampler(RandomSampler(DATA, generator=generator())),
    "RandomSampler, replacement": lambda: with_sampler(
        RandomSampler(DATA, replacement=True, num_samples=41, generator=generator())
    ),
    "SubsetRandomSampler": lambda: with_sampler(SubsetRandomSampler(SOME)),
    "SubsetRandomSampler, generator": lambda: with_sampler(SubsetRandomSampler(SOME, generator())),
    "BatchSampler of RandomSampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)
    ),
    "BatchSampler of SubsetRandomSampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(SubsetRandomSampler(SOME, generator()), 2, True)
    ),
    "shuffle": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "shuffle, generator": lambda: DataLoader(
        DATA, batch_size=2, shuffle=True, generator=generator()
    ),
    "weighted": lambda: with_sampler(Weighted(np.random.default_rng(4))),
    "weighted, in batches": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(Weighted(np.random.RandomState(4)), 3, False)
    ),
    "one by one, its own": lambda: with_sampler(OneByOne(random.Random(4).randrange)),
    "one by one, of a partial": lambda: with_sampler(
        OneByOne(functools.partial(np.random.RandomState(4).randint, 0))
    ),
    "one by one, global": lambda: with_sampler(OneByOne()),
    "of its module": of_module,
    "of its class": of_class,
    "deep inside": lambda: with_sampler(Deep()),
    "noise": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "noise, its own": lambda: DataLoader(
        Noisy(np.random.default_rng(2)), batch_size=2, shuffle=True
    ),
    "a stream": lambda: DataLoader(Stream(np.random.default_rng(2)), batch_size=2),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("seed", some_slow([None, 3], 3))
def test_a_run_sees_the_batches_that_were_left(
    name: str, seed: Optional[int], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        every = 7 if "replacement" in name else 2  # that one has 21 batches
        whole = check_stopping(
            tmp_path, "eager", LOADERS[name], every=every, seed=seed, max_epochs=2
        )
    orders = [whole.rows[: len(whole.rows) // 2], whole.rows[len(whole.rows) // 2 :]]
    assert orders[0] != orders[1]  # it did draw


@pytest.mark.parametrize("other", ["eager", "graph"])
def test_in_graph_mode_and_across_the_modes(mode: str, other: str, tmp_path: Path) -> None:
    train = LOADERS["BatchSampler of SubsetRandomSampler"]
    check_stopping(tmp_path, mode, train, every=2, other=other, seed=3, max_epochs=2)


# ---------------------------------------------------------------------- worker processes


PERSISTENT = {"num_workers": 2, "persistent_workers": True}
IN_WORKERS: Dict[str, Callable[[], DataLoader]] = {
    "persistent, one worker": lambda: DataLoader(
        Noisy(), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "persistent, two workers": lambda: DataLoader(
        Noisy(), batch_size=2, shuffle=True, generator=generator(), **PERSISTENT
    ),
    "persistent, its own sampler": lambda: DataLoader(
        Noisy(), batch_size=2, sampler=RandomSampler(DATA), **PERSISTENT
    ),
    "persistent, single samples": lambda: DataLoader(
        Noisy(), batch_size=None, shuffle=True, **PERSISTENT
    ),
    "persistent, a stream": lambda: DataLoader(
        Stream(random.Random(2)), batch_size=2, num_workers=1, persistent_workers=True
    ),
    "a generator of the dataset": lambda: DataLoader(
        Noisy(np.random.default_rng(2)), batch_size=2, shuffle=True, num_workers=2
    ),
    "persistent, a generator of the dataset": lambda: DataLoader(
        Noisy(random.Random(2)), batch_size=2, shuffle=True, **PERSISTENT
    ),
}


IN_LITTLE_TIME = [name for name in IN_WORKERS if not name.startswith("persistent, ")]


@pytest.mark.parametrize("name", some_slow(IN_WORKERS, "persistent, two workers", *IN_LITTLE_TIME))
@pytest.mark.parametrize("seed", some_slow([None, 3], 3))
def test_with_workers_in_mid_epoch_and_at_epoch_ends(
    name: str, seed: Optional[int], tmp_path: Path
) -> None:
    check_stopping(tmp_path, "eager", IN_WORKERS[name], every=3, seed=seed, max_epochs=2)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_the_order_of_a_seed_is_that_without_workers(workers: int, persistent: bool) -> None:
    # A persistent loader has drawn an order, and loaded ahead, before there is a run.
    def train() -> DataLoader:
        alive = persistent and workers > 0
        return DataLoader(
            DATA, batch_size=2, shuffle=True, num_workers=workers, persistent_workers=alive
        )

    expected, _ = run_once("eager", lambda: DataLoader(DATA, batch_size=2, shuffle=True), seed=3)
    ran, _ = run_once("eager", train, seed=3)
    assert ran.rows == expected.rows


def test_no_two_workers_draw_the_same_from_a_generator_of_the_dataset() -> None:
    seen: List[float] = []
    data = Noisy(np.random.default_rng(2))
    ran, _ = run_once("eager", lambda: DataLoader(data, num_workers=2), max_epochs=2)
    for _, number in ran.rows:
        seen.append(number % 1.0)
    assert len({round(each, 5) for each in seen}) == 2 * N


# ---------------------------------------------------------------------- what cannot be known


class Counts(Sampler):
    """Each pass in an order of its own, of which nobody else knows."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(np.random.RandomState(self.passes).permutation(N).tolist())


class Keeps(Counts):
    def state_dict(self) -> Dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.passes = state["passes"]


def test_a_sampler_that_counts_its_passes_can_keep_its_count(tmp_path: Path) -> None:
    check_stopping(tmp_path, "eager", lambda: with_sampler(Keeps()))


def resumed_warnings(train: Callable[[], Any], folder: Path, moment: str) -> str:
    """What is said where a run is resumed that was stopped at ``moment``."""
    _, saved = run_once("eager", train, save_to=folder)
    path = next(path for path, _ in saved if moment in path.name)
    with pytest.warns(OFEngineWarning) as told:
        run_once("eager", train, resume_from=path)
    return " ".join(str(each.message) for each in told)


def test_one_that_does_not_is_told_with_the_way_out(tmp_path: Path) -> None:
    said = resumed_warnings(lambda: with_sampler(Counts()), tmp_path, "epoch_end")
    assert "train_dataloader.batch_sampler.sampler.passes" in said
    assert "state_dict of the sampler or dataset" in said


def test_an_order_that_nothing_brings_back_is_told(tmp_path: Path) -> None:
    # The sampler draws between the batches from what the dataset draws from, too.
    def train() -> DataLoader:
        return DataLoader(Noisy(), batch_size=2, sampler=OneByOne())

    said = resumed_warnings(train, tmp_path, "05-batch_end")
    assert "gives other batches in this epoch than before the run was stopped" in said
    assert "state_dict" in said


def test_other_data_of_the_same_length_is_told(tmp_path: Path) -> None:
    orders = iter([[3, 1, 2, 0], [3, 2, 1, 0]])

    def train() -> DataLoader:
        return DataLoader(DATA, sampler=next(orders))

    said = resumed_warnings(train, tmp_path, "04-batch_end")
    assert "the data is another" in said


def test_a_generator_that_is_gone_is_named(tmp_path: Path) -> None:
    samplers = iter([Weighted(np.random.default_rng(4)), OneByOne()])

    def train() -> DataLoader:
        return with_sampler(next(samplers))

    assert "sampler.rng" in resumed_warnings(train, tmp_path, "epoch_end")


def test_a_count_of_passes_that_the_resumed_pass_makes_again_is_not_told(tmp_path: Path) -> None:
    # The first pass is begun anew, by which the sampler counts it.
    _, saved = run_once("eager", lambda: with_sampler(Counts()), save_to=tmp_path, max_epochs=1)
    path = next(path for path, _ in saved if "batch_end" in path.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        run_once("eager", lambda: with_sampler(Counts()), resume_from=path, max_epochs=1)
