"""Windows of other lengths from some epoch on: steps, rates, previews, and after every stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, image_batches, quiet_trainer
from helpers.resuming import check_exact
from helpers.tiny import Tiny
from hypothesis import given, strategies as st
from oneflow.optim.lr_scheduler import StepLR

from ofengine import Callback, CheckpointError, ConfigurationError, OFEngineWarning
from ofengine.rates.calendar import Calendar
from ofengine.run.windows import Windows

BY_EPOCH = {0: 1, 2: 3}
SCHEDULES = st.dictionaries(st.integers(0, 6), st.integers(1, 4), min_size=1, max_size=3)


def window_in(by_epoch: Dict[int, int], epoch: int) -> int:
    """The last entry that is not later; one before the first."""
    return ([1] + [by_epoch[each] for each in sorted(by_epoch) if each <= epoch])[-1]


def by_hand(by_epoch: Dict[int, int], batches: int, epochs: int) -> List[Any]:
    """(epoch, step within it, batches done before it in the run) of every optimizer step."""
    rows = []
    for epoch in range(epochs):
        for within, start in enumerate(range(0, batches, window_in(by_epoch, epoch))):
            rows.append((epoch, within, epoch * batches + start))
    return rows


@given(by_epoch=SCHEDULES, batches=st.integers(1, 7), epochs=st.integers(0, 9))
def test_steps_are_counted_as_by_hand(by_epoch: Any, batches: int, epochs: int) -> None:
    windows, rows = Windows.of(by_epoch), by_hand(by_epoch, batches, epochs)
    assert windows.steps(batches, epochs) == len(rows)
    for step, (epoch, within, _) in enumerate(rows):
        assert windows.locate(step, batches) == (epoch, within)
        assert windows.at(epoch) == window_in(by_epoch, epoch)


@given(
    by_epoch=SCHEDULES, batches=st.integers(1, 7), every=st.integers(1, 5), ended=st.integers(0, 4),
    per_epoch=st.booleans(),
)  # fmt: skip
def test_a_calendar_knows_epochs_and_decay(
    by_epoch: Any, batches: int, every: int, ended: int, per_epoch: bool
) -> None:
    calendar, rows = Calendar(batches, by_epoch), by_hand(by_epoch, batches, 9)
    for epoch in range(ended):
        calendar.epoch_ended(epoch, batches)
    for step, (epoch, within, before) in enumerate(rows):
        assert calendar.epoch_of(step) == epoch
        done = within * window_in(by_epoch, epoch)
        events = len([i for i in range(before) if i % every == 0])
        if per_epoch:
            events = epoch * len(range(0, batches, every)) + len(range(0, done, every))
        assert calendar.events_before(step, every, per_epoch) == events


class Noted(Callback):
    """The batch after which each optimizer step was made, and the rates it was made with."""

    def __init__(self) -> None:
        self.rows: List[Any] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if not self.rows or trainer.global_step > len(self.rows):
            rates = trainer.rates.rates(trainer.global_step - 1)
            accumulate = trainer.accumulate_grad_batches
            self.rows.append((trainer.current_epoch, i, accumulate, *rates))


class Scheduled(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), momentum=0.5)
        schedule = {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def rows(count: int = 5) -> List[Any]:
    made = image_batches([2] * count, shape=(2,))
    return [(x, x.sum(dim=1, keepdim=True)) for x, _ in made]


def test_a_run_makes_these_steps_at_these_rates(mode: str) -> None:
    noted = Noted()
    trainer = quiet_trainer(
        mode=mode, max_epochs=4, accumulate_grad_batches=BY_EPOCH, callbacks=noted
    )
    assert trainer.preview(Scheduled(), rows()).total_steps == 14
    assert trainer.preview(Scheduled(), rows()).epochs == [0, 5, 10, 12]
    assert "1 then 3 batches a step" in trainer.preview(Scheduled(), rows()).heading()
    trainer.fit(Scheduled(), rows())
    expected = []
    for epoch in range(4):
        head = np.float32(0.125 * 0.5**epoch)
        ends = [0, 1, 2, 3, 4] if epoch < 2 else [2, 4]
        window = 1 if epoch < 2 else 3
        expected += [(epoch, end, window, float(head / 2), float(head)) for end in ends]
    assert noted.rows == expected
    assert trainer.global_step == trainer.total_steps == 14


def test_it_trains_as_a_loop_by_hand(mode: str) -> None:
    ours = Tiny()
    quiet_trainer(mode=mode, max_epochs=3, accumulate_grad_batches=BY_EPOCH).fit(ours, rows())
    task = Tiny()
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    groups = [{**each, "lr": each["lr"] * each.pop("lr_scale", 1)} for each in task.param_groups()]
    optimizer = flow.optim.SGD(groups, momentum=0.5)
    for epoch in range(3):
        window = window_in(BY_EPOCH, epoch)
        for start in range(0, 5, window):
            part = rows()[start : start + window]
            for batch in part:
                loss = task.training_step(batch, 0)
                (loss / len(part) if len(part) > 1 else loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert bits(ours) == bits(task)


@pytest.mark.slow
def test_a_run_goes_on_exactly(mode: str, tmp_path: Path) -> None:
    check_exact(
        tmp_path, mode, other="graph" if mode == "eager" else "eager", max_epochs=3,
        accumulate_grad_batches={0: 2, 1: 1, 2: 3}, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("thaws", [False, True])
def test_a_run_goes_on_in_a_window_in_which_a_parameter_was_frozen(
    mode: str, thaws: bool, tmp_path: Path
) -> None:
    class Freezes(Callback):
        fires_last = True

        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
            if i in (1, 2):
                next(task.parameters()).requires_grad_(thaws and i == 2)

        def on_train_batch_end(self, trainer: Any, task: Any, *rest: Any) -> None:
            if rest[-1] == 1 and trainer.resumed_from is None:
                trainer.save_checkpoint(tmp_path / "frozen.safetensors")

    def trained(mode: str, path: Any = None) -> Any:
        task = Tiny()
        trainer = quiet_trainer(
            mode=mode, max_epochs=1, accumulate_grad_batches=3, callbacks=Freezes()
        )
        trainer.fit(task, three, ckpt_path=path)
        return bits(task)

    three = [(flow.full((2, 2), i + 1.0), flow.ones(2, 1)) for i in range(3)]
    whole = trained(mode)
    assert trained(mode, tmp_path / "frozen.safetensors") == whole
    assert trained("graph" if mode == "eager" else "eager") == whole


def test_a_graph_that_evaluates_leaves_the_window_of_eager_mode_alone() -> None:
    """A parameter that has thawed in it has a gradient by then."""

    class Thaws(Callback):
        def on_fit_start(self, trainer: Any, task: Any) -> None:
            next(task.parameters()).requires_grad_(False)

        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
            next(task.parameters()).requires_grad_(i > 0)

    class Looks(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", self.training_step(batch, batch_idx))

    def trained(**modes: str) -> Any:
        task, data = Looks(), rows()[:3]
        trainer = quiet_trainer(
            max_epochs=1,
            accumulate_grad_batches=3,
            callbacks=Thaws(),
            val_check_interval=1,
            **modes,
        )
        trainer.fit(task, data, data[:1])
        return bits(task)

    of_eager = trained(mode="eager", eval_mode="eager")
    assert trained(mode="eager", eval_mode="graph") == of_eager
    assert trained(mode="graph", eval_mode="graph") == of_eager


class Weighs(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "weight": batch[0].sum()}


@pytest.mark.parametrize("kind", [Tiny, Weighs])
@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_train_end"])
def test_a_run_that_was_ended_within_a_window_goes_on(
    mode: str, kind: Any, moment: str, tmp_path: Path
) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            trainer.should_stop = trainer.batches_seen == 6

    def save(self: Any, trainer: Any, task: Any) -> None:
        trainer.save_checkpoint(tmp_path / "ended.safetensors")

    setattr(Stops, moment, save)

    class GoesOn(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            trainer.should_stop = False

    def trained(callback: Callback, mode: str = mode, path: Any = None) -> Any:
        task = kind()
        trainer = quiet_trainer(
            mode=mode, max_epochs=1, accumulate_grad_batches=4, callbacks=callback
        )
        trainer.fit(task, eight, ckpt_path=path)
        return bits(task)

    eight = [(flow.full((2, 2), i / 4 + 1), flow.ones(2, 1)) for i in range(8)]
    whole = trained(GoesOn())
    assert trained(Stops()) != whole
    for other in ("eager", "graph"):
        assert trained(GoesOn(), other, tmp_path / "ended.safetensors") == whole


def test_other_windows_on_resume_are_told(tmp_path: Path) -> None:
    class SavesWithin(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            if trainer.batches_seen in (7, 10):
                trainer.save_checkpoint(tmp_path / f"{trainer.batches_seen}")

    arguments: Dict[str, Any] = {"max_epochs": 2, "callbacks": SavesWithin()}
    quiet_trainer(accumulate_grad_batches={0: 1, 1: 3}, **arguments).fit(Tiny(), rows())
    says = r"accumulate_grad_batches was \{0: 1, 1: 3\} in .* and is \{0: 1, 1: 2\} now"
    resumed = quiet_trainer(accumulate_grad_batches={0: 1, 1: 2}, **arguments)
    with pytest.raises(CheckpointError, match=says + ".*lies within a window"):
        resumed.fit(Tiny(), rows(), ckpt_path=tmp_path / "7")
    with pytest.warns(OFEngineWarning, match=says):
        resumed.fit(Tiny(), rows(), ckpt_path=tmp_path / "10")


@pytest.mark.parametrize("wrong", [{}, {0: 0}, {-1: 2}, {0.5: 2}, {0: 1.5}, {"0": 2}, {True: 2}])
def test_what_is_no_schedule_is_told(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"give the number of batches from an epoch on"):
        quiet_trainer(accumulate_grad_batches=wrong)
