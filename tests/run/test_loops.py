"""The loops: which batches are seen when, when they end, and in which mode modules are."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Tuple

import oneflow as flow
import pytest
from fits import fitted
from helpers import (
    OfUnknownLength,
    SquaredLine,
    assert_same_weights,
    numbered_batches,
    quiet_trainer,
    sized,
)
from oneflow import nn
from oneflow.utils.data import DataLoader, IterableDataset

from ofengine import Callback, TaskModule

# ---------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("count", "accumulate", "epochs", "steps"),
    [(3, 1, 2, 6), (5, 2, 2, 6), (4, 2, 3, 6), (2, 5, 2, 2), (1, 1, 1, 1), (7, 3, 1, 3)],
)
def test_steps_are_windows_and_windows_end_with_the_epoch(
    mode: str, count: int, accumulate: int, epochs: int, steps: int
) -> None:
    _, trainer = fitted(
        train=numbered_batches(count),
        mode=mode,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
    )
    assert trainer.global_step == steps
    assert trainer.current_epoch == epochs
    assert trainer.batches_seen == count * epochs


def test_progress_as_the_hooks_see_it(mode: str) -> None:
    seen: List[Tuple[str, int, int, int]] = []

    class Looks(Callback):
        def look(self, what: str, trainer: Any) -> None:
            seen.append((what, trainer.current_epoch, trainer.batch_idx, trainer.global_step))

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.look("start", trainer)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.look("end", trainer)

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            self.look("epoch", trainer)

    fitted(mode=mode, max_epochs=2, accumulate_grad_batches=2, callbacks=[Looks()])
    assert seen == [
        ("start", 0, 0, 0), ("end", 0, 0, 0),
        ("start", 0, 1, 0), ("end", 0, 1, 1),
        ("start", 0, 2, 1), ("end", 0, 2, 2), ("epoch", 0, 2, 2),
        ("start", 1, 0, 2), ("end", 1, 0, 2),
        ("start", 1, 1, 2), ("end", 1, 1, 3),
        ("start", 1, 2, 3), ("end", 1, 2, 4), ("epoch", 1, 2, 4),
    ]  # fmt: skip


def test_total_steps_is_known_ahead_where_it_can_be() -> None:
    def total(train: Any, **arguments: Any) -> List[Optional[int]]:
        seen: List[Optional[int]] = []

        class Looks(Callback):
            def on_fit_start(self, trainer: Any, task: Any) -> None:
                seen.append(trainer.total_steps)

        quiet_trainer(callbacks=Looks(), **arguments).fit(SquaredLine(), train)
        return seen

    assert total(numbered_batches(5), max_epochs=3, accumulate_grad_batches=2) == [9]
    assert total(numbered_batches(5), max_epochs=3, max_steps=4) == [4]
    assert total(numbered_batches(5), max_steps=4) == [4]
    assert total(OfUnknownLength(numbered_batches(5)), max_epochs=1) == [None]
    assert total(OfUnknownLength(numbered_batches(5)), max_epochs=1, max_steps=2) == [2]
    # A limit on what has no length is the most there can be.
    (most,) = total(OfUnknownLength(numbered_batches(5)), max_epochs=2, limit_train_batches=2)
    assert most in (None, 4)


# ---------------------------------------------------------------------- stopping


class Stops(Callback):
    def __init__(self, hook: str, at: int) -> None:
        self.at = at
        self.count = 0
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any) -> None:
        if self.count == self.at:
            trainer.should_stop = True
        self.count += 1


@pytest.mark.parametrize(
    ("hook", "at", "expected"),
    [
        ("on_train_batch_end", 1, "0 1 |"),
        ("on_train_batch_end", 2, "0 1 2 v |"),
        ("on_train_epoch_end", 0, "0 1 2 v |"),
        ("on_validation_end", 1, "0 1 2 v | 0 1 2 v |"),
        ("on_train_start", 0, ""),
    ],
)
def test_should_stop_ends_training_and_the_epoch_in_order(
    mode: str, hook: str, at: int, expected: str
) -> None:
    diary, _ = fitted(
        mode=mode, max_epochs=5, validation=numbered_batches(1), callbacks=[Stops(hook, at)]
    )
    assert diary == expected


def test_should_stop_still_ends_the_run_properly(mode: str) -> None:
    ended: List[str] = []

    class Ends(Callback):
        def on_train_end(self, trainer: Any, task: Any) -> None:
            ended.append("train")

        def on_fit_end(self, trainer: Any, task: Any) -> None:
            ended.append("fit")

        def teardown(self, trainer: Any, task: Any, stage: str) -> None:
            ended.append("teardown")

    fitted(mode=mode, callbacks=[Stops("on_train_batch_end", 0), Ends()])
    assert ended == ["train", "fit", "teardown"]


def test_a_window_that_was_stopped_half_way_leaves_no_gradients_for_the_next_fit(mode: str) -> None:
    def after(first_fit: bool) -> TaskModule:
        task = SquaredLine()
        if first_fit:  # two of three batches of a window, then stop: no step was made
            fitted(
                task, mode=mode, accumulate_grad_batches=3,
                callbacks=[Stops("on_train_batch_end", 1)],
            )  # fmt: skip
        fitted(task, numbered_batches(3, start=5), mode=mode, accumulate_grad_batches=3)
        return task

    assert_same_weights(after(first_fit=True), after(first_fit=False))


def test_gradients_from_before_fit_do_not_leak_into_it(mode: str) -> None:
    def after(own_backward: bool) -> TaskModule:
        task = SquaredLine()
        if own_backward:
            task(flow.ones(4, 2)).sum().backward()
        fitted(task, mode=mode)
        return task

    assert_same_weights(after(own_backward=True), after(own_backward=False))


# ---------------------------------------------------------------------- train and eval mode


def test_modules_that_a_user_put_in_eval_stay_there_after_validation(mode: str) -> None:
    class Frozen(SquaredLine):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.drop = nn.Dropout(0.5)

        def on_train_start(self) -> None:
            self.norm.eval()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(self.norm(batch)).mean()

    seen: List[Tuple[bool, bool, bool]] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
            seen.append((task.training, task.norm.training, task.drop.training))

        def on_validation_start(self, trainer: Any, task: Any) -> None:
            assert not any(module.training for module in task.modules())

    task = Frozen()
    fitted(
        task, sized(2, 2), numbered_batches(1), mode=mode, max_epochs=2, val_check_interval=1,
        callbacks=[Looks()],
    )  # fmt: skip
    assert seen == [(True, False, True)] * 4
    assert task.norm.num_batches_tracked.item() == 0
    assert task.norm.running_mean.numpy().tolist() == [0.0, 0.0]


def test_evaluation_leaves_train_and_eval_modes_as_they_were(mode: str) -> None:
    task = SquaredLine()
    task.layer.eval()
    quiet_trainer(mode=mode).validate(task, numbered_batches(1))
    assert (task.training, task.layer.training) == (True, False)


def test_evaluation_computes_no_gradients(mode: str) -> None:
    task = SquaredLine()
    quiet_trainer(mode=mode).test(task, numbered_batches(2))
    assert all(parameter.grad is None for parameter in task.parameters())
    assert all(parameter.requires_grad for parameter in task.parameters())


# ---------------------------------------------------------------------- unknown lengths


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (flow.ones(2) * float(index) for index in range(5))


@pytest.mark.parametrize("accumulate", [1, 2, 5, 9])
def test_an_iterable_dataset_trains_every_batch(mode: str, accumulate: int) -> None:
    class Batched(SquaredLine):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.layer(batch) ** 2).mean()

    known, unknown = Batched(), Batched()
    data = [flow.tensor([[0.0, 0.0], [1.0, 1.0]]), flow.tensor([[2.0, 2.0], [3.0, 3.0]])]
    data.append(flow.tensor([[4.0, 4.0]]))
    arguments: Dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    diary, first = fitted(known, data, mode=mode, **arguments)
    loader = DataLoader(Stream(), batch_size=2)
    assert fitted(unknown, loader, mode=mode, **arguments)[0] == diary == "0 2 4 | 0 2 4 |"
    assert_same_weights(known, unknown)
    assert first.global_step == 2 * -(-3 // accumulate)


def test_epochs_of_different_lengths(mode: str) -> None:
    train = OfUnknownLength(numbered_batches(1), numbered_batches(3), numbered_batches(2))
    diary, trainer = fitted(
        train=train,
        mode=mode,
        max_epochs=3,
        validation=numbered_batches(1),
        accumulate_grad_batches=2,
    )
    assert diary == "0 v | 0 1 2 v | 0 1 v |"
    assert trainer.global_step == 1 + 2 + 1
    assert train.begun == 3


def test_a_generator_lasts_for_one_epoch(mode: str) -> None:
    assert fitted(train=(batch for batch in numbered_batches(3)), mode=mode)[0] == "0 1 2 |"


def test_evaluation_over_a_generator(mode: str) -> None:
    task = SquaredLine()
    results = quiet_trainer(mode=mode).validate(task, (batch for batch in numbered_batches(3)))
    assert results == [{"seen": 1.0}]
