"""What is logged: means over an epoch, the names of metrics, and when they are reported."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from fits import OfLists, fitted, loader_of
from helpers import (
    Notes,
    OfUnknownLength,
    SquaredLine,
    numbered_batches,
    quiet_trainer,
    sized,
)

from ofengine import Callback, ConfigurationError

# ---------------------------------------------------------------------- epoch means


def test_an_epoch_s_mean_is_weighted_by_batch_size(mode: str) -> None:
    # 4 samples of 1, 4 of 2, 1 of 3; the mean over samples is 15/9, over batches 2.
    results = quiet_trainer(mode=mode).validate(SquaredLine(), sized(4, 4, 1))
    assert results[0]["seen"] == pytest.approx(15 / 9, abs=1e-6)


def test_batch_size_can_be_told(mode: str) -> None:
    class Tells(SquaredLine):
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

    class Finds(SquaredLine):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", first_tensor(batch).mean())

    results = quiet_trainer().validate(Finds(), [wrap(batch) for batch in sized(4, 4, 1)])
    assert results[0]["seen"] == pytest.approx(15 / 9, abs=1e-6)


def test_a_training_epoch_s_mean_has_the_smaller_last_batch_in_it(mode: str) -> None:
    class Logs(SquaredLine):
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

    data = OfUnknownLength(numbered_batches(2), numbered_batches(2, start=10))
    fitted(mode=mode, validation=data, max_epochs=2, callbacks=[Looks()])
    assert means == [0.5, 10.5]


def test_a_mean_over_many_batches_is_exact_enough(mode: str) -> None:
    data = [flow.ones(1, 2) * 0.1 for _ in range(90)]
    results = quiet_trainer(mode=mode).validate(SquaredLine(), data)
    assert results[0]["seen"] == pytest.approx(float(np.float32(0.1)), abs=1e-9)


# ---------------------------------------------------------------------- names of metrics


class LogsEverywhere(SquaredLine):
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
        LogsEverywhere(**options),
        numbered_batches(3),
        numbered_batches(3, start=3),
        mode=mode,
        log_every_n_steps=1,
    )
    assert trainer.callback_metrics == {"loss": 5.0, **training, **validation}


def test_loggers_are_sent_steps_every_n_steps_and_means_at_the_end(mode: str) -> None:
    notes = Notes()
    fitted(
        LogsEverywhere(on_step=True, on_epoch=True),
        numbered_batches(4), numbered_batches(2, start=4), mode=mode,
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
        LogsEverywhere(logger=False), numbered_batches(2), numbered_batches(1), mode=mode,
        log_every_n_steps=1, logger=notes,
    )  # fmt: skip
    assert {name for _, _, row in notes.rows for name in row} == {"loss"}
    assert {"t", "v"} <= set(trainer.callback_metrics)


def test_prog_bar_metrics(mode: str) -> None:
    _, trainer = fitted(
        LogsEverywhere(prog_bar=True, on_epoch=True),
        numbered_batches(3),
        mode=mode,
        log_every_n_steps=1,
    )
    assert trainer.progress_bar_metrics == {"loss": 5.0, "t_step": 2.0, "t_epoch": 1.0}


def test_log_dict_logs_each_entry(mode: str) -> None:
    class Logs(SquaredLine):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"a": batch.mean(), "b": batch.mean() * 2}, batch_size=1)

    assert quiet_trainer(mode=mode).validate(Logs(), numbered_batches(3)) == [{"a": 1.0, "b": 2.0}]


def test_what_a_step_logs_can_be_read_at_the_end_of_its_batch(mode: str) -> None:
    seen: List[Tuple[float, float]] = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append((metrics["t"], metrics["loss"]))

    fitted(LogsEverywhere(), numbered_batches(3), mode=mode, callbacks=[Reads()])
    assert seen == [(0.0, 5.0), (1.0, 5.0), (2.0, 5.0)]


def test_reading_metrics_in_between_takes_nothing_from_the_loggers(mode: str) -> None:
    class Reads(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            assert trainer.callback_metrics is not None

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert trainer.callback_metrics is not None

    def rows(callbacks: List[Callback]) -> List[Tuple[int, int, Dict[str, float]]]:
        notes = Notes()
        fitted(
            LogsEverywhere(on_epoch=True), numbered_batches(5), mode=mode, log_every_n_steps=2,
            logger=notes, callbacks=callbacks, accumulate_grad_batches=2,
        )  # fmt: skip
        return notes.rows

    assert rows([Reads()]) == rows([])


def test_a_training_mean_is_known_when_the_epoch_ends(mode: str) -> None:
    seen: List[float] = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            seen.append(trainer.callback_metrics["t_epoch"])

    data = OfUnknownLength(numbered_batches(3), numbered_batches(3, start=10))
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
        type("Logs", (SquaredLine,), {hook: log})(),
        numbered_batches(2), numbered_batches(2), mode=mode,
        log_every_n_steps=1, logger=notes,
    )  # fmt: skip
    assert trainer.callback_metrics["metric"] == 7.0
    assert {value for _, value in notes.values("metric")} == {7.0}


def test_the_end_of_an_epoch_logs_one_value_for_the_epoch(mode: str) -> None:
    class Logs(SquaredLine):
        def on_train_epoch_end(self) -> None:
            self.log("trainings", float(self.current_epoch))

        def on_validation_epoch_end(self) -> None:
            self.log("validations", float(self.current_epoch))

    notes = Notes()
    fitted(Logs(), numbered_batches(2), numbered_batches(2), mode=mode, max_epochs=2, logger=notes)
    assert notes.values("trainings") == [(2, 0.0), (4, 1.0)]
    assert notes.values("validations") == [(2, 0.0), (4, 1.0)]


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_names_that_every_logger_has_are_refused(mode: str, name: str) -> None:
    class Logs(SquaredLine):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log(name, 1.0)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ConfigurationError, match=f"every logger has the number of .*{name}"):
        fitted(Logs(), numbered_batches(2), mode=mode)


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
