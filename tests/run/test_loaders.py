"""Loaders that fit cannot train or validate on as they are: told before training, or in the end."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List

import oneflow as flow
import pytest
from helpers import Bare, Line, OfClaimedLength, OfUnknownLength, batches, quiet_trainer, refused
from oneflow.utils.data import DataLoader, Dataset, IterableDataset

from ofengine import Callback, DataError, OFEngineError, OFEngineWarning


def loader(count: int = 2) -> DataLoader:
    return DataLoader([each[0] for each in batches(count)])  # type: ignore[arg-type]


class Validations(Callback):
    """Counts the batches of each validation, that of the sanity check first."""

    def __init__(self) -> None:
        self.counts: List[int] = []

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        self.counts.append(0)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.counts[-1] += 1


def validated(validation: Any, **arguments: Any) -> List[int]:
    seen = Validations()
    trainer = quiet_trainer(callbacks=[seen], **arguments)
    trainer.fit(Line(), batches(4), validation)
    return seen.counts


# ---------------------------------------------------------------------- several loaders


def test_a_list_of_batches_that_are_lists_is_one_loader(mode: str) -> None:
    class OfPairs(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean() + self.layer(batch[1]).mean()

    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(OfPairs(), [batches(2), batches(2)])
    assert trainer.global_step == 2


def test_which_of_several_validation_loaders_it_is_is_told(mode: str) -> None:
    class Empty(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    loaders = [loader(), DataLoader(Empty())]
    refused(
        Line(), DataError, r"val_dataloader\[1\] gave no batch", mode=mode, validation=loaders,
        trained=2, num_sanity_val_steps=0,
    )  # fmt: skip


# ---------------------------------------------------------------------- validation on an iterator


def once(count: int) -> Iterator[Any]:
    return (batch for batch in batches(count))


@pytest.mark.parametrize("make", [once, lambda n: iter(batches(n)), lambda n: map(abs, batches(n))])
def test_a_generator_for_several_validations_is_refused(mode: str, make: Any) -> None:
    for arguments in (
        {"max_epochs": 3},
        {"max_epochs": 1, "val_check_interval": 1},
        {"max_epochs": 1, "val_check_interval": 0.5},
        {"max_epochs": -1, "max_steps": 4},
        {"max_epochs": 4, "check_val_every_n_epoch": 2},
    ):
        refused(
            Line(), DataError, "val_dataloader", "generator|iterator", "once", mode=mode,
            validation=make(2), **arguments,
        )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 1},
        {"max_epochs": 3, "check_val_every_n_epoch": 3},
        {"max_epochs": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 5, "max_steps": 7},
        {"max_epochs": 1, "val_check_interval": 3},
    ],
)
@pytest.mark.parametrize("sanity", [0, 2, -1])
def test_one_validation_on_a_generator_has_all_its_batches(
    mode: str, arguments: Dict[str, Any], sanity: int
) -> None:
    assert validated(once(3), mode=mode, num_sanity_val_steps=sanity, **arguments) == [3]


def test_the_sanity_check_tries_the_other_loaders(mode: str) -> None:
    class Iterates:
        """An iterator of somebody's own, which begins anew."""

        def __iter__(self) -> Any:
            self.batches = iter(batches(3))
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    assert validated(Iterates(), mode=mode, max_epochs=2) == [3, 3]
    assert validated(OfUnknownLength(batches(3)), mode=mode, max_epochs=2) == [2, 3, 3]


def test_an_endless_generator_can_be_limited(mode: str) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from batches(2)

    assert validated(endless(), mode=mode, max_epochs=2, limit_val_batches=3) == [3, 3]


def test_a_limited_generator_that_runs_dry_is_told(mode: str) -> None:
    refused(
        Line(), DataError, "val_dataloader gave no batch in the validation of epoch 1",
        "generator", "once", mode=mode, validation=once(2), limit_val_batches=2, max_epochs=3,
        trained=4,
    )  # fmt: skip


def test_an_iterator_over_a_loader_is_used_up(mode: str) -> None:
    refused(
        Line(), DataError, "val_dataloader gave no batch", "iterator", "once", mode=mode,
        validation=iter(loader()), max_epochs=3, trained=4,
    )  # fmt: skip
    refused(
        Line(), DataError, "train_dataloader gave no batch", "iterator", "once", mode=mode,
        train=iter(loader()), max_epochs=3, trained=2,
    )  # fmt: skip


def test_training_and_validation_on_one_generator_are_refused(mode: str) -> None:
    data = once(4)
    refused(
        Line(), DataError, "val_dataloader", "each its own", mode=mode, train=data, validation=data
    )


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_generator_is_evaluated_once(mode: str, verb: str) -> None:
    class All(Line):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.layer(batch).mean())

        def forward(self, batch: Any) -> Any:
            return self.layer(batch)

    data, task = once(2), All()
    evaluate = getattr(quiet_trainer(mode=mode), verb)
    assert evaluate(task, data)
    with pytest.raises(DataError, match=r"gave no batch.*generator.*once"):
        evaluate(task, data)


# ---------------------------------------------------------------------- lengths


class AllSteps(Line):
    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def forward(self, batch: Any) -> Any:
        return batch


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("claimed", [2, 4])
def test_a_wrong_length_is_told_by_every_verb(mode: str, verb: str, claimed: int) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    call = getattr(trainer, verb)
    name = {"fit": "train", "validate": "val"}.get(verb, verb)
    if verb == "fit" and claimed == 4:
        with pytest.raises(DataError, match=r"train_dataloader gave 3 batches.*length is 4"):
            call(AllSteps(), OfClaimedLength(claimed, batches(3)))
        return
    with pytest.warns(OFEngineWarning, match=rf"{name}_dataloader .*(length|__len__).*{claimed}"):
        call(AllSteps(), OfClaimedLength(claimed, batches(3)))


# ---------------------------------------------------------------------- accidents


class Stops(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return next(iter([flow.ones(2)] if index < 2 else []))


def test_a_stop_iteration_in_the_data_ends_no_epoch(mode: str) -> None:
    for arguments in ({}, {"accumulate_grad_batches": 2}, {"overfit_batches": 4}):
        kept = "overfit_batches" in arguments
        refused(
            Line(), DataError, "train_dataloader raised StopIteration at", "next", mode=mode,
            train=DataLoader(Stops()), trained=0 if kept else 2, **arguments,
        )  # fmt: skip
    refused(
        Line(), DataError, "val_dataloader raised StopIteration at", mode=mode,
        validation=DataLoader(Stops()), trained=2, num_sanity_val_steps=0,
    )  # fmt: skip


def test_a_stop_iteration_in_a_step_is_told_as_it_is(mode: str) -> None:
    class Step(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(next(iter([]))).mean()

    with pytest.raises((StopIteration, OFEngineError)) as error:
        quiet_trainer(mode=mode, max_epochs=1).fit(Step(), batches())
    if mode == "graph":
        assert "next(iter([]))" in str(error.value)
