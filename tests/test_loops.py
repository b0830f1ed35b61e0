"""The loops: which batches are seen when, what is reported, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import OfUnknownLength, assert_same_weights, quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, IterableDataset, TensorDataset

from ofengine import Callback, TaskModule, Trainer
from ofengine.loggers import Logger


class Line(TaskModule):
    """Fits a line by SGD, and logs the mean of what it sees in evaluation."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.rate = rate
        with flow.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.rate)


def batches(count: int, start: int = 0) -> List[Any]:
    """Batches of one sample whose every number is the batch's index."""
    return [flow.ones(1, 2) * (start + index) for index in range(count)]


def sized(*sizes: int) -> List[Any]:
    """Batches of so many samples; all numbers of the batch at index i are i + 1."""
    return [flow.ones(size, 2) * (index + 1) for index, size in enumerate(sizes)]


def loader_of(*numbers: float, batch_size: int = 1) -> DataLoader:
    samples = flow.tensor([[number, number] for number in numbers], dtype=flow.float32)
    return DataLoader(TensorDataset(samples), batch_size=batch_size)


class OfLists(Line):
    """For DataLoaders over a TensorDataset, whose batches are lists of one tensor."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Line.training_step(self, batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch[0].mean())

    test_step = validation_step


class Diary(Callback):
    """What happened, in short."""

    def __init__(self) -> None:
        self.events: List[str] = []

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = float((batch[0] if isinstance(batch, list) else batch)[0, 0])
        self.events.append(f"{number:g}")

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        self.events.append("v")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.events.append("|")

    @property
    def text(self) -> str:
        return " ".join(self.events)


class Notes(Logger):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.rows: List[Tuple[int, Dict[str, float]]] = []
        self.statuses: List[str] = []

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        self.rows.append((step, dict(metrics)))

    def finalize(self, status: str) -> None:
        self.statuses.append(status)

    def values(self, name: str) -> List[Tuple[int, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]


def fitted(
    task: Optional[TaskModule] = None, train: Any = None, validation: Any = None, **arguments: Any
) -> Tuple[str, Trainer]:
    diary = Diary()
    arguments.setdefault("max_epochs", 1)
    arguments.setdefault("num_sanity_val_steps", 0)
    arguments["callbacks"] = [diary, *arguments.get("callbacks", [])]
    trainer = quiet_trainer(**arguments)
    trainer.fit(task or Line(), batches(3) if train is None else train, validation)
    return diary.text, trainer


# ---------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("count", "accumulate", "epochs", "steps"),
    [(3, 1, 2, 6), (5, 2, 2, 6), (4, 2, 3, 6), (2, 5, 2, 2), (1, 1, 1, 1), (7, 3, 1, 3)],
)
def test_steps_are_windows_and_windows_end_with_the_epoch(
    mode: str, count: int, accumulate: int, epochs: int, steps: int
) -> None:
    _, trainer = fitted(
        train=batches(count), mode=mode, max_epochs=epochs, accumulate_grad_batches=accumulate
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

        quiet_trainer(callbacks=Looks(), **arguments).fit(Line(), train)
        return seen

    assert total(batches(5), max_epochs=3, accumulate_grad_batches=2) == [9]
    assert total(batches(5), max_epochs=3, max_steps=4) == [4]
    assert total(batches(5), max_steps=4) == [4]
    assert total(OfUnknownLength(batches(5)), max_epochs=1) == [None]
    assert total(OfUnknownLength(batches(5)), max_epochs=1, max_steps=2) == [2]
    # A limit on what has no length is the most there can be.
    (most,) = total(OfUnknownLength(batches(5)), max_epochs=2, limit_train_batches=2)
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
    diary, _ = fitted(mode=mode, max_epochs=5, validation=batches(1), callbacks=[Stops(hook, at)])
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
        task = Line()
        if first_fit:  # two of three batches of a window, then stop: no step was made
            fitted(
                task, mode=mode, accumulate_grad_batches=3,
                callbacks=[Stops("on_train_batch_end", 1)],
            )  # fmt: skip
        fitted(task, batches(3, start=5), mode=mode, accumulate_grad_batches=3)
        return task

    assert_same_weights(after(first_fit=True), after(first_fit=False))


def test_gradients_from_before_fit_do_not_leak_into_it(mode: str) -> None:
    def after(own_backward: bool) -> TaskModule:
        task = Line()
        if own_backward:
            task(flow.ones(4, 2)).sum().backward()
        fitted(task, mode=mode)
        return task

    assert_same_weights(after(own_backward=True), after(own_backward=False))


# ---------------------------------------------------------------------- train and eval mode


def test_modules_that_a_user_put_in_eval_stay_there_after_validation(mode: str) -> None:
    class Frozen(Line):
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
        task, sized(2, 2), batches(1), mode=mode, max_epochs=2, val_check_interval=1,
        callbacks=[Looks()],
    )  # fmt: skip
    assert seen == [(True, False, True)] * 4
    assert task.norm.num_batches_tracked.item() == 0
    assert task.norm.running_mean.numpy().tolist() == [0.0, 0.0]


def test_evaluation_leaves_train_and_eval_modes_as_they_were(mode: str) -> None:
    task = Line()
    task.layer.eval()
    quiet_trainer(mode=mode).validate(task, batches(1))
    assert (task.training, task.layer.training) == (True, False)


def test_evaluation_computes_no_gradients(mode: str) -> None:
    task = Line()
    quiet_trainer(mode=mode).test(task, batches(2))
    assert all(parameter.grad is None for parameter in task.parameters())
    assert all(parameter.requires_grad for parameter in task.parameters())


# ---------------------------------------------------------------------- unknown lengths


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (flow.ones(2) * float(index) for index in range(5))


@pytest.mark.parametrize("accumulate", [1, 2, 5, 9])
def test_an_iterable_dataset_trains_every_batch(mode: str, accumulate: int) -> None:
    class Batched(Line):
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
    train = OfUnknownLength(batches(1), batches(3), batches(2))
    diary, trainer = fitted(
        train=train, mode=mode, max_epochs=3, validation=batches(1), accumulate_grad_batches=2
    )
    assert diary == "0 v | 0 1 2 v | 0 1 v |"
    assert trainer.global_step == 1 + 2 + 1
    assert train.begun == 3


def test_a_generator_lasts_for_one_epoch(mode: str) -> None:
    assert fitted(train=(batch for batch in batches(3)), mode=mode)[0] == "0 1 2 |"


def test_evaluation_over_a_generator(mode: str) -> None:
    task = Line()
    results = quiet_trainer(mode=mode).validate(task, (batch for batch in batches(3)))
    assert results == [{"seen": 1.0}]


# ---------------------------------------------------------------------- epoch means


def test_an_epoch_s_mean_is_weighted_by_batch_size(mode: str) -> None:
    # 4 samples of 1, 4 of 2, 1 of 3; the mean over samples is 15/9, over batches 2.
    results = quiet_trainer(mode=mode).validate(Line(), sized(4, 4, 1))
    assert results[0]["seen"] == pytest.approx(15 / 9, abs=1e-6)


def test_batch_size_can_be_told(mode: str) -> None:
    class Tells(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", batch.mean(), batch_size=10)

    assert quiet_trainer(mode=mode).validate(Tells(), sized(4, 4, 1)) == [{"seen": 2.0}]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: (x, flow.zeros(x.shape[0])), id="pair"),
        pytest.param(lambda x: {"x": x, "flag": True}, id="dict"),
        pytest.param(lambda x: [{"inner": [x]}], id="nested"),
        pytest.param(lambda x: ("a name", x), id="string first"),
        pytest.param(lambda x: (["name"] * x.shape[0], x), id="list of strings first"),
        pytest.param(lambda x: ({}, x), id="empty dict first"),
        pytest.param(lambda x: (None, 3, x), id="none and number first"),
    ],
)
def test_the_batch_size_is_that_of_the_first_tensor_wherever_it_lies(
    wrap: Callable[[Any], Any],
) -> None:
    def first_tensor(batch: Any) -> Any:
        if isinstance(batch, flow.Tensor):
            return batch
        found = [
            first_tensor(value)
            for value in (batch.values() if isinstance(batch, dict) else batch)
            if isinstance(value, (flow.Tensor, dict, list, tuple))
        ]
        return next((each for each in found if each is not None), None)

    class Finds(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", first_tensor(batch).mean())

    results = quiet_trainer().validate(Finds(), [wrap(batch) for batch in sized(4, 4, 1)])
    assert results[0]["seen"] == pytest.approx(15 / 9, abs=1e-6)


def test_a_training_epoch_s_mean_has_the_smaller_last_batch_in_it(mode: str) -> None:
    class Logs(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", batch.mean(), on_step=False, on_epoch=True)
            return self.layer(batch).mean()

    notes = Notes()
    _, trainer = fitted(Logs(), sized(4, 4, 1), mode=mode, max_epochs=2, logger=notes)
    assert trainer.callback_metrics["seen"] == pytest.approx(15 / 9, abs=1e-6)
    assert [step for step, _ in notes.values("seen")] == [3, 6]
    assert [value for _, value in notes.values("seen")] == pytest.approx([15 / 9] * 2, abs=1e-6)


def test_each_epoch_s_mean_starts_anew(mode: str) -> None:
    means: List[float] = []

    class Looks(Callback):
        def on_validation_end(self, trainer: Any, task: Any) -> None:
            means.append(trainer.callback_metrics["seen"])

    data = OfUnknownLength(batches(2), batches(2, start=10))
    fitted(mode=mode, validation=data, max_epochs=2, callbacks=[Looks()])
    assert means == [0.5, 10.5]


def test_a_mean_over_many_batches_is_exact_enough(mode: str) -> None:
    data = [flow.ones(1, 2) * 0.1 for _ in range(90)]
    results = quiet_trainer(mode=mode).validate(Line(), data)
    assert results[0]["seen"] == pytest.approx(float(np.float32(0.1)), abs=1e-9)


# ---------------------------------------------------------------------- names of metrics


class LogsEverywhere(Line):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("t", batch.mean(), **self.options)
        return self.layer(batch).mean() * 0 + 5.0

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("v", batch.mean(), **self.options)


@pytest.mark.parametrize(
    ("options", "training", "validation"),
    [
        ({}, {"t": 2.0}, {"v": 4.0}),
        ({"on_step": True, "on_epoch": False}, {"t": 2.0}, {"v": 5.0}),
        ({"on_step": False, "on_epoch": True}, {"t": 1.0}, {"v": 4.0}),
        (
            {"on_step": True, "on_epoch": True},
            {"t": 1.0, "t_step": 2.0, "t_epoch": 1.0},
            {"v": 4.0, "v_step": 5.0, "v_epoch": 4.0},
        ),
        ({"logger": False}, {"t": 2.0}, {"v": 4.0}),
        ({"on_epoch": True}, {"t": 1.0, "t_step": 2.0, "t_epoch": 1.0}, {"v": 4.0}),
    ],
)
def test_names_and_values_in_callback_metrics(
    mode: str, options: Dict[str, Any], training: Dict[str, float], validation: Dict[str, float]
) -> None:
    _, trainer = fitted(
        LogsEverywhere(**options), batches(3), batches(3, start=3), mode=mode, log_every_n_steps=1
    )
    assert trainer.callback_metrics == {"loss": 5.0, **training, **validation}


def test_loggers_are_sent_steps_every_n_steps_and_means_at_the_end(mode: str) -> None:
    notes = Notes()
    fitted(
        LogsEverywhere(on_step=True, on_epoch=True), batches(4), batches(2, start=4), mode=mode,
        log_every_n_steps=2, logger=notes,
    )  # fmt: skip
    assert notes.values("t_step") == [(2, 1.0), (4, 3.0)]
    assert notes.values("t_epoch") == [(4, 1.5)]
    assert notes.values("v_epoch") == [(4, 4.5)]
    assert notes.values("t") == notes.values("v") == []
    assert notes.statuses == ["success"]


def test_logger_false_keeps_a_metric_from_the_loggers_only(mode: str) -> None:
    notes = Notes()
    _, trainer = fitted(
        LogsEverywhere(logger=False), batches(2), batches(1), mode=mode,
        log_every_n_steps=1, logger=notes,
    )  # fmt: skip
    assert {name for _, row in notes.rows for name in row} == {"loss"}
    assert {"t", "v"} <= set(trainer.callback_metrics)


def test_prog_bar_metrics(mode: str) -> None:
    _, trainer = fitted(
        LogsEverywhere(prog_bar=True, on_epoch=True), batches(3), mode=mode, log_every_n_steps=1
    )
    assert trainer.progress_bar_metrics == {"loss": 5.0, "t_step": 2.0, "t_epoch": 1.0}


def test_log_dict_logs_each_entry(mode: str) -> None:
    class Logs(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"a": batch.mean(), "b": batch.mean() * 2}, batch_size=1)

    assert quiet_trainer(mode=mode).validate(Logs(), batches(3)) == [{"a": 1.0, "b": 2.0}]


def test_what_a_step_logs_can_be_read_at_the_end_of_its_batch(mode: str) -> None:
    seen: List[Tuple[float, float]] = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append((metrics["t"], metrics["loss"]))

    fitted(LogsEverywhere(), batches(3), mode=mode, callbacks=[Reads()])
    assert seen == [(0.0, 5.0), (1.0, 5.0), (2.0, 5.0)]


def test_reading_metrics_in_between_takes_nothing_from_the_loggers(mode: str) -> None:
    class Reads(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            assert trainer.callback_metrics is not None

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert trainer.callback_metrics is not None

    def rows(callbacks: List[Callback]) -> List[Tuple[int, Dict[str, float]]]:
        notes = Notes()
        fitted(
            LogsEverywhere(on_epoch=True), batches(5), mode=mode, log_every_n_steps=2,
            logger=notes, callbacks=callbacks, accumulate_grad_batches=2,
        )  # fmt: skip
        return notes.rows

    assert rows([Reads()]) == rows([])


def test_a_training_mean_is_known_when_the_epoch_ends(mode: str) -> None:
    seen: List[float] = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            seen.append(trainer.callback_metrics["t_epoch"])

    data = OfUnknownLength(batches(3), batches(3, start=10))
    fitted(LogsEverywhere(on_epoch=True), data, mode=mode, max_epochs=2, callbacks=[Reads()])
    # Of the epoch that ends, as in Lightning: it is what a checkpoint monitors.
    assert seen == [1.0, 11.0]


# ---------------------------------------------------------------------- metrics from hooks


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
    ],
)
def test_a_metric_logged_in_a_hook_reaches_loggers_and_callbacks(mode: str, hook: str) -> None:
    def log(self: Any, *_: Any) -> None:
        self.log("metric", 7.0)

    notes = Notes()
    _, trainer = fitted(
        type("Logs", (Line,), {hook: log})(), batches(2), batches(2), mode=mode,
        log_every_n_steps=1, logger=notes,
    )  # fmt: skip
    assert trainer.callback_metrics["metric"] == 7.0
    assert {value for _, value in notes.values("metric")} == {7.0}


def test_the_end_of_an_epoch_logs_one_value_for_the_epoch(mode: str) -> None:
    class Logs(Line):
        def on_train_epoch_end(self) -> None:
            self.log("epoch", float(self.current_epoch))

        def on_validation_epoch_end(self) -> None:
            self.log("validations", float(self.current_epoch))

    notes = Notes()
    fitted(Logs(), batches(2), batches(2), mode=mode, max_epochs=2, logger=notes)
    assert notes.values("epoch") == [(2, 0.0), (4, 1.0)]
    assert notes.values("validations") == [(2, 0.0), (4, 1.0)]


# ---------------------------------------------------------------------- several dataloaders


def test_each_of_several_loaders_has_its_own_mean(mode: str) -> None:
    trainer = quiet_trainer(mode=mode)
    loaders = [loader_of(1.0, 2.0, 6.0, batch_size=2), loader_of(10.0)]
    results = trainer.validate(OfLists(), loaders)
    assert results == [{"seen/dataloader_idx_0": 3.0}, {"seen/dataloader_idx_1": 10.0}]
    assert trainer.callback_metrics == {"seen/dataloader_idx_0": 3.0, "seen/dataloader_idx_1": 10.0}


def test_a_list_of_one_loader_is_one_loader(mode: str) -> None:
    assert quiet_trainer(mode=mode).validate(OfLists(), [loader_of(3.0)]) == [{"seen": 3.0}]


def test_the_step_is_told_which_loader(mode: str) -> None:
    class Tells(OfLists):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.log("which", batch[0].mean() * 0 + dataloader_idx)

    results = quiet_trainer(mode=mode).validate(Tells(), [loader_of(1.0), loader_of(1.0)])
    assert results == [{"which/dataloader_idx_0": 0.0}, {"which/dataloader_idx_1": 1.0}]


def test_a_metric_of_the_whole_validation_has_no_suffix(mode: str) -> None:
    class Logs(OfLists):
        def on_validation_epoch_end(self) -> None:
            self.log("whole", 4.0)

    results = quiet_trainer(mode=mode).validate(Logs(), [loader_of(1.0), loader_of(2.0)])
    assert results == [
        {"seen/dataloader_idx_0": 1.0, "whole": 4.0},
        {"seen/dataloader_idx_1": 2.0, "whole": 4.0},
    ]


def test_the_loader_s_suffix_comes_after_step_and_epoch() -> None:
    class Logs(OfLists):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", batch[0].mean(), on_step=True, on_epoch=True)

    results = quiet_trainer().validate(Logs(), [loader_of(1.0), loader_of(2.0)])
    assert results == [  # as Lightning names them
        {"seen_epoch/dataloader_idx_0": 1.0},
        {"seen_epoch/dataloader_idx_1": 2.0},
    ]


def test_several_loaders_during_fit(mode: str) -> None:
    _, trainer = fitted(
        OfLists(), loader_of(1.0, 2.0), [loader_of(1.0), loader_of(5.0, 7.0)], mode=mode
    )
    assert trainer.callback_metrics["seen/dataloader_idx_0"] == 1.0
    assert trainer.callback_metrics["seen/dataloader_idx_1"] == 6.0


# ---------------------------------------------------------------------- the other verbs


def test_test_and_validate_return_and_log_their_metrics(mode: str) -> None:
    for verb in ("test", "validate"):
        notes = Notes()
        trainer = quiet_trainer(mode=mode, logger=notes)
        assert getattr(trainer, verb)(Line(), batches(4)) == [{"seen": 1.5}]
        assert notes.rows == [(0, {"seen": 1.5})]
        assert trainer.callback_metrics == {"seen": 1.5}


def test_a_step_that_logs_nothing_gives_an_empty_dict(mode: str) -> None:
    class Silent(Line):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    assert quiet_trainer(mode=mode).test(Silent(), batches(2)) == [{}]


def test_the_task_s_own_loaders_are_used_where_none_is_given(mode: str) -> None:
    class Own(Line):
        def train_dataloader(self) -> Any:
            return batches(2)

        def val_dataloader(self) -> Any:
            return batches(2, start=1)

        def test_dataloader(self) -> Any:
            return batches(2, start=2)

        def predict_dataloader(self) -> Any:
            return batches(2, start=3)

    task, trainer = Own(), quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["seen"] == 1.5
    assert trainer.validate(task) == [{"seen": 1.5}]
    assert trainer.test(task) == [{"seen": 2.5}]
    assert len(trainer.predict(task)) == 2
    assert trainer.test(task, batches(1, start=9)) == [{"seen": 9.0}]


def test_predict_returns_the_outputs_in_order(mode: str) -> None:
    task = Line()  # sum of the inputs / 2
    outputs = quiet_trainer(mode=mode).predict(task, [*sized(2, 3), flow.zeros(1, 2)])
    assert [output.shape for output in outputs] == [(2, 1), (3, 1), (1, 1)]
    assert [output.numpy()[0, 0] for output in outputs] == [1.0, 2.0, 0.0]


def test_predictions_are_not_overwritten_by_later_batches(mode: str) -> None:
    outputs = quiet_trainer(mode=mode).predict(Line(), batches(20))
    assert [float(output) for output in outputs] == [float(index) for index in range(20)]


def test_predict_takes_the_inputs_out_of_a_pair(mode: str) -> None:
    (output,) = quiet_trainer(mode=mode).predict(Line(), [(flow.ones(1, 2), flow.zeros(1))])
    assert output.numpy().tolist() == [[1.0]]


def test_predict_over_several_loaders_returns_a_list_for_each(mode: str) -> None:
    loaders = [loader_of(1.0, 2.0), loader_of(7.0)]
    outputs = quiet_trainer(mode=mode).predict(OfLists(), loaders)
    assert [[float(output) for output in one] for one in outputs] == [[1.0, 2.0], [7.0]]


def test_predict_returns_whatever_the_step_returns(mode: str) -> None:
    class Returns(Line):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"doubled": batch * 2, "rest": [batch, None]}

    (output,) = quiet_trainer(mode=mode).predict(Returns(), batches(1, start=3))
    assert output["doubled"].numpy().tolist() == [[6.0, 6.0]]
    assert output["rest"][0].numpy().tolist() == [[3.0, 3.0]]
    assert output["rest"][1] is None


# ---------------------------------------------------------------------- one after the other


def test_a_second_fit_of_the_same_task_by_the_same_trainer_goes_on_from_the_weights(
    mode: str,
) -> None:
    twice, at_once = Line(), Line()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(twice, batches(3))
    trainer.fit(twice, batches(3))
    assert trainer.global_step == 3
    quiet_trainer(mode=mode, max_epochs=2).fit(at_once, batches(3))
    assert_same_weights(twice, at_once)  # SGD without momentum has no other state


def test_a_second_fit_in_the_other_mode(mode: str) -> None:
    other = "graph" if mode == "eager" else "eager"
    first, second = Line(), Line()
    quiet_trainer(mode=mode, max_epochs=1).fit(first, sized(2, 1))
    quiet_trainer(mode=other, max_epochs=1).fit(first, sized(2, 1))
    quiet_trainer(mode=mode, max_epochs=2).fit(second, sized(2, 1))
    assert_same_weights(first, second)


def test_one_trainer_fits_two_tasks(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    first, second = Line(), Line()
    trainer.fit(first, batches(3))
    trainer.fit(second, batches(3))
    assert_same_weights(first, second)
    assert trainer.task is second


def test_a_fit_after_one_that_failed(mode: str) -> None:
    class Fails(Line):
        fail = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.fail and batch_idx == 1:
                raise ValueError("mine")

    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=3)
    task, fresh = Fails(), Line()
    with pytest.raises(ValueError, match="mine"):
        trainer.fit(task, batches(3))
    task.fail = False
    trainer.fit(task, batches(3))
    quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=3).fit(fresh, batches(3))
    assert_same_weights(task, fresh)  # no step of the failed window, nothing left of it


def test_validation_after_fit_sees_the_trained_weights(mode: str) -> None:
    class Weight(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("out", self.layer(batch).mean())

    task = Weight()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, batches(3))
    expected = float(task(flow.ones(1, 2)))
    assert expected != 1.0
    (result,) = trainer.validate(task, [flow.ones(1, 2)])
    assert result["out"] == pytest.approx(expected, abs=1e-6)


def test_validation_in_the_middle_of_training_sees_the_weights_of_that_moment(mode: str) -> None:
    class Weight(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("bias", self.layer.bias.sum() + 0)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

    notes = Notes()
    fitted(Weight(), batches(3), batches(1), mode=mode, val_check_interval=1, logger=notes)
    # d loss / d bias = 1, rate 0.1
    biases = [round(value, 5) for _, value in notes.values("bias")]
    assert biases == [-0.1, -0.2, -0.3]


# ---------------------------------------------------------------------- what is left behind


def live_graphs() -> int:
    gc.collect()
    return sum(isinstance(each, nn.Graph) for each in gc.get_objects())


def test_the_trainer_lets_its_graphs_go() -> None:
    trainer = quiet_trainer(mode="graph", max_epochs=1)
    task = Line()
    for _ in range(3):
        trainer.fit(task, sized(2, 1), sized(2, 1))
        trainer.validate(task, sized(2))
        trainer.predict(task, sized(2))
        assert live_graphs() == 0


def test_the_trainer_lets_its_graphs_go_after_an_error() -> None:
    class Fails(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Fails(), batches(1))
    assert live_graphs() == 0


def test_a_task_can_be_collected_after_its_trainer(mode: str) -> None:
    task = Line()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, batches(2), batches(1))
    reference = weakref.ref(task)
    del task, trainer
    gc.collect()
    assert reference() is None


def test_data_is_not_held_after_the_run(mode: str) -> None:
    class Data:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches(2))

        def __len__(self) -> int:
            return 2

    data = Data()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(Line(), data)
    reference = weakref.ref(data)
    del data
    gc.collect()
    assert reference() is None
