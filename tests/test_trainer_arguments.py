"""Every argument of Trainer does what its name means in Lightning, or is refused by its name."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import oneflow as flow
import pytest
from helpers import OfUnknownLength, quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, ConfigurationError, TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from ofengine.loggers import CSVLogger, Logger


class Line(TaskModule):
    """A weight for each of two inputs; the loss is the mean output, so its gradient is known."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.rate = rate
        with flow.no_grad():
            self.layer.weight.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean())

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.rate)


def batches(count: int, start: int = 0) -> List[Any]:
    """Batches whose every number is the batch's index."""
    return [flow.ones(1, 2) * (start + index) for index in range(count)]


class Diary(Callback):
    """What happened, in short: ``3`` for training batch 3, ``v0`` for validation batch 0."""

    def __init__(self) -> None:
        self.events: List[str] = []

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.events.append("|")

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.events.append(f"{float(batch[0, 0]):g}")

    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        self.events.append(f"v{float(batch[0, 0]):g}")

    def on_test_batch_end(self, *arguments: Any) -> None:
        self.events.append("test")

    def on_predict_batch_end(self, *arguments: Any) -> None:
        self.events.append("predict")

    def on_sanity_check_end(self, trainer: Any, task: Any) -> None:
        self.events.append("sane")

    @property
    def text(self) -> str:
        return " ".join(self.events)


def fitted(
    train: Any = None, validation: Any = None, task: Optional[TaskModule] = None, **arguments: Any
) -> Tuple[str, Trainer]:
    """The diary of one fit, and its trainer."""
    diary = Diary()
    arguments.setdefault("max_epochs", 1)
    arguments.setdefault("num_sanity_val_steps", 0)
    arguments["callbacks"] = [diary, *arguments.get("callbacks", [])]
    trainer = quiet_trainer(**arguments)
    trainer.fit(task or Line(), batches(5) if train is None else train, validation)
    return diary.text, trainer


# ---------------------------------------------------------------------- how long


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, "0 1 | 0 1 | 0 1 |"),
        ({"max_epochs": 0}, ""),
        ({"max_epochs": None, "max_steps": 3}, "0 1 | 0 |"),
        ({"max_epochs": -1, "max_steps": 3}, "0 1 | 0 |"),
        ({"max_epochs": 1, "max_steps": 9}, "0 1 |"),
        ({"max_epochs": 9, "max_steps": 1}, "0 |"),
        ({"max_epochs": 9, "max_steps": 2}, "0 1 |"),
        ({"max_epochs": 9, "max_steps": 0}, ""),
        ({"max_epochs": 2, "max_steps": -1}, "0 1 | 0 1 |"),
    ],
)
def test_max_epochs_and_max_steps_whichever_comes_first(
    mode: str, arguments: Dict[str, Any], expected: str
) -> None:
    diary, trainer = fitted(batches(2), mode=mode, **arguments)
    assert diary == expected
    assert trainer.global_step == len(expected.replace("|", "").split())
    assert trainer.current_epoch == expected.count("|")


def test_max_steps_counts_optimizer_steps_not_batches(mode: str) -> None:
    diary, trainer = fitted(mode=mode, max_steps=2, accumulate_grad_batches=2, max_epochs=9)
    assert diary == "0 1 2 3 |"
    assert trainer.global_step == 2


def test_max_steps_in_the_middle_of_an_epoch_does_not_validate(mode: str) -> None:
    assert fitted(None, batches(1), mode=mode, max_steps=3)[0] == "0 1 2 |"


def test_max_steps_at_the_end_of_an_epoch_validates(mode: str) -> None:
    assert fitted(None, batches(1), mode=mode, max_steps=5)[0] == "0 1 2 3 4 v0 |"


def test_neither_epochs_nor_steps_nor_time_means_1000_epochs() -> None:
    assert quiet_trainer().max_epochs == 1000


@pytest.mark.parametrize("limit", [{"max_steps": 5}, {"max_time": "00:00:00:05"}])
def test_steps_or_time_alone_lift_the_limit_on_epochs(limit: Dict[str, Any]) -> None:
    assert quiet_trainer(**limit).max_epochs == -1


@pytest.mark.parametrize("none", ["00:00:00:00", timedelta(0), {"seconds": 0}])
def test_no_time_at_all_stops_after_the_first_step(
    mode: str, none: Union[str, timedelta, Dict[str, int]]
) -> None:
    assert fitted(mode=mode, max_time=none)[0] == "0 |"


def test_time_runs_out_at_an_optimizer_step_not_inside_a_window(mode: str) -> None:
    assert fitted(mode=mode, max_time="00:00:00:00", accumulate_grad_batches=3)[0] == "0 1 2 |"


@pytest.mark.parametrize(
    ("max_time", "seconds_a_step", "steps"),
    [
        ("00:00:00:03", 1, 3),
        ("00:00:02:00", 60, 2),
        ("00:03:00:00", 3600, 3),
        ("02:00:00:00", 86400, 2),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 4, 1),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 3, 2),
        (timedelta(seconds=2.5), 1, 3),
        (timedelta(days=1), 43200, 2),
        ({"hours": 1, "minutes": 30}, 1800, 3),
        ({"weeks": 1}, 3 * 86400, 3),
    ],
)
def test_max_time_in_all_its_forms(
    monkeypatch: pytest.MonkeyPatch, max_time: Any, seconds_a_step: float, steps: int
) -> None:
    now = [1000.0]

    class TakesTime(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += seconds_a_step

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    _, trainer = fitted(batches(2), max_epochs=-1, max_time=max_time, callbacks=[TakesTime()])
    assert trainer.global_step == steps


def test_time_to_spare_changes_nothing(mode: str) -> None:
    assert fitted(batches(2), mode=mode, max_epochs=2, max_time="01:00:00:00")[0] == "0 1 | 0 1 |"


# ---------------------------------------------------------------------- how many batches

SHARES = [
    (None, 7),
    (1.0, 7),
    (1, 1),
    (3, 3),
    (100, 7),
    (0.5, 3),
    (0.2, 1),
    (0.99, 6),
]


@pytest.mark.parametrize(("limit", "count"), SHARES)
def test_limit_train_batches(limit: Union[int, float, None], count: int) -> None:
    diary, trainer = fitted(batches(7), max_epochs=2, limit_train_batches=limit)
    epoch = " ".join(map(str, range(count))) + " |"
    assert diary == f"{epoch} {epoch}"
    assert trainer.num_training_batches == count


@pytest.mark.parametrize(("limit", "count"), [*SHARES, (0, 0), (0.0, 0)])
def test_limit_val_batches(limit: Union[int, float, None], count: int) -> None:
    diary, _ = fitted(batches(1), batches(7), limit_val_batches=limit)
    assert diary.split() == ["0", *(f"v{index}" for index in range(count)), "|"]


@pytest.mark.parametrize(("limit", "count"), SHARES)
@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
def test_limits_of_the_other_verbs(verb: str, limit: Union[int, float, None], count: int) -> None:
    diary = Diary()
    argument = {"test": "limit_test_batches", "predict": "limit_predict_batches"}
    arguments = {argument.get(verb, "limit_val_batches"): limit}
    getattr(quiet_trainer(callbacks=diary, **arguments), verb)(Line(), batches(7))
    assert len(diary.events) == count


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_limit_train_batches_of_0_trains_nothing(mode: str, nothing: Union[int, float]) -> None:
    diary, trainer = fitted(mode=mode, max_epochs=3, limit_train_batches=nothing)
    assert diary.replace("|", "").strip() == ""
    assert trainer.global_step == 0


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_limit_of_0_evaluates_nothing_and_does_not_speak_of_missing_data(verb: str) -> None:
    trainer = quiet_trainer(limit_val_batches=0, limit_test_batches=0, limit_predict_batches=0)
    assert getattr(trainer, verb)(Line(), batches(2)) in ([], [{}])


def test_a_limit_works_where_the_length_is_not_known(mode: str) -> None:
    train = OfUnknownLength(batches(5))
    diary, _ = fitted(
        train, OfUnknownLength(batches(5)), mode=mode, max_epochs=2,
        limit_train_batches=2, limit_val_batches=1,
    )  # fmt: skip
    assert diary == "0 1 v0 | 0 1 v0 |"


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("interval", "count", "expected"),
    [
        (None, 3, "0 1 2 v0 |"),
        (1.0, 3, "0 1 2 v0 |"),
        (1, 3, "0 v0 1 v0 2 v0 |"),
        (2, 5, "0 1 v0 2 3 v0 4 |"),
        (5, 5, "0 1 2 3 4 v0 |"),
        (0.5, 4, "0 1 v0 2 3 v0 |"),
        (0.5, 5, "0 1 v0 2 3 v0 4 |"),
        (0.25, 4, "0 v0 1 v0 2 v0 3 v0 |"),
        (0.99, 4, "0 1 2 v0 3 |"),
    ],
)
def test_val_check_interval_in_batches_or_as_a_share(
    interval: Union[int, float, None], count: int, expected: str
) -> None:
    assert fitted(batches(count), batches(1), val_check_interval=interval)[0] == expected
    limited, _ = fitted(
        batches(9), batches(1), val_check_interval=interval, limit_train_batches=count
    )
    assert limited == expected  # a share is one of the limited epoch


@pytest.mark.parametrize(
    ("interval", "expected"), [(None, "0 1 2 v0 |"), (1.0, "0 1 2 v0 |"), (2, "0 1 v0 2 |")]
)
def test_val_check_interval_where_the_length_is_not_known(
    mode: str, interval: Union[int, float, None], expected: str
) -> None:
    for accumulate in (1, 2):
        train = OfUnknownLength(batches(3))
        diary, _ = fitted(
            train, batches(1), mode=mode,
            val_check_interval=interval, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        assert diary == expected


def test_check_val_every_n_epoch() -> None:
    diary, _ = fitted(batches(1), batches(1), max_epochs=5, check_val_every_n_epoch=2)
    assert diary == "0 | 0 v0 | 0 | 0 v0 | 0 |"


def test_val_check_interval_and_check_val_every_n_epoch_together() -> None:
    diary, _ = fitted(
        batches(2), batches(1), max_epochs=2, check_val_every_n_epoch=2, val_check_interval=1
    )
    assert diary == "0 1 | 0 v0 1 v0 |"


@pytest.mark.parametrize(
    ("steps", "limit", "tried"),
    [(0, None, 0), (1, None, 1), (9, None, 3), (-1, None, 3), (2, 1, 1)],
)
def test_num_sanity_val_steps(steps: int, limit: Optional[int], tried: int) -> None:
    diary, _ = fitted(batches(1), batches(3), num_sanity_val_steps=steps, limit_val_batches=limit)
    before = diary.split("0", 1)[0] if not tried else diary[: diary.index("sane")]
    assert before.split() == [f"v{index}" for index in range(tried)]
    assert ("sane" in diary) == bool(tried)


def test_the_sanity_check_tries_two_batches_unless_told_otherwise() -> None:
    diary = Diary()
    quiet_trainer(max_epochs=1, callbacks=diary).fit(Line(), batches(1), batches(3))
    assert diary.text == "v0 v1 sane 0 v0 v1 v2 |"


def test_the_sanity_check_tries_that_many_batches_of_each_loader() -> None:
    loaders = [DataLoader(TensorDataset(flow.ones(4, 1, 2) * n)) for n in (10, 20)]

    class OfLists(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Seen(Callback):
        def __init__(self) -> None:
            self.seen: List[Tuple[int, int]] = []

        def on_validation_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            if trainer.sanity_checking:
                self.seen.append((loader, batch_idx))

    seen = Seen()
    trainer = quiet_trainer(max_epochs=1, callbacks=seen, num_sanity_val_steps=2)
    trainer.fit(OfLists(), batches(1), loaders)
    assert seen.seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_sanity_check_leaves_nothing_in_callback_metrics() -> None:
    at_start: List[Dict[str, float]] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            at_start.append(trainer.callback_metrics)

    fitted(batches(1), batches(2), num_sanity_val_steps=2, callbacks=[Looks()])
    assert at_start == [{}]


# ---------------------------------------------------------------------- trying things out


@pytest.mark.parametrize(("run", "count"), [(True, 1), (1, 1), (3, 3), (99, 5)])
def test_fast_dev_run_runs_so_many_batches_of_each_stage_once(
    mode: str, run: Union[bool, int], count: int
) -> None:
    diary = Diary()
    trainer = quiet_trainer(
        mode=mode, fast_dev_run=run, max_epochs=7, val_check_interval=1, callbacks=diary,
        limit_val_batches=0, num_sanity_val_steps=2, check_val_every_n_epoch=2,
    )  # fmt: skip
    trainer.fit(Line(), batches(5), batches(5))
    numbers = range(count)
    assert diary.text == " ".join([*map(str, numbers), *(f"v{n}" for n in numbers), "|"])
    trainer.test(Line(), batches(5))
    assert diary.events.count("test") == count
    assert len(trainer.predict(Line(), batches(5))) == count


@pytest.mark.parametrize("logger", [True, [CSVLogger]])
def test_fast_dev_run_logs_and_saves_nothing(tmp_path: Path, logger: Any) -> None:
    if logger is not True:
        logger = [CSVLogger(str(tmp_path))]
    trainer = Trainer(
        device="cpu", fast_dev_run=True, logger=logger, callbacks=[ModelCheckpoint()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Line(), batches(2))
    assert trainer.loggers == []
    assert not [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [False, 0])
def test_fast_dev_run_of_nothing_is_off(off: Union[bool, int]) -> None:
    assert fitted(batches(2), fast_dev_run=off, max_epochs=2)[0] == "0 1 | 0 1 |"


@pytest.mark.parametrize(("overfit", "count"), [(2, 2), (1, 1), (0.4, 2), (1.0, 5), (99, 5)])
def test_overfit_batches_sees_the_same_few_batches_in_every_epoch(
    mode: str, overfit: Union[int, float], count: int
) -> None:
    class OfLists(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean()

    seen: List[List[float]] = []

    class Sees(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            seen.append([])

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen[-1].append(float(batch[0][0, 0]))

    numbers = flow.arange(5).reshape(5, 1).float() * flow.ones(1, 2)
    loader = DataLoader(TensorDataset(numbers), shuffle=True)
    trainer = quiet_trainer(
        mode=mode, max_epochs=3, overfit_batches=overfit, callbacks=Sees(), seed=1
    )
    trainer.fit(OfLists(), loader)
    assert [len(epoch) for epoch in seen] == [count] * 3
    assert seen[0] == seen[1] == seen[2]


def test_overfit_batches_limits_validation_too() -> None:
    diary, _ = fitted(batches(5), batches(5), overfit_batches=2)
    assert diary == "0 1 v0 v1 |"


def test_overfit_batches_of_0_is_off() -> None:
    assert fitted(batches(3), overfit_batches=0)[0] == "0 1 2 |"


# ---------------------------------------------------------------------- logging


class Notes(Logger):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.rows: List[Tuple[int, int, Dict[str, float]]] = []

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        self.rows.append((step, epoch, dict(metrics)))


class LogsItsBatch(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("number", batch.mean())
        return self.layer(batch).mean() * 0 + batch.mean() * 10


def rows_of(notes: Notes, name: str) -> List[Tuple[int, int, float]]:
    return [(step, epoch, row[name]) for step, epoch, row in notes.rows if name in row]


def test_log_every_n_steps_logs_the_values_of_just_those_steps(mode: str) -> None:
    notes = Notes()
    fitted(
        batches(4), task=LogsItsBatch(), mode=mode, max_epochs=2, log_every_n_steps=3, logger=notes
    )
    assert rows_of(notes, "number") == [(3, 0, 2.0), (6, 1, 1.0)]
    assert rows_of(notes, "loss") == [(3, 0, 20.0), (6, 1, 10.0)]


def test_log_every_n_steps_counts_optimizer_steps(mode: str) -> None:
    notes = Notes()
    fitted(
        batches(5), task=LogsItsBatch(), mode=mode, log_every_n_steps=1, logger=notes,
        accumulate_grad_batches=2,
    )  # fmt: skip
    assert rows_of(notes, "number") == [(1, 0, 1.0), (2, 0, 3.0), (3, 0, 4.0)]


def test_metrics_are_logged_every_50_steps_unless_told_otherwise() -> None:
    notes = Notes()
    fitted(batches(30), task=LogsItsBatch(), max_epochs=4, logger=notes)
    assert rows_of(notes, "number") == [(50, 1, 19.0), (100, 3, 9.0)]


def test_all_loggers_are_sent_everything() -> None:
    first, second = Notes(), Notes()
    fitted(batches(2), task=LogsItsBatch(), log_every_n_steps=1, logger=[first, second])
    assert first.rows == second.rows
    assert len(first.rows) == 2


@pytest.mark.parametrize("wrap", [list, tuple])
def test_loggers_in_any_sequence(wrap: Any) -> None:
    notes = Notes()
    trainer = quiet_trainer(logger=wrap([notes]))
    assert trainer.loggers == [notes]
    assert trainer.logger is notes


def test_logger_false_is_none_and_true_is_the_csv_logger(tmp_path: Path) -> None:
    assert quiet_trainer(logger=False).loggers == []
    assert quiet_trainer(logger=False).logger is None
    (logger,) = quiet_trainer(logger=True, default_root_dir=tmp_path).loggers
    assert isinstance(logger, CSVLogger)


def test_the_folder_for_files_is_the_current_one_unless_told_otherwise(tmp_path: Path) -> None:
    assert quiet_trainer().default_root_dir == str(Path.cwd())
    assert quiet_trainer(default_root_dir=tmp_path).default_root_dir == str(tmp_path)
    assert quiet_trainer(default_root_dir=str(tmp_path)).default_root_dir == str(tmp_path)


# ---------------------------------------------------------------------- the update


def weight_after(numbers: Sequence[Tuple[float, float]], **arguments: Any) -> List[float]:
    """The weights that start at 0 and move with rate 1 against the mean input of each step."""
    task = Line(rate=1.0)
    data = [flow.tensor([pair], dtype=flow.float32) for pair in numbers]
    quiet_trainer(max_epochs=1, **arguments).fit(task, data)
    return [round(float(number), 4) for number in task.layer.weight.numpy()[0]]


def test_accumulation_averages_over_the_batches_of_a_window(mode: str) -> None:
    # windows (1, 3), (5, 9), (4): means 2, 7, 4
    numbers = [(1.0, 0.0), (3.0, 0.0), (5.0, 0.0), (9.0, 2.0), (4.0, 0.0)]
    assert weight_after(numbers, mode=mode, accumulate_grad_batches=2) == [-13.0, -1.0]
    # windows (1, 3, 5, 9) and (4): 4.5 + 4
    assert weight_after(numbers, mode=mode, accumulate_grad_batches=4) == [-8.5, -0.5]
    # one window, cut short by the end of the epoch: averaged over the 5 it has
    assert weight_after(numbers, mode=mode, accumulate_grad_batches=9) == [-4.4, -0.4]


@pytest.mark.parametrize(
    ("clip", "algorithm", "expected"),
    [
        (None, "norm", [-30.0, -40.0]),
        (0, "norm", [-30.0, -40.0]),
        (5.0, "norm", [-3.0, -4.0]),
        (5, "norm", [-3.0, -4.0]),
        (60.0, "norm", [-30.0, -40.0]),
        (35.0, "value", [-30.0, -35.0]),
        (1, "value", [-1.0, -1.0]),
        (60.0, "value", [-30.0, -40.0]),
    ],
)
def test_gradient_clip_val_and_its_algorithm(
    mode: str, clip: Optional[float], algorithm: str, expected: List[float]
) -> None:
    after = weight_after(
        [(30.0, 40.0)], mode=mode, gradient_clip_val=clip, gradient_clip_algorithm=algorithm
    )
    assert after == expected


def test_clipping_follows_accumulation(mode: str) -> None:
    # the mean gradient of the window is (3, 4), whose norm is 5; each batch alone has more
    numbers = [(30.0, 0.0), (-24.0, 8.0)]
    after = weight_after(numbers, mode=mode, accumulate_grad_batches=2, gradient_clip_val=5.5)
    assert after == [-3.0, -4.0]
    after = weight_after(numbers, mode=mode, accumulate_grad_batches=2, gradient_clip_val=2.5)
    assert after == [-1.5, -2.0]


# ---------------------------------------------------------------------- seed


def orders(mode: str, seed: Optional[int], epochs: int = 3) -> List[List[float]]:
    """The order in which each epoch sees a shuffled set of 16 numbers."""
    loader = DataLoader(TensorDataset(flow.arange(16).reshape(16, 1).float()), shuffle=True)
    seen: List[List[float]] = []

    class Scalar(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(flow.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.weight * batch[0]).mean()

    class Sees(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            seen.append([])

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen[-1].append(float(batch[0]))

    trainer = quiet_trainer(mode=mode, max_epochs=epochs, seed=seed, callbacks=Sees())
    trainer.fit(Scalar(), loader)
    return seen


def test_the_same_seed_shuffles_the_same_in_both_modes_and_anew_in_each_epoch() -> None:
    eager, again, graph = orders("eager", 7), orders("eager", 7), orders("graph", 7)
    assert eager == again == graph
    assert all(sorted(epoch) == list(range(16)) for epoch in eager)
    assert eager[0] != eager[1] != eager[2]


def test_another_seed_shuffles_otherwise() -> None:
    assert orders("eager", 7, epochs=1) != orders("eager", 8, epochs=1)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_of_any_usual_size_work(seed: int) -> None:
    fitted(batches(1), seed=seed)


# ---------------------------------------------------------------------- the mode of evaluation


def test_eval_mode_eager_lets_a_graph_run_validate_eagerly() -> None:
    values: List[float] = []

    class ReadsInValidation(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            values.append(batch.mean().item())

    fitted(batches(2), batches(3), task=ReadsInValidation(), mode="graph", eval_mode="eager")
    assert values == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("given", "calls"), [({}, 3), ({"eval_mode": "graph"}, 1)])
def test_eval_mode_is_the_mode_unless_told_otherwise(given: Dict[str, str], calls: int) -> None:
    called: List[int] = []

    class Counts(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            called.append(1)
            self.log("mean", self.layer(batch).mean())

    quiet_trainer(mode="eager", **given).validate(Counts(), batches(3))
    assert len(called) == calls  # a graph calls the step once, when it is traced


# ---------------------------------------------------------------------- callbacks


def test_callbacks_as_one_as_a_list_as_a_tuple_or_none() -> None:
    for given in ([Diary()], (Diary(),)):
        assert quiet_trainer(callbacks=given).callbacks == list(given)
    one = Diary()
    assert quiet_trainer(callbacks=one).callbacks == [one]
    assert quiet_trainer(callbacks=None).callbacks == []
    assert quiet_trainer().callbacks == []


def test_a_list_of_callbacks_is_left_as_the_user_wrote_it(mode: str) -> None:
    own = [Diary()]
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=own)
    trainer.fit(Line(), batches(1))
    assert len(own) == 1


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ("enable_progress_bar", ProgressBar),
        ("enable_model_summary", ModelSummary),
        ("enable_checkpointing", ModelCheckpoint),
    ],
)
def test_what_is_on_by_default_can_be_switched_off_and_is_not_added_twice(
    argument: str, kind: type
) -> None:
    def count(trainer: Trainer) -> int:
        return sum(isinstance(callback, kind) for callback in trainer.callbacks)

    assert count(Trainer(device="cpu", logger=False, max_epochs=1)) == 1
    assert count(quiet_trainer(**{argument: True})) == 1
    assert count(quiet_trainer(**{argument: False})) == 0
    own = kind()
    trainer = quiet_trainer(**{argument: True}, callbacks=[own])
    assert [each for each in trainer.callbacks if isinstance(each, kind)] == [own]


# ---------------------------------------------------------------------- bad values

NAN, INFINITY = float("nan"), float("inf")
LIMITS = [-1, 1.5, -0.1, "3", True, NAN, INFINITY, [1]]
COUNTS_FROM_1 = [0, -1, 1.5, "2", True, None, NAN]
BAD: Dict[str, List[Any]] = {
    "mode": ["Graph", "static", None, 1, "", ["graph"]],
    "eval_mode": ["Graph", "static", 1, "", ["graph"]],
    "max_epochs": [-2, 1.5, "3", True, NAN, [1]],
    "max_steps": [-2, 1.5, "3", True, None, 1e4],
    "max_time": [
        5,
        0.5,
        "1h",
        "12:30",
        "00:00:00:-1",
        "",
        [1],
        {"hour": 1},
        {"hours": "2"},
        {"hours": NAN},
        {"days": 10**10},
        {"seconds": -1},
        timedelta(seconds=-1),
    ],
    "limit_train_batches": LIMITS,
    "limit_val_batches": LIMITS,
    "limit_test_batches": LIMITS,
    "limit_predict_batches": LIMITS,
    "val_check_interval": [0, -1, 0.0, 1.5, -0.5, "1", True, NAN, INFINITY, [1]],
    "check_val_every_n_epoch": COUNTS_FROM_1,
    "num_sanity_val_steps": [-2, 1.5, True, "2", None],
    "fast_dev_run": [-1, 1.5, "yes"],
    "overfit_batches": [-1, 1.5, -0.1, "2", True, NAN],
    "log_every_n_steps": COUNTS_FROM_1,
    "accumulate_grad_batches": [*COUNTS_FROM_1, {0: 2}],
    "gradient_clip_val": [-1, -0.5, "1", True, NAN, INFINITY, [1.0]],
    "gradient_clip_algorithm": ["l2", None, 1, ["norm"]],
    "seed": [-1, 1.5, "0", True, 2**64],
    "callbacks": [5, "bar", [None], [Diary, Diary()], Diary, [Diary], object(), True],
    "logger": [5, "csv", [None], CSVLogger, [CSVLogger], None],
    "enable_progress_bar": ["no", None],
    "enable_model_summary": ["no", None],
    "enable_checkpointing": ["no", None],
    "default_root_dir": [5, ["here"], True],
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param(argument, value, id=f"{argument}-{index}")
        for argument, values in BAD.items()
        for index, value in enumerate(values)
    ],
)
def test_a_bad_value_is_refused_by_its_name_with_what_to_write(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(**{argument: value})
    text = str(error.value)
    assert argument in text
    assert re.search(r"\b(give|use|write|call)\b", text), text
    assert len(text.splitlines()) == 1


NUMPY = ["max_epochs", "max_steps", "accumulate_grad_batches", "limit_train_batches", "seed"]


@pytest.mark.parametrize("argument", NUMPY)
def test_numpy_s_whole_numbers_are_whole_numbers(argument: str) -> None:
    arguments: Dict[str, Any] = {"max_epochs": 2, argument: np.int64(2)}
    _, trainer = fitted(batches(4), **arguments)
    steps = {"max_steps": 2, "accumulate_grad_batches": 4, "limit_train_batches": 4}
    assert trainer.global_step == steps.get(argument, 8)


AT_FIT: List[Tuple[Dict[str, Any], bool, str]] = [
    ({"val_check_interval": 6}, True, "val_check_interval"),
    ({"val_check_interval": 3, "limit_train_batches": 2}, True, "val_check_interval"),
    ({"val_check_interval": 0.5}, False, "val_check_interval"),
    ({"limit_train_batches": 0.1}, True, "limit_train_batches"),
    ({"limit_train_batches": 0.5}, False, "limit_train_batches"),
    ({"overfit_batches": 0.1}, True, "overfit_batches"),
    ({"overfit_batches": 0.5}, False, "overfit_batches"),
]


@pytest.mark.parametrize(("arguments", "known_length", "name"), AT_FIT)
def test_what_shows_only_with_the_data_is_refused_before_training(
    arguments: Dict[str, Any], known_length: bool, name: str
) -> None:
    diary = Diary()
    data = batches(5) if known_length else OfUnknownLength(batches(5))
    trainer = quiet_trainer(max_epochs=1, callbacks=diary, **arguments)
    with pytest.raises(ConfigurationError) as error:
        trainer.fit(Line(), data, batches(2))
    assert name in str(error.value)
    assert diary.events == []


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("validate", "limit_val_batches"),
        ("test", "limit_test_batches"),
        ("predict", "limit_predict_batches"),
    ],
)
def test_a_share_of_less_than_a_batch_is_refused_by_the_argument_s_name(
    stage: str, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        getattr(quiet_trainer(**{name: 0.1}), stage)(Line(), batches(5))


def test_an_argument_that_does_not_exist_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="max_epoch"):
        Trainer(max_epoch=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Trainer("graph")  # type: ignore[call-arg]
