"""What batches come from: shares, lengths that are not true, epochs, ends that are accidents."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator, List

import oneflow as flow
import pytest
from helpers import OfClaimedLength, OfUnknownLength, line_of, quiet_trainer
from hypothesis import given, strategies as st
from oneflow.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)
from oneflow.utils.data.distributed import DistributedSampler

from ofengine import Callback, ConfigurationError, DataError, OFEngineWarning, TaskModule
from ofengine._oneflow.loaders import workers_noted
from ofengine.data.batches import Batches
from ofengine.data.sources import count_batches, is_used_up, set_epoch
from ofengine.run.arguments import batches_between_validations

CPU = flow.device("cpu")


@pytest.fixture(autouse=True)
def _workers_end() -> Iterator[None]:
    """End them after an error too, as a run does; the garbage collector takes ten seconds."""
    with workers_noted():
        yield


def all_of(batches: Batches) -> List[Any]:
    listed: List[Any] = []
    listed.extend(batches)  # list(batches) would lose an error with the tensors of workers
    return listed


def batches_of(source: Any, limit: Any = None) -> Batches:
    return Batches(source, limit, CPU, "val_dataloader", "limit_val_batches")


# ---------------------------------------------------------------------- shares


@given(batches=st.integers(1, 5_000), hundredths=st.integers(1, 99))
def test_a_share_in_hundredths_is_meant_exactly(batches: int, hundredths: int) -> None:
    expected = batches * hundredths // 100
    share = float(f"0.{hundredths:02}")
    assert batches_between_validations(share, batches) == max(1, expected)
    if expected:
        assert count_batches(batches, share, "data", "limit") == expected
    else:
        with pytest.raises(ConfigurationError, match="less than one batch"):
            count_batches(batches, share, "data", "limit")


@given(batches=st.integers(1, 5_000), data=st.data())
def test_so_many_parts_of_all_batches_are_so_many_batches(batches: int, data: Any) -> None:
    count = data.draw(st.integers(1, batches))
    parts = data.draw(st.integers(1, 40))
    assert count_batches(batches, count / batches, "data", "limit") == count
    assert count_batches(batches * parts, count / batches, "data", "limit") == count * parts


@given(batches=st.integers(1, 1_000), share=st.floats(0.01, 1.0))
def test_a_share_is_never_more_than_it_says(batches: int, share: float) -> None:
    exact = Fraction(share) * batches
    if exact >= 1:
        count = count_batches(batches, share, "data", "limit")
        assert count is not None
        assert exact - 1 < count <= exact + Fraction(1, 10**9)


@pytest.mark.parametrize(
    ("share", "batches", "expected"),
    # The rest of a sum of shares, and a multiple of one, are off by a rounding or two.
    [(1 - 0.7, 10, 3), (1 - 0.9, 10, 1), (3 * 0.1, 10, 3), (0.7 + 0.1, 10, 8), (1 - 0.93, 100, 7)],
)
def test_a_share_that_was_computed_is_what_was_meant(
    share: float, batches: int, expected: int
) -> None:
    assert count_batches(batches, share, "data", "limit") == expected
    assert batches_between_validations(share, batches) == expected


# ---------------------------------------------------------------------- lengths


class OfIndices(IterableDataset):
    """Numbers from 0, and a length that its author believes."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (flow.tensor(index) for index in range(self.count))


class ShortSampler(Sampler):
    """Gives six indices, and says four."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class ListOfOther(List[Any]):
    def __len__(self) -> int:
        return 4


SIX_OF_FOUR = {
    "a class": lambda: OfClaimedLength(4, list(range(6))),
    "a list": lambda: ListOfOther(range(6)),
    "a sampler": lambda: DataLoader(
        TensorDataset(flow.arange(6)), sampler=ShortSampler(), collate_fn=lambda x: int(x[0][0])
    ),
    "a dataset": lambda: DataLoader(OfIndices(6, 4), batch_size=1, collate_fn=lambda x: int(x[0])),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("source", SIX_OF_FOUR)
@pytest.mark.parametrize("limit", [None, 1.0, 5])
def test_what_lies_beyond_the_length_is_told_once(source: str, limit: Any) -> None:
    batches = batches_of(SIX_OF_FOUR[source](), limit)
    with pytest.warns(OFEngineWarning, match=r"val_dataloader .*length, 4.*__len__.*=4") as told:
        passes = [list(batches), list(batches)]
    assert passes == [[0, 1, 2, 3]] * 2
    assert len([each for each in told if each.category is OFEngineWarning]) == 1


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("source", SIX_OF_FOUR)
@pytest.mark.parametrize("limit", [4, 3, 0.5])
def test_what_was_not_asked_for_is_left_out_without_a_word(
    source: str, limit: Any, recwarn: pytest.WarningsRecorder
) -> None:
    assert (
        list(batches_of(SIX_OF_FOUR[source](), limit))
        == [0, 1, 2, 3][: 2 if limit == 0.5 else limit]
    )
    assert not [each for each in recwarn if each.category is OFEngineWarning]


def test_an_endless_loader_with_a_length_is_read_one_batch_further() -> None:
    taken: List[int] = []

    class Endless:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            for index in itertools.count():
                taken.append(index)
                yield index

    with pytest.warns(OFEngineWarning, match="limit_val_batches=3"):
        assert list(batches_of(Endless())) == [0, 1, 2]
    assert len(taken) == 4
    assert list(batches_of(Endless(), limit=3)) == [0, 1, 2]
    assert len(taken) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_true_length_is_no_matter(workers: int, recwarn: pytest.WarningsRecorder) -> None:
    loader = DataLoader(TensorDataset(flow.arange(5)), batch_size=2, num_workers=workers)
    batches = batches_of(loader)
    for _ in range(2):
        assert [each[0].numpy().tolist() for each in batches] == [[0, 1], [2, 3], [4]]
    assert not [each for each in recwarn if each.category is OFEngineWarning]


# ---------------------------------------------------------------------- iterators


class BeginsAnew:
    """An iterator of somebody's own, whose ``__iter__`` goes back to the start."""

    def __init__(self, count: int) -> None:
        self.count = self.at = count

    def __iter__(self) -> BeginsAnew:
        self.at = 0
        return self

    def __next__(self) -> int:
        if self.at == self.count:
            raise StopIteration
        self.at += 1
        return self.at - 1


def test_only_an_iterator_of_python_s_is_known_to_be_used_up() -> None:
    for once in ((x for x in ()), iter([1]), map(abs, [1]), zip([1]), itertools.count()):
        assert is_used_up(once)
    for again in ([1], (1,), range(3), BeginsAnew(3), OfUnknownLength([1]), "text"):
        assert not is_used_up(again)
    batches = batches_of(BeginsAnew(3))
    assert [list(batches), list(batches)] == [[0, 1, 2]] * 2


# ---------------------------------------------------------------------- epochs


class Told:
    """Notes each epoch that it is told."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.epochs: List[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class ToldSampler(Told, Sampler):
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(2))


class ToldBatchSampler(Told, BatchSampler):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[List[int]]:
        return iter([[0, 1]])


class ToldDataset(Told, Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return flow.tensor([float(self.epochs[-1] if self.epochs else -1)])


class ToldLoader(Told):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_whatever_can_be_told_the_epoch_is_told_once() -> None:
    parts: List[Any] = [ToldSampler(), ToldBatchSampler(), *(ToldDataset() for _ in range(5))]
    sampler, batch_sampler, plain, in_subset, first, second, of_batches = parts
    loaders: List[Any] = [
        DataLoader(plain, sampler=sampler),
        DataLoader(Subset(Subset(in_subset, [0, 1]), [0])),
        DataLoader(ConcatDataset([first, second]), shuffle=True),
        DataLoader(of_batches, batch_sampler=batch_sampler),
        ToldLoader(),
    ]
    for epoch in (0, 3):
        for loader in loaders:
            set_epoch(loader, epoch)
    assert [part.epochs for part in [*parts, loaders[-1]]] == [[0, 3]] * 8


def test_a_sampler_within_a_batch_sampler_of_ones_own_is_told() -> None:
    sampler = ToldSampler()
    set_epoch(
        DataLoader(TensorDataset(flow.arange(2)), batch_sampler=BatchSampler(sampler, 2, False)), 4
    )
    assert sampler.epochs == [4]


def test_a_set_epoch_of_other_arguments_is_told_and_left_alone() -> None:
    class Other(ToldDataset):
        def set_epoch(self, epoch: int, total: int) -> None:  # type: ignore[override]
            raise AssertionError

    with pytest.warns(OFEngineWarning, match=r"Other\.set_epoch.*epoch alone"):
        set_epoch(DataLoader(Other()), 1)


def test_what_set_epoch_raises_is_not_swallowed() -> None:
    class Broken(ToldDataset):
        def set_epoch(self, epoch: int) -> None:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        set_epoch(DataLoader(Broken()), 1)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_workers_copy_of_the_dataset_knows_the_epoch(persistent: bool) -> None:
    loader = DataLoader(ToldDataset(), num_workers=1, persistent_workers=persistent)
    batches = batches_of(loader)
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert [each.item() for each in batches] == [epoch] * 2


# ---------------------------------------------------------------------- accidents


class Stops(Dataset):
    """Its third sample is taken from an iterator that has no more."""

    def __init__(self, error: Any = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            next(iter(()))
        return flow.tensor(index)


def stops_in_collate(samples: List[Any]) -> Any:
    next(iter([each for each in samples if int(each) < 2]))
    return flow.tensor([int(each) for each in samples])


# OneFlow's workers hang over single samples of no dimension, with nothing to be said about them.
@pytest.mark.parametrize(("workers", "batch_size"), [(0, None), (0, 1), (0, 2), (2, 1), (2, 2)])
def test_a_dataset_s_stop_iteration_is_no_end(workers: int, batch_size: Any) -> None:
    batches = batches_of(DataLoader(Stops(), batch_size=batch_size, num_workers=workers))
    with pytest.raises(
        DataError, match=r"val_dataloader raised StopIteration at .*next\(iter"
    ) as error:
        all_of(batches)
    assert line_of(Stops.__getitem__).rpartition(":")[0] in str(error.value)
    assert isinstance(error.value.__cause__, StopIteration)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_iteration_in_collate_fn_is_no_end(workers: int) -> None:
    loader: Any = DataLoader(list(range(5)), collate_fn=stops_in_collate, num_workers=workers)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"collate_fn.*StopIteration at .*next"):
        all_of(batches_of(loader))


def test_a_stop_iteration_in_collate_fn_of_an_iterable_dataset_is_no_end() -> None:
    loader = DataLoader(OfIndices(5, 5), batch_size=1, collate_fn=stops_in_collate)
    with pytest.raises(DataError, match=r"collate_fn.*StopIteration at .*next"):
        all_of(batches_of(loader))


class Numbers(IterableDataset):
    """An iterator, which says by StopIteration that it is at its end."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Numbers:
        self.at = 0
        return self

    def __next__(self) -> Any:
        self.at += 1
        if self.at > 3:
            raise StopIteration
        return flow.tensor(self.at)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, None), (0, 1), (1, 1)])
def test_the_end_of_an_iterable_dataset_is_one(batch_size: Any, workers: int) -> None:
    batches = batches_of(DataLoader(Numbers(), batch_size=batch_size, num_workers=workers))
    for _ in range(2):
        assert [int(each.reshape(-1)[0]) for each in batches] == [1, 2, 3]


class HandSampler(Sampler):
    """An iterator class, which ends by StopIteration too."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> HandSampler:
        self.at = 0
        return self

    def __next__(self) -> int:
        if self.at == 3:
            raise StopIteration
        self.at += 1
        return self.at - 1


def test_the_end_of_a_sampler_is_one() -> None:
    loader = DataLoader(TensorDataset(flow.arange(3)), sampler=HandSampler())
    assert len(list(batches_of(loader))) == 3


# ---------------------------------------------------------------------- in a run


class Sums(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = flow.nn.Parameter(flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch[0].float()).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Seen(Callback):
    """Notes the numbers that are trained and validated on, epoch by epoch."""

    def __init__(self) -> None:
        self.trained: List[List[int]] = [[]]
        self.validated: List[List[int]] = [[]]

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trained[-1] += batch[0].numpy().tolist()

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.trained.append([])

    def on_validation_batch_end(self, trainer: Any, task: Any, o: Any, batch: Any, *_: Any) -> None:
        self.validated[-1] += batch[0].numpy().tolist()

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self.validated.append([])


class Saves(Callback):
    """Saves once, in epoch 1, in the hook that it is told."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path = path
        setattr(type(self), hook, Saves.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.batch_idx >= 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


DATA = TensorDataset(flow.arange(6))


def distributed() -> DistributedSampler:
    return DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=True)


def loaders() -> List[Any]:
    """For training and for validation."""
    return [DataLoader(DATA, batch_size=2, sampler=distributed()) for _ in range(2)]


def order_of(epoch: int) -> List[int]:
    """The order that the sampler gives by hand."""
    sampler = distributed()
    sampler.set_epoch(epoch)
    return list(sampler)


def flat(lists: List[List[int]]) -> List[int]:
    return [number for each in lists for number in each]


def test_a_distributed_sampler_shuffles_by_the_epoch(mode: str) -> None:
    seen = Seen()
    trainer = quiet_trainer(mode=mode, max_epochs=3, num_sanity_val_steps=0, callbacks=[seen])
    trainer.fit(Sums(), *loaders())
    assert seen.trained[:-1] == seen.validated[:-1] == [order_of(epoch) for epoch in range(3)]


@pytest.mark.filterwarnings("ignore:.*does not keep what")  # notes are to begin anew
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_start", "on_train_epoch_end"]
)
def test_a_resumed_epoch_is_shuffled_as_it_was(
    mode: str, seed: Any, hook: str, tmp_path: Path
) -> None:
    def fit(resume: Any) -> Seen:
        class SavesHere(Saves):
            pass

        seen = Seen()
        callbacks = [seen, SavesHere(tmp_path / "saved", hook)]
        trainer = quiet_trainer(
            mode=mode, max_epochs=3, num_sanity_val_steps=0, seed=seed, callbacks=callbacks
        )
        trainer.fit(Sums(), *loaders(), ckpt_path=resume)
        return seen

    whole, resumed = fit(None), fit(tmp_path / "saved")
    assert whole.trained[:-1] == [order_of(epoch) for epoch in range(3)]
    for ours, theirs in ((resumed.trained, whole.trained), (resumed.validated, whole.validated)):
        rest = flat(ours)
        assert 0 < len(rest) < 18
        assert rest == flat(theirs)[18 - len(rest) :]


def test_a_hook_of_the_user_s_may_set_another_epoch(mode: str) -> None:
    sampler, seen = distributed(), Seen()

    class Own(Sums):
        def on_train_epoch_start(self) -> None:
            sampler.set_epoch(7)

    loader = DataLoader(DATA, batch_size=2, sampler=sampler)
    quiet_trainer(mode=mode, max_epochs=2, callbacks=[seen]).fit(Own(), loader)
    assert seen.trained[:-1] == [order_of(7)] * 2


@pytest.mark.filterwarnings("ignore:.*does not keep what")  # notes are to begin anew
def test_batches_that_are_kept_are_those_of_epoch_0(mode: str, tmp_path: Path) -> None:
    def fit(resume: Any) -> List[List[int]]:
        class SavesHere(Saves):
            pass

        seen = Seen()
        callbacks = [seen, SavesHere(tmp_path / "saved", "on_train_epoch_end")]
        trainer = quiet_trainer(mode=mode, max_epochs=3, overfit_batches=2, callbacks=callbacks)
        trainer.fit(Sums(), loaders()[0], ckpt_path=resume)
        return seen.trained[:-1]

    assert fit(None) == [order_of(0)[:4]] * 3
    assert fit(tmp_path / "saved") == [order_of(0)[:4]]
