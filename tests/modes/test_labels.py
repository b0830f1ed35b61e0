"""Labels that are no class are told before they are trained on, in both modes."""

from __future__ import annotations

import functools
import re
import threading
from typing import Any, Callable, List

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
import pytest
from helpers import image_batches, quiet_trainer, refused
from oneflow import nn
from oneflow.nn.functional import cross_entropy as under_another_name

from ofengine import DataError, TaskModule

CLASSES = 3


class Net(TaskModule):
    """Scores of three classes for rows of two numbers."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.layer = nn.Linear(2, CLASSES), nn.CrossEntropyLoss()
        self.function, self.chosen = F.cross_entropy, loss

    def loss(self, batch: Any) -> Any:
        rows, labels = batch
        return self.chosen(self, self.net(rows), labels)  # the line

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", self.loss(batch))

    test_step = validation_step


def batch_of(*labels: int, dtype: Any = flow.int64) -> Any:
    return flow.ones(len(labels), 2), flow.tensor(labels, dtype=dtype)


WAYS = {
    "a function": lambda task, z, y: F.cross_entropy(z, y),
    "a function imported": lambda task, z, y: under_another_name(z, y),
    "a function kept": lambda task, z, y: task.function(z, y),
    "a layer": lambda task, z, y: task.layer(z, y),
    "a layer made in the step": lambda task, z, y: nn.CrossEntropyLoss()(z, y),
    "by names": lambda task, z, y: F.cross_entropy(target=y, input=z, reduction="sum"),
    "without a reduction": lambda task, z, y: F.cross_entropy(z, y, reduction="none").mean(),
    "smoothed": lambda task, z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "weighted": lambda task, z, y: F.cross_entropy(z, y, flow.ones(CLASSES)),
    "negative log likelihood": lambda task, z, y: nn.NLLLoss()(F.log_softmax(z, 1), y),
    "sparse": lambda task, z, y: F.sparse_softmax_cross_entropy(y, z).mean(),
    "cast": lambda task, z, y: F.cross_entropy(z, y.to(flow.int32).long()),
    "reshaped": lambda task, z, y: F.cross_entropy(z, y.view(2, 2).t().t().flatten()),
    "squeezed": lambda task, z, y: F.cross_entropy(z, y.unsqueeze(1).squeeze(1)),
    "images": lambda task, z, y: F.cross_entropy(
        z.view(2, 2, CLASSES).permute(0, 2, 1), y.view(2, 2)
    ),
    "two losses": lambda task, z, y: F.cross_entropy(z, y * 0) + F.cross_entropy(z, y),
}


@pytest.mark.filterwarnings("ignore:.*is called in a nn.Graph")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_labels_beyond_the_classes_are_refused(mode: str, way: str, accumulate: int) -> None:
    text = refused(
        Net(WAYS[way]), DataError, "2 of 4 labels", "-1, 3", "3 classes are 0 to 2", mode=mode,
        train=[batch_of(0, 3, -1, 1)] * 2, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert re.search(rf"at {re.escape(__file__)}:\d+: `", text)


@pytest.mark.parametrize("change", [0, 1])
def test_labels_that_the_step_cuts_and_shifts_are_those_that_count(mode: str, change: int) -> None:
    # The first label is cut off, the others are counted from 1.
    task = Net(lambda task, z, y: F.cross_entropy(z[1:], y[1:] - 1))
    train = [batch_of(99, 1, 2, 3 + change)] * 2
    if change:
        refused(task, DataError, "1 of 3 labels that are no class: 3,", mode=mode, train=train)
    else:
        quiet_trainer(mode=mode, max_epochs=1).fit(task, train)


@pytest.mark.parametrize("dtype", [flow.int32, flow.int64])
def test_what_is_to_be_ignored_is_no_mistake(mode: str, dtype: Any) -> None:
    def ignoring(ignored: int) -> Net:
        return Net(lambda task, z, y: F.cross_entropy(z, y, ignore_index=ignored))

    for task, labels in (
        (Net(WAYS["a function"]), (0, 1, 2, -100)),  # OneFlow's own default
        (ignoring(255), (0, 255, 2, 1)),
        (ignoring(-1), (-1, -1, 2, 1)),
        (ignoring(1), (0, 1, 2, 2)),
    ):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [batch_of(*labels, dtype=dtype)])
    refused(
        ignoring(255), DataError, "1 of 4 labels that are no class: 254,", "ignore_index",
        mode=mode, train=[batch_of(255, 254, 0, 1, dtype=dtype)],
    )  # fmt: skip


def test_shares_of_classes_are_no_labels(mode: str) -> None:
    task = Net(lambda task, z, y: F.cross_entropy(z, F.one_hot(y, CLASSES).float()))
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [batch_of(0, 1, 2, 2)])


def test_each_new_shape_and_each_stage_is_looked_at(mode: str) -> None:
    good, bad = batch_of(0, 1, 2), batch_of(0, 1, 2, 7)
    task = Net(WAYS["a function"])
    refused(
        task, DataError, "labels that are no class: 7,", mode=mode, train=[good], trained=0,
        validation=[bad],
    )  # fmt: skip
    refused(
        task, DataError, "no class: 7,", mode=mode, train=[good], trained=1, validation=[bad],
        num_sanity_val_steps=0,
    )  # fmt: skip
    for verb in ("validate", "test"):
        with pytest.raises(DataError, match="no class: 7,"):
            getattr(quiet_trainer(mode=mode), verb)(task, [bad])
    if mode == "graph":
        refused(task, DataError, "no class: 7,", mode=mode, train=[good, bad], trained=1)


def test_a_loss_that_is_not_finite_has_all_labels_looked_at(mode: str) -> None:
    """The batch in the middle has no good label: its loss is NaN, though it trains nothing."""
    train = [batch_of(0, 1), *[batch_of(2, 1)] * 30, batch_of(8, 9), *[batch_of(1, 1)] * 28]
    with pytest.raises(DataError, match=r"2 of 2 labels that are no class: 8, 9,"):
        quiet_trainer(mode=mode, max_epochs=2, log_every_n_steps=32).fit(
            Net(WAYS["a function"]), train
        )


def test_a_loss_that_is_read_has_the_rest_of_the_epoch_looked_at(mode: str) -> None:
    train = [batch_of(0, 1), batch_of(8, 9), *[batch_of(2, 1)] * 3, batch_of(5, 1), batch_of(1, 1)]
    refused(
        Net(WAYS["a function"]), DataError, "1 of 2 labels that are no class: 5,", mode=mode,
        train=train, trained=5, log_every_n_steps=2,
    )  # fmt: skip


def by_hand(batches: List[Any]) -> np.ndarray:
    task = Net(WAYS["a layer"])
    with flow.no_grad():
        for parameter in task.parameters():
            parameter.fill_(0.5)
    optimizer = flow.optim.SGD(task.parameters(), lr=1e-3)
    for rows, labels in batches:
        F.cross_entropy(task.net(rows), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.net.weight.numpy()


@pytest.mark.parametrize("way", ["a function kept", "a function imported", "a layer"])
def test_looking_changes_nothing(mode: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the numbers, nor the functions that are replaced meanwhile, nor a graph."""
    batches = image_batches([4, 4, 3], shape=(2,), classes=CLASSES)
    task = Net(WAYS[way])
    with flow.no_grad():
        for parameter in task.parameters():
            parameter.fill_(0.5)
    kept = [F.cross_entropy, nn.functional.nll_loss if hasattr(F, "nll_loss") else None]
    with caplog.at_level("INFO", logger="ofengine"):
        quiet_trainer(mode=mode, max_epochs=3).fit(task, batches, batches)
    assert task.net.weight.numpy().tobytes() == by_hand(batches * 3).tobytes()
    assert F.cross_entropy is task.function is under_another_name is kept[0]
    assert not [each for each in caplog.messages if "ompil" in each]


def test_a_partial_is_trained_on_all_the_same(mode: str) -> None:
    """It holds OneFlow's function where nobody can look; what is right is not refused."""
    task = Net(functools.partial(lambda f, task, z, y: f(z, y), F.cross_entropy))
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [batch_of(0, 1, 2)])


def test_a_loss_on_a_class_is_looked_at(mode: str) -> None:
    class Own(Net):
        kept = F.cross_entropy

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.kept(self.net(batch[0]), batch[1])

    own = Own(WAYS["a function"])
    refused(own, DataError, "no class: 5,", mode=mode, train=[batch_of(0, 5)])
    assert Own.kept is F.cross_entropy


def test_two_threads_look_each_at_its_own() -> None:
    """They are both within a step when each has its labels looked at."""
    original, told = F.cross_entropy, {}
    within = threading.Barrier(2)

    class Meets(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            within.wait(60)
            try:
                self.loss(batch)
            finally:
                within.wait(60)

    def validate(name: str, *labels: int) -> None:
        try:
            quiet_trainer().validate(Meets(WAYS["a function"]), [batch_of(*labels)])
        except DataError as error:
            told[name] = str(error)

    threads = [
        threading.Thread(target=validate, args=(name, *labels))
        for name, labels in {"good": (0, 1), "bad": (0, 6)}.items()
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert list(told) == ["bad"]
    assert "no class: 6," in told["bad"]
    assert F.cross_entropy is original
