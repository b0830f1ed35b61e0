"""Several loaders at once: which batches meet, in every mode, and after every stop."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Bare, OfClaimedLength, OfUnknownLength, numbered_batches, quiet_trainer, refused
from helpers.resuming import some_slow
from helpers.stopping import Mean, Sees, check_stopping, run_once
from oneflow.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

from ofengine import (
    CombinedLoader,
    ConfigurationError,
    DataError,
    OFEngineWarning,
    in_memory_loader,
)

CYCLE, LONGEST, SHORTEST, IN_TURN = "max_size_cycle", "max_size", "min_size", "sequential"


def numbers(count: int, start: int = 0) -> TensorDataset:
    return TensorDataset(flow.arange(start, start + count, dtype=flow.float32))


def first_of(batch: Any) -> Any:
    return None if batch is None else float(batch[0].numpy().ravel()[0])


class Meets(Bare):
    """Notes the numbers of the batches that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.met: List[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else batch
        used = [part[0] for part in parts if part is not None]
        return sum(each.mean() for each in used) * self.layer.weight.mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        parts = batch.values() if isinstance(batch, dict) else batch
        self.met.append(tuple(map(first_of, parts)))


EXPECTED = {
    # by hand: loaders of 3 and of 2 batches, of the numbers from 0 and from 10 on
    CYCLE: [(0, 10), (1, 11), (2, 10)],
    LONGEST: [(0, 10), (1, 11), (2, None)],
    SHORTEST: [(0, 10), (1, 11)],
}


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("which", EXPECTED)
def test_which_batches_meet(mode: str, which: str, kind: type) -> None:
    loaders = [DataLoader(numbers(3)), DataLoader(numbers(2, 10))]
    given = dict(zip("ab", loaders)) if kind is dict else kind(loaders)
    task = Meets()
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    trainer.fit(task, CombinedLoader(given, which))
    assert task.met == EXPECTED[which] * 2
    assert trainer.num_training_batches == len(EXPECTED[which])
    by_hand = [tuple(map(first_of, row.values() if kind is dict else row))
               for row in CombinedLoader(given, which)]  # fmt: skip
    assert by_hand == EXPECTED[which]


def test_one_after_the_other(mode: str) -> None:
    sees = Sees()
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=sees)
    loaders = [DataLoader(numbers(3)), numbered_batches(2, 10)]
    trainer.fit(Mean(), CombinedLoader(loaders, IN_TURN))
    assert [row[1] for row in sees.rows] == [0, 1, 2, 10, 11]
    assert trainer.num_training_batches == 5


@pytest.mark.parametrize("given", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b]])
def test_a_dict_or_list_of_loaders_cycles(mode: str, given: Callable[..., Any]) -> None:
    task = Meets()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    loaders = given(DataLoader(numbers(3)), DataLoader(numbers(2, 10)))
    assert trainer.preview(task, loaders).total_steps == 3
    trainer.fit(task, loaders)
    assert task.met == EXPECTED[CYCLE]


def test_a_loader_of_unknown_length_ends_where_it_ends(mode: str) -> None:
    def loaders() -> Dict[str, Any]:
        unknown = OfUnknownLength([(each,) for each in numbered_batches(3)])
        return {"a": unknown, "b": DataLoader(numbers(2, 10))}

    for which, expected in EXPECTED.items():
        task, trainer = Meets(), quiet_trainer(mode=mode, max_epochs=1)
        trainer.fit(task, CombinedLoader(loaders(), which))
        assert task.met == expected


def test_limits_and_windows_count_the_rows(mode: str) -> None:
    task = Meets()
    trainer = quiet_trainer(
        mode=mode, max_epochs=2, limit_train_batches=3, accumulate_grad_batches=2
    )
    trainer.fit(task, [DataLoader(numbers(5)), DataLoader(numbers(2, 10))])
    assert task.met == EXPECTED[CYCLE] * 2
    assert trainer.global_step == 4


def test_validation_goes_through_a_dict_as_through_a_list(mode: str) -> None:
    trainer = quiet_trainer(mode=mode)
    loaders = {"a": DataLoader(numbers(3)), "b": DataLoader(numbers(2, 10))}
    results = trainer.validate(Mean(), loaders)
    assert results == trainer.validate(Mean(), list(loaders.values()))
    assert [set(each) for each in results] == [{f"val/dataloader_idx_{i}"} for i in (0, 1)]
    assert trainer.validate(Mean(), CombinedLoader(loaders, IN_TURN)) == [{"val": 24 / 5}]


# ---------------------------------------------------------------------- resumed within an epoch


class OneByOne(Sampler):
    """Draws each index when it is asked for, from the generator that all share."""

    def __init__(self, count: int, draw: Callable[[int], int]) -> None:
        self.count, self.draw = count, draw

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.count))
        while left:
            yield left.pop(self.draw(len(left)))


class Noisy:
    """Numbers with noise of numpy's global generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return flow.tensor([index + np.random.rand()], dtype=flow.float32)


def shuffled() -> Dict[str, Any]:
    """All three shuffle with the one generator of all DataLoaders, the last two again and again."""
    return {name: DataLoader(numbers(n), shuffle=True) for name, n in zip("abc", (5, 2, 3))}


def one_by_one() -> Dict[str, Any]:
    draw = random.Random(3).randrange
    return {n: DataLoader(numbers(k), sampler=OneByOne(k, draw)) for n, k in (("a", 5), ("b", 2))}


def in_workers() -> Dict[str, Any]:
    """The second draws its order from the generator of the first, which loads ahead."""
    generator = flow.Generator("cpu")
    return {
        "a": DataLoader(Noisy(4), shuffle=True, num_workers=1, generator=generator),
        "b": DataLoader(Noisy(2), shuffle=True, num_workers=1, generator=generator),
        "c": DataLoader(Noisy(3), sampler=RandomSampler(Noisy(3), generator=generator)),
    }


def persistent() -> Dict[str, Any]:
    options = {"shuffle": True, "num_workers": 1, "persistent_workers": True}
    return {"a": DataLoader(Noisy(4), **options), "b": DataLoader(Noisy(2), **options)}


def in_memory() -> List[Any]:
    return [in_memory_loader(numbers(n), batch_size=1, shuffle=True) for n in (4, 3)]


def of_a_generator() -> List[Any]:
    """The second has no length and draws its batches: all are loaded again to get there."""

    class Draws:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(2)

        def __iter__(self) -> Iterator[Any]:
            return (flow.tensor([float(self.rng.random())]) for _ in range(3))

    return [DataLoader(Noisy(4), shuffle=True), Draws()]


SETS = {
    each.__name__: each
    for each in (shuffled, one_by_one, in_workers, persistent, in_memory, of_a_generator)
}


@pytest.mark.parametrize("name", some_slow(SETS, "shuffled", "in_workers"))
@pytest.mark.parametrize("which", some_slow([CYCLE, LONGEST, SHORTEST], CYCLE))
@pytest.mark.parametrize("seed", some_slow([None, 3], 3))
def test_a_run_goes_on_within_an_epoch(name: str, which: str, seed: Any, tmp_path: Path) -> None:
    def train() -> Any:
        return CombinedLoader(SETS[name](), which)

    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        setting = {"seed": seed, "max_epochs": 2}
        every = 7 if name in ("in_workers", "persistent") else 3  # to start workers takes long
        whole = check_stopping(tmp_path, "eager", train, every=every, **setting)
    half = len(whole.rows) // 2
    assert whole.rows[:half] != whole.rows[half:]  # it did draw


def test_in_graph_mode_and_across_the_modes(tmp_path: Path) -> None:
    check_stopping(tmp_path, "graph", shuffled, every=3, other="eager", seed=3, max_epochs=2)


def test_what_is_skipped_is_not_loaded(tmp_path: Path) -> None:
    class Counted(Noisy):
        loaded = 0

        def __getitem__(self, index: int) -> Any:
            Counted.loaded += 1
            return flow.tensor([float(index)])

    def train() -> Any:
        return [DataLoader(Counted(6), shuffle=True), DataLoader(Counted(2), shuffle=True)]

    _, saved = run_once("eager", train, save_to=tmp_path, max_epochs=1)
    path = [each for each, _ in saved if "batch_end" in each.name][-2]
    Counted.loaded = 0
    run_once("eager", train, resume_from=path, max_epochs=1)
    assert Counted.loaded == 2  # the last row


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: CombinedLoader(DataLoader(numbers(2))),
            "a DataLoader: give a dict, list or tuple",
        ),
        (lambda: CombinedLoader([]), "give a dict, list or tuple of loaders"),
        (lambda: CombinedLoader({"a": 3}), "loader 'a' of several is a int"),
        (lambda: CombinedLoader([[], {"b": []}]), "loader '1' of several is a dict"),
    ],
)
def test_what_is_no_loader_is_told(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        make()


def test_a_mode_that_there_is_not_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"use one of \['max_size', 'max_size_cycle'"):
        CombinedLoader([[]], "cycle")


def test_one_loader_twice_is_told(mode: str) -> None:
    one = DataLoader(numbers(2))
    refused(Meets(), DataError, "is one of the others, too", mode=mode, train={"a": one, "b": one})


def test_a_generator_cannot_begin_anew(mode: str) -> None:
    twice = [DataLoader(numbers(3)), ((each,) for each in numbered_batches(2))]
    says = (r"train_dataloader\['1'\] gave no batch when it was begun anew", "generator", "once")
    refused(Meets(), DataError, *says, mode=mode, train=twice, trained=1)


@pytest.mark.parametrize("claimed", [2, 4])
def test_a_wrong_length_is_told(mode: str, claimed: int) -> None:
    wrong = OfClaimedLength(claimed, [(each,) for each in numbered_batches(3)])
    says = {2: "has more batches than its length, 2", 4: "gave 3 batches, though its length is 4"}
    refused(
        Meets(), DataError, r"train_dataloader\['a'\] " + says[claimed], "__len__", mode=mode,
        train={"a": wrong, "b": DataLoader(numbers(5))}, trained=claimed if claimed == 2 else 3,
    )  # fmt: skip
