"""What an argument of Trainer means: as its name does in Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import oneflow as flow
import pytest
from fits import FullDiary, fitted_on
from helpers import MeanLine, Notes, numbered_batches, quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, TaskModule, Trainer
from ofengine.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from ofengine.loggers import CSVLogger


class Sees(Callback):
    """The first number of each batch of a TensorDataset, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs: List[List[float]] = []

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.epochs.append([])

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.epochs[-1].append(float(batch[0][0, 0]))


# ---------------------------------------------------------------------- trying things out


@pytest.mark.parametrize(("run", "count"), [(True, 1), (1, 1), (3, 3), (99, 5)])
def test_fast_dev_run_runs_so_many_batches_of_each_stage_once(
    mode: str, run: Union[bool, int], count: int
) -> None:
    diary = FullDiary()
    trainer = quiet_trainer(
        mode=mode, fast_dev_run=run, max_epochs=7, val_check_interval=1, callbacks=diary,
        limit_val_batches=0, num_sanity_val_steps=2, check_val_every_n_epoch=2,
    )  # fmt: skip
    trainer.fit(MeanLine(), numbered_batches(5), numbered_batches(5))
    numbers = range(count)
    assert diary.text == " ".join([*map(str, numbers), *(f"v{n}" for n in numbers), "|"])
    trainer.test(MeanLine(), numbered_batches(5))
    assert diary.events.count("test") == count
    assert len(trainer.predict(MeanLine(), numbered_batches(5))) == count


@pytest.mark.parametrize("logger", [True, [CSVLogger]])
def test_fast_dev_run_logs_and_saves_nothing(tmp_path: Path, logger: Any) -> None:
    if logger is not True:
        logger = [CSVLogger(str(tmp_path))]
    trainer = Trainer(
        device="cpu", fast_dev_run=True, logger=logger, callbacks=[ModelCheckpoint()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(MeanLine(), numbered_batches(2))
    assert trainer.loggers == []
    assert not [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [False, 0])
def test_fast_dev_run_of_nothing_is_off(off: Union[bool, int]) -> None:
    assert fitted_on(numbered_batches(2), fast_dev_run=off, max_epochs=2)[0] == "0 1 | 0 1 |"


@pytest.mark.parametrize(("overfit", "count"), [(2, 2), (1, 1), (0.4, 2), (1.0, 5), (99, 5)])
def test_overfit_batches_sees_the_same_few_batches_in_every_epoch(
    mode: str, overfit: Union[int, float], count: int
) -> None:
    class OfLists(MeanLine):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean()

    sees = Sees()
    numbers = flow.arange(5).reshape(5, 1).float() * flow.ones(1, 2)
    loader = DataLoader(TensorDataset(numbers), shuffle=True)
    trainer = quiet_trainer(
        mode=mode, max_epochs=3, overfit_batches=overfit, callbacks=sees, seed=1
    )
    trainer.fit(OfLists(), loader)
    assert [len(epoch) for epoch in sees.epochs] == [count] * 3
    assert sees.epochs[0] == sees.epochs[1] == sees.epochs[2]


def test_overfit_batches_limits_validation_too() -> None:
    diary, _ = fitted_on(numbered_batches(5), numbered_batches(5), overfit_batches=2)
    assert diary == "0 1 v0 v1 |"


def test_overfit_batches_of_0_is_off() -> None:
    assert fitted_on(numbered_batches(3), overfit_batches=0)[0] == "0 1 2 |"


# ---------------------------------------------------------------------- logging


class LogsItsBatch(MeanLine):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("number", batch.mean())
        return self.layer(batch).mean() * 0 + batch.mean() * 10


def rows_of(notes: Notes, name: str) -> List[Tuple[int, int, float]]:
    return [(step, epoch, row[name]) for step, epoch, row in notes.rows if name in row]


def test_log_every_n_steps_logs_the_values_of_just_those_steps(mode: str) -> None:
    notes = Notes()
    fitted_on(
        numbered_batches(4),
        task=LogsItsBatch(),
        mode=mode,
        max_epochs=2,
        log_every_n_steps=3,
        logger=notes,
    )
    assert rows_of(notes, "number") == [(3, 0, 2.0), (6, 1, 1.0)]
    assert rows_of(notes, "loss") == [(3, 0, 20.0), (6, 1, 10.0)]


def test_log_every_n_steps_counts_optimizer_steps(mode: str) -> None:
    notes = Notes()
    fitted_on(
        numbered_batches(5), task=LogsItsBatch(), mode=mode, log_every_n_steps=1, logger=notes,
        accumulate_grad_batches=2,
    )  # fmt: skip
    assert rows_of(notes, "number") == [(1, 0, 1.0), (2, 0, 3.0), (3, 0, 4.0)]


def test_metrics_are_logged_every_50_steps_unless_told_otherwise() -> None:
    notes = Notes()
    fitted_on(numbered_batches(30), task=LogsItsBatch(), max_epochs=4, logger=notes)
    assert rows_of(notes, "number") == [(50, 1, 19.0), (100, 3, 9.0)]


def test_all_loggers_are_sent_everything() -> None:
    first, second = Notes(), Notes()
    fitted_on(numbered_batches(2), task=LogsItsBatch(), log_every_n_steps=1, logger=[first, second])
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
    task = MeanLine(rate=1.0)
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

    class Scalar(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(flow.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.weight * batch[0]).mean()

    sees = Sees()
    trainer = quiet_trainer(mode=mode, max_epochs=epochs, seed=seed, callbacks=sees)
    trainer.fit(Scalar(), loader)
    return sees.epochs


def test_the_same_seed_shuffles_the_same_in_both_modes_and_anew_in_each_epoch() -> None:
    eager, again, graph = orders("eager", 7), orders("eager", 7), orders("graph", 7)
    assert eager == again == graph
    assert all(sorted(epoch) == list(range(16)) for epoch in eager)
    assert eager[0] != eager[1] != eager[2]


def test_another_seed_shuffles_otherwise() -> None:
    assert orders("eager", 7, epochs=1) != orders("eager", 8, epochs=1)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_of_any_usual_size_work(seed: int) -> None:
    fitted_on(numbered_batches(1), seed=seed)


# ---------------------------------------------------------------------- the mode of evaluation


def test_eval_mode_eager_lets_a_graph_run_validate_eagerly() -> None:
    values: List[float] = []

    class ReadsInValidation(MeanLine):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            values.append(batch.mean().item())

    fitted_on(
        numbered_batches(2),
        numbered_batches(3),
        task=ReadsInValidation(),
        mode="graph",
        eval_mode="eager",
    )
    assert values == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("given", "calls"), [({}, 3), ({"eval_mode": "graph"}, 1)])
def test_eval_mode_is_the_mode_unless_told_otherwise(given: Dict[str, str], calls: int) -> None:
    called: List[int] = []

    class Counts(MeanLine):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            called.append(1)
            self.log("mean", self.layer(batch).mean())

    quiet_trainer(mode="eager", **given).validate(Counts(), numbered_batches(3))
    assert len(called) == calls  # a graph calls the step once, when it is traced


# ---------------------------------------------------------------------- callbacks


def test_callbacks_as_one_as_a_list_as_a_tuple_or_none() -> None:
    for given in ([FullDiary()], (FullDiary(),)):
        assert quiet_trainer(callbacks=given).callbacks == list(given)
    one = FullDiary()
    assert quiet_trainer(callbacks=one).callbacks == [one]
    assert quiet_trainer(callbacks=None).callbacks == []
    assert quiet_trainer().callbacks == []


def test_a_list_of_callbacks_is_left_as_the_user_wrote_it(mode: str) -> None:
    own = [FullDiary()]
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=own)
    trainer.fit(MeanLine(), numbered_batches(1))
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
