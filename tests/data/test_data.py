"""Batches and their windows against brute force; batches taken apart and put together again."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections import OrderedDict, defaultdict
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import oneflow as flow
import pytest
from helpers import OfUnknownLength
from hypothesis import HealthCheck, given, settings, strategies as st
from oneflow.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset
from oneflow.utils.data.sampler import RandomSampler, SubsetRandomSampler

from ofengine import ConfigurationError, DataError, OFEngineError
from ofengine.data.batches import Batches
from ofengine.data.loading import _SeededIndices
from ofengine.data.sources import count_batches
from ofengine.data.stages import stage_loaders
from ofengine.data.structure import batch_size_of, flatten, to_device, unflatten

CPU = flow.device("cpu")
# The fixture that changes the folder acts once for all examples, which is what is wanted.
quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Limit = Union[int, float, None]


def batches_of(source: Any, limit: Limit = None, keep: bool = False) -> Batches:
    return Batches(source, limit, CPU, "train_dataloader", "limit_train_batches", keep)


def counted(total: Optional[int], limit: Limit) -> Optional[int]:
    return count_batches(total, limit, "train_dataloader", "limit_train_batches")


# ---------------------------------------------------------------------- windows


def by_hand(batches: List[Any], accumulate: int) -> List[Tuple[Any, ...]]:
    """(batch, index, length of its window, closes it, is last), from the windows written out."""
    windows = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    rows: List[Tuple[Any, ...]] = []
    for window in windows:
        for place, batch in enumerate(window):
            closes = place == len(window) - 1
            rows.append((batch, len(rows), len(window), closes, len(rows) == len(batches) - 1))
    return rows


def limited(batches: List[Any], limit: Limit) -> List[Any]:
    if limit is None:
        return batches
    count = limit if isinstance(limit, int) else math.floor(len(batches) * limit)
    return batches[:count]


LIMITS = st.one_of(
    st.none(),
    st.integers(min_value=1, max_value=12),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),  # exact in binary: no rounding to argue about
)


@quick
@given(
    count=st.integers(min_value=1, max_value=10),
    accumulate=st.integers(min_value=1, max_value=12),
    limit=LIMITS,
    known=st.booleans(),
    keep=st.booleans(),
)
def test_the_windows_of_every_pass(
    count: int, accumulate: int, limit: Limit, known: bool, keep: bool
) -> None:
    data = [f"batch {index}" for index in range(count)]
    expected = by_hand(limited(data, limit), accumulate)
    if isinstance(limit, float) and limit != 1.0 and (not known or not expected):
        with pytest.raises(ConfigurationError):
            batches_of(data if known else OfUnknownLength(data), limit)
        return
    batches = batches_of(data if known else OfUnknownLength(data), limit, keep)
    for _ in range(2):
        assert list(batches.steps(accumulate)) == expected
        assert list(batches) == limited(data, limit)


@quick
@given(count=st.integers(1, 30), accumulate=st.integers(1, 12), known=st.booleans())
def test_the_weights_of_a_window_add_up_to_one_and_windows_to_the_epoch(
    count: int, accumulate: int, known: bool
) -> None:
    data = list(range(count))
    steps = list(batches_of(data if known else OfUnknownLength(data)).steps(accumulate))
    total = 0.0
    for _, _, window, closes, _ in steps:
        total += 1 / window
        if closes:
            assert total == pytest.approx(1.0)
            total = 0.0
    assert total == 0.0
    assert sum(closes for _, _, _, closes, _ in steps) == math.ceil(count / accumulate)
    assert [is_last for *_, is_last in steps] == [False] * (count - 1) + [True]


def test_a_loader_of_unknown_length_is_read_no_further_ahead_than_two_windows() -> None:
    taken: List[int] = []

    def source() -> Iterator[int]:
        for index in range(20):
            taken.append(index)
            yield index

    steps = batches_of(source()).steps(3)
    next(steps)
    assert len(taken) <= 6


def test_an_infinite_loader_can_be_limited() -> None:
    steps = list(batches_of(itertools.count(), limit=3).steps(2))
    assert [(batch, window, is_last) for batch, _, window, _, is_last in steps] == [
        (0, 2, False),
        (1, 2, False),
        (2, 1, True),
    ]


class Says(List[Any]):
    """A list that says it has another length than it has."""

    said = 0

    def __len__(self) -> int:
        return self.said


@pytest.mark.parametrize(("said", "really"), [(3, 5), (5, 3), (4, 3), (3, 4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_length_that_is_not_true_is_an_error_or_does_no_harm(
    said: int, really: int, accumulate: int
) -> None:
    # An IterableDataset's __len__ is what its author believes.
    data = Says(range(really))
    data.said = said
    try:
        steps = list(batches_of(data).steps(accumulate))
    except OFEngineError as error:
        assert "train_dataloader" in str(error)
        return
    seen = [batch for batch, *_ in steps]
    assert seen == list(range(len(seen)))
    assert steps == by_hand(seen, accumulate)


# ---------------------------------------------------------------------- limits


@quick
@given(total=st.integers(1, 1000), limit=st.integers(0, 2000))
def test_a_number_of_batches_is_at_most_all(total: int, limit: int) -> None:
    assert counted(total, limit) == min(total, limit)
    assert counted(None, limit) == limit


@quick
@given(total=st.integers(1, 1000), parts=st.integers(1, 64))
def test_a_share_is_rounded_down(total: int, parts: int) -> None:
    share = parts / 64  # exact
    expected = total * parts // 64
    if expected == 0:
        with pytest.raises(ConfigurationError):
            counted(total, share)
    else:
        assert counted(total, share) == expected


def test_no_limit_and_the_whole_share_are_all() -> None:
    assert counted(7, None) == counted(7, 1.0) == 7
    assert counted(None, None) is counted(None, 1.0) is None
    assert counted(7, 1) == 1
    assert counted(7, 0) == counted(7, 0.0) == 0


@pytest.mark.parametrize(("total", "share"), [(5, 0.1), (None, 0.5)])
def test_a_share_that_cannot_be_names_the_argument(total: Optional[int], share: float) -> None:
    with pytest.raises(ConfigurationError, match=r"limit_train_batches"):
        counted(total, share)


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize("thing", [5, None, 1.5, object()])
def test_what_cannot_be_iterated_is_refused_by_its_name(thing: Any) -> None:
    with pytest.raises(DataError, match="train_dataloader"):
        batches_of(thing)


@pytest.mark.parametrize("empty", [[], (), DataLoader(TensorDataset(flow.ones(0, 2)))])
def test_what_is_empty_is_refused(empty: Any) -> None:
    with pytest.raises(DataError, match=r"train_dataloader.*empty"):
        batches_of(empty)


def test_kept_batches_are_those_of_the_first_pass() -> None:
    source = OfUnknownLength([1, 2, 3], [4, 5, 6])
    batches = batches_of(source, limit=2, keep=True)
    assert [list(batches), list(batches), list(batches)] == [[1, 2]] * 3
    assert source.begun == 1


def test_one_loader_several_or_none() -> None:
    loader = DataLoader(TensorDataset(flow.ones(2, 2)))

    def counts(loaders: Any) -> List[Optional[int]]:
        made = stage_loaders(loaders, None, CPU, "val_dataloader", "limit_val_batches", False)
        return [each.count for each in made]

    assert counts(None) == []
    assert counts(loader) == [2]
    assert counts([loader]) == [2]
    assert counts([loader, loader]) == [2, 2]
    assert counts((loader, loader)) == [2, 2]
    assert counts([flow.ones(2), flow.ones(2), flow.ones(2)]) == [3]  # a list of batches
    assert counts({"a": loader, "b": [flow.ones(2)]}) == [2, 1]
    with pytest.raises(DataError, match="val_dataloader"):
        counts([loader, [flow.ones(2)]])


# ---------------------------------------------------------------------- the shape of a batch


class Pair(NamedTuple):
    left: Any
    right: Any


CONSTANTS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.text(max_size=3)
)
SHAPES = st.lists(st.integers(1, 3), max_size=3)
LEAVES = st.one_of(CONSTANTS, SHAPES.map(lambda shape: np.zeros(shape, dtype="float32")))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3)), inner, max_size=3),
        st.lists(st.tuples(st.text(max_size=2), inner), max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda two: Pair(*two)),
    ),
    max_leaves=8,
)


def with_tensors(tree: Any, made: List[Any]) -> Any:
    """``tree`` with a tensor for each array, all different; they are appended to ``made``."""
    if isinstance(tree, np.ndarray):
        made.append(flow.tensor(tree + len(made)))
        return made[-1]
    if isinstance(tree, dict):
        return type(tree)((key, with_tensors(value, made)) for key, value in tree.items())
    if isinstance(tree, Pair):
        return Pair(*(with_tensors(value, made) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_tensors(value, made) for value in tree)
    return tree


def alike(first: Any, second: Any) -> bool:
    """The same containers, keys in the same order, equal constants and the very same tensors."""
    if type(first) is not type(second):
        return False
    if isinstance(first, flow.Tensor):
        return first is second
    if isinstance(first, dict):
        return list(first) == list(second) and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))
    return bool(first == second)


@quick
@given(tree=TREES)
def test_flatten_and_unflatten_are_inverse(tree: Any) -> None:
    made: List[Any] = []
    batch = with_tensors(tree, made)
    tensors: List[Any] = []
    structure = flatten(batch, tensors)
    assert len(tensors) == len(made)
    assert all(ours is theirs for ours, theirs in zip(tensors, made))
    assert alike(unflatten(structure, iter(tensors)), batch)


@quick
@given(first=TREES, second=TREES)
def test_two_batches_share_a_structure_only_where_they_are_nested_alike(
    first: Any, second: Any
) -> None:
    def structure_and_skeleton(tree: Any) -> Tuple[Any, str]:
        def skeleton(value: Any) -> str:
            if isinstance(value, np.ndarray):
                return "tensor"
            name = type(value).__name__
            if isinstance(value, dict):
                return f"{name}{[(k, skeleton(v)) for k, v in value.items()]}"
            if isinstance(value, (list, tuple)):
                return f"{name}{[skeleton(v) for v in value]}"
            return f"{name} {value!r}"

        return flatten(with_tensors(tree, []), []), skeleton(tree)

    (ours, our_skeleton), (theirs, their_skeleton) = map(structure_and_skeleton, (first, second))
    if our_skeleton == their_skeleton:
        assert (ours, hash(ours)) == (theirs, hash(theirs))
    elif "-0.0" not in our_skeleton + their_skeleton:  # equal to 0.0, and traced alike
        assert ours != theirs


def test_numbers_that_are_equal_but_of_another_kind_are_different_structures() -> None:
    structures = [flatten([value], []) for value in (1, True, 1.0)]
    assert structures[0] != structures[1] != structures[2] != structures[0]


@pytest.mark.parametrize("thing", [np.zeros(2), np.float32(1), object(), {1}, b"x"])
def test_what_a_graph_cannot_take_is_refused_wherever_it_lies(thing: Any) -> None:
    for batch in (thing, [thing], {"a": (flow.ones(1), thing)}):
        with pytest.raises(DataError):
            flatten(batch, [])


def test_a_defaultdict_survives() -> None:
    batch: Dict[str, Any] = defaultdict(list)
    batch["x"] = flow.ones(2)
    tensors: List[Any] = []
    again = unflatten(flatten(batch, tensors), iter(tensors))
    assert again["x"] is batch["x"]
    moved = to_device(batch, CPU)
    assert moved["x"].numpy().tolist() == [1.0, 1.0]


@quick
@given(tree=TREES)
def test_to_device_keeps_everything_but_the_device(tree: Any) -> None:
    made: List[Any] = []
    batch = with_tensors(tree, made)
    moved = to_device(batch, CPU)
    ours: List[Any] = []
    theirs: List[Any] = []
    assert flatten(moved, ours) == flatten(batch, theirs)
    assert all(a.device == CPU for a in ours)
    assert all((a.numpy() == b.numpy()).all() for a, b in zip(ours, theirs))


def test_to_device_leaves_alone_what_is_no_tensor() -> None:
    thing = object()
    array = np.zeros(2)
    batch = {"thing": thing, "array": array, "names": ["a", "b"]}
    moved = to_device(batch, CPU)
    assert moved["thing"] is thing
    assert moved["array"] is array
    assert moved["names"] == ["a", "b"]


# ---------------------------------------------------------------------- batch sizes


@quick
@given(tree=TREES)
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor_that_has_one(tree: Any) -> None:
    made: List[Any] = []
    batch = with_tensors(tree, made)
    assert batch_size_of(batch) == next((each.shape[0] for each in made if each.ndim), 1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        pytest.param(lambda x: x, 3, id="tensor"),
        pytest.param(lambda x: (["a", "b", "c"], x), 3, id="names first"),
        pytest.param(lambda x: ([], x), 3, id="empty list first"),
        pytest.param(lambda x: {"meta": {"a": 1}, "x": x}, 3, id="other dict first"),
        pytest.param(lambda x: [[1, 2], [x]], 3, id="numbers first"),
        pytest.param(lambda x: "text", 1, id="text"),
        pytest.param(lambda x: None, 1, id="nothing"),
        pytest.param(lambda x: [], 1, id="empty"),
        pytest.param(lambda x: (x.sum(), x), 3, id="a number as a tensor first"),
    ],
)
def test_batch_sizes_by_hand(batch: Any, expected: int) -> None:
    assert batch_size_of(batch(flow.zeros(3, 2))) == expected


# ---------------------------------------------------------------------- shuffling


class Numbers(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return flow.tensor([float(index)])


def subset() -> DataLoader:
    return DataLoader(Numbers(), sampler=SubsetRandomSampler(list(range(5, 17))))


def with_batch_sampler(**options: Any) -> DataLoader:
    sampler = BatchSampler(RandomSampler(Numbers(), **options), batch_size=3, drop_last=False)
    return DataLoader(Numbers(), batch_sampler=sampler)


def own_generator() -> Any:
    generator = flow.Generator("cpu")
    generator.manual_seed(99)
    return generator


LOADERS = [
    pytest.param(lambda: DataLoader(Numbers(), shuffle=True), id="shuffle"),
    pytest.param(lambda: DataLoader(Numbers(), shuffle=True, batch_size=4), id="batches"),
    pytest.param(
        lambda: DataLoader(Numbers(), shuffle=True, generator=own_generator()), id="own generator"
    ),
    pytest.param(
        lambda: DataLoader(Numbers(), sampler=RandomSampler(Numbers(), replacement=True)),
        id="replacement",
    ),
    pytest.param(
        lambda: DataLoader(Numbers(), sampler=RandomSampler(Numbers(), generator=own_generator())),
        id="sampler with a generator",
    ),
    pytest.param(subset, id="subset"),
    pytest.param(
        lambda: with_batch_sampler(generator=own_generator()), id="batch sampler with a generator"
    ),
]


def order(batches: Batches) -> List[float]:
    return [number for batch in batches for number in batch.numpy().ravel().tolist()]


@pytest.mark.parametrize("make", LOADERS)
def test_reseed_makes_the_order_a_function_of_the_seed_alone(make: Any) -> None:
    first, second = batches_of(make()), batches_of(make())
    first.reseed(1)
    one = order(first)
    first.reseed(2)
    two = order(first)
    assert one != two
    order(second)  # another history: a pass before, other draws
    np.random.seed(123)
    flow.manual_seed(123)
    second.reseed(2)
    assert order(second) == two
    second.reseed(1)
    assert order(second) == one


def test_reseed_leaves_the_order_of_what_is_not_shuffled() -> None:
    batches = batches_of(DataLoader(Numbers()))
    batches.reseed(5)
    assert order(batches) == list(range(20))
    plain = batches_of([flow.tensor([2.0]), flow.tensor([1.0])])
    plain.reseed(5)
    assert order(plain) == [2.0, 1.0]


def test_reseed_works_for_an_iterable_dataset() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return (flow.tensor([float(index)]) for index in range(4))

    batches = batches_of(DataLoader(Stream(), batch_size=2))
    batches.reseed(5)
    assert order(batches) == [0.0, 1.0, 2.0, 3.0]
    assert batches.count is None


def test_indices_that_go_to_a_worker_seed_there_and_not_here() -> None:
    indices = _SeededIndices([4, 2], (1, 2, 3))
    before = random.getstate(), np.random.get_state()[1].tolist()
    there = pickle.loads(pickle.dumps(indices))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert type(there) is _SeededIndices
    assert list(there) == [4, 2]
    assert (random.getstate(), np.random.get_state()[1].tolist()) != before
    first = np.random.rand()
    list(there)
    assert np.random.rand() == first
