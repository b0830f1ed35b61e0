"""Names that users of Lightning's know, and that mean the same here."""

from __future__ import annotations

import math
from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Line, OfUnknownLength, batches, bits, quiet_trainer
from oneflow import nn
from oneflow.optim.lr_scheduler import LambdaLR

from ofengine import Callback, ConfigurationError, OFEngineWarning, TaskModule
from ofengine.callbacks import EarlyStopping, LRDecayCallback, ModelCheckpoint, ModelSummary
from ofengine.loggers import CSVLogger


def test_print_and_logger_of_a_task(mode: str, capsys: Any, tmp_path: Any) -> None:
    class Prints(Line):
        def on_train_start(self) -> None:
            self.print("step", self.global_step, sep="=")
            assert isinstance(self.logger, CSVLogger) and self.loggers == [self.logger]
            self.trainer.print("from the trainer")

    quiet_trainer(mode=mode, max_epochs=1, logger=CSVLogger(tmp_path)).fit(Prints(), batches(1))
    assert capsys.readouterr().out == "step=0\nfrom the trainer\n"
    assert not hasattr(Line(), "logger")


def test_freeze_and_unfreeze() -> None:
    task = Line()
    task.freeze()
    assert not task.layer.training
    assert not any(each.requires_grad for each in task.parameters())
    task.unfreeze()
    assert task.layer.training
    assert all(each.requires_grad for each in task.parameters())


class Last(Callback):
    def __init__(self) -> None:
        self.seen: List[Any] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
        self.seen.append(trainer.is_last_batch)

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.seen.append(trainer.is_last_batch)


@pytest.mark.parametrize("data", [lambda: batches(2), lambda: OfUnknownLength(batches(2))])
def test_is_last_batch(mode: str, data: Any) -> None:
    last = Last()
    quiet_trainer(mode=mode, max_epochs=2, callbacks=last).fit(Line(), data())
    assert last.seen == [False, False, True, True] * 2


def test_estimated_stepping_batches_in_configure_optimizers(mode: str) -> None:
    class Asks(Line):
        def configure_optimizers(self) -> Any:
            self.estimated = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    task = Asks()
    quiet_trainer(mode=mode, max_epochs=3, accumulate_grad_batches=2).fit(task, batches(3))
    assert task.estimated == 6
    endless = quiet_trainer(mode=mode, max_epochs=-1, max_time={"seconds": 0})
    endless.fit(task, batches(1))
    assert task.estimated == math.inf


def test_callbacks_by_their_kind(tmp_path: Any) -> None:
    saves, stops = ModelCheckpoint(tmp_path), EarlyStopping("loss")
    trainer = quiet_trainer(callbacks=[stops, saves, ModelCheckpoint(tmp_path, monitor="loss")])
    assert trainer.checkpoint_callback is saves
    assert trainer.early_stopping_callback is stops
    assert (len(trainer.checkpoint_callbacks), len(trainer.early_stopping_callbacks)) == (2, 1)
    assert quiet_trainer().checkpoint_callback is None


# ---------------------------------------------------------------------- min_epochs, min_steps


class Stops(Callback):
    """Asks for the end after the first batch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("least", "steps"),
    [
        ({}, 1),
        ({"min_epochs": 2}, 6),
        ({"min_steps": 5}, 5),
        ({"min_epochs": 1, "min_steps": 2}, 3),
    ],
)
def test_training_goes_on_as_far_as_it_has_to(mode: str, least: Any, steps: int) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=5, callbacks=Stops(), **least)
    trainer.fit(Line(), batches(3))
    assert trainer.global_step == steps
    assert (trainer.min_epochs, trainer.min_steps) == (
        least.get("min_epochs", 0),
        least.get("min_steps", 0),
    )


@pytest.mark.parametrize("what", ["epochs", "steps"])
def test_least_and_most_have_to_fit(what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"min_{what}=3 is more than max_{what}=2"):
        quiet_trainer(**{f"min_{what}": 3, f"max_{what}": 2})
    with pytest.raises(ConfigurationError, match=f"min_{what}=-1: give a whole number"):
        quiet_trainer(**{f"min_{what}": -1})


# ---------------------------------------------------------------------- return -1


class Skips(Callback):
    """Ends epoch 1 before batch ``at``."""

    def __init__(self, at: int, answer: Any = -1) -> None:
        self.at, self.answer = at, answer
        self.ends: List[Any] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> Any:
        return self.answer if (trainer.current_epoch, i) == (1, self.at) else None

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.ends.append((trainer.current_epoch, trainer.batch_idx, trainer.global_step))


class Moved(Line):
    """At a rate that depends on the epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"},
        }


def moved_by(rates: List[float]) -> Any:
    """The bias after such steps, whose gradient is 1."""
    bias = np.float32(0)
    for rate in rates:
        bias = np.float32(bias - np.float32(rate))
    return bias


@pytest.mark.parametrize("at", [0, 1, 2])
def test_minus_one_ends_the_epoch(mode: str, at: int) -> None:
    skips, task = Skips(at), Moved()
    with flow.no_grad():
        task.layer.bias.zero_()
    quiet_trainer(mode=mode, max_epochs=3, callbacks=skips).fit(task, batches(3))
    assert skips.ends == [(0, 2, 3), (1, at - 1, 3 + at), (2, 2, 6 + at)]
    expected = moved_by([0.1] * 3 + [0.05] * at + [0.025] * 3)
    assert np.allclose(task.layer.bias.numpy(), expected, atol=1e-6)


def test_a_window_that_is_not_full_is_left_out(mode: str) -> None:
    whole, cut = Line(), Line()
    cut.load_state_dict(whole.state_dict())
    arguments = {"mode": mode, "accumulate_grad_batches": 2, "max_epochs": 2}
    quiet_trainer(callbacks=Skips(2), **arguments).fit(whole, batches(4))  # of two full windows
    quiet_trainer(callbacks=Skips(3), **arguments).fit(cut, batches(4))
    assert bits(whole) == bits(cut)


def test_no_rate_counts_the_batches_of_such_a_window(mode: str) -> None:
    whole, cut = Moved(), Moved()
    cut.load_state_dict(whole.state_dict())
    arguments = {"mode": mode, "accumulate_grad_batches": 2, "max_epochs": 3}
    for task, at in ((whole, 2), (cut, 3)):
        decay = LRDecayCallback(every_n_batches=3, per_epoch=False)
        quiet_trainer(callbacks=[Skips(at), decay], **arguments).fit(task, batches(4))
    assert bits(whole) == bits(cut)


@pytest.mark.parametrize("answer", [0, True, flow.ones(2), "-1"])
def test_other_answers_are_ignored(mode: str, answer: Any) -> None:
    skips = Skips(1, answer)
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=skips)
    trainer.fit(Line(), batches(2))
    assert trainer.global_step == 4


def test_a_run_goes_on_behind_an_epoch_that_was_ended(mode: str, tmp_path: Any) -> None:
    class Saves(Callback):
        fires_last = True

        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}")

    for at in (0, 1):
        whole, resumed = Moved(), Moved()
        arguments = {"mode": mode, "max_epochs": 3}
        quiet_trainer(callbacks=[Skips(at), Saves()], **arguments).fit(whole, batches(3))
        trainer = quiet_trainer(callbacks=[Skips(at)], **arguments)
        trainer.fit(resumed, batches(3), ckpt_path=tmp_path / "1")
        assert bits(resumed) == bits(whole)
        assert trainer.global_step == 6 + at


# ---------------------------------------------------------------------- hooks and callbacks


def test_after_an_update_the_weights_are_the_new_ones(mode: str) -> None:
    seen: List[Any] = []

    class Holds(Callback):
        """Holds the weights to one sign, as for a critic; in both modes."""

        def on_after_optimizer_step(self, trainer: Any, task: Any) -> None:
            seen.append((trainer.global_step, round(float(task.layer.bias.numpy()[0]), 4)))
            with flow.no_grad():
                task.layer.bias.clamp_(min=-0.15)

    task = Line()
    with flow.no_grad():
        task.layer.bias.zero_()
    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=2, callbacks=Holds())
    trainer.fit(task, batches(6))
    assert seen == [(1, -0.1), (2, -0.2), (3, -0.25)]


class Brings(Line):
    def configure_callbacks(self) -> Any:
        self.own = [Last(), EarlyStopping("loss", patience=9)]
        return self.own


def test_callbacks_that_a_task_brings(mode: str) -> None:
    task, other = Brings(), EarlyStopping("nothing that is logged")
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[other])
    for _ in range(2):
        trainer.fit(task, batches(2))
        assert task.own[0].seen == [False, False, True, True]
        assert [type(each) for each in trainer.callbacks].count(EarlyStopping) == 1
        assert trainer.early_stopping_callback is task.own[1]


def test_what_is_no_callback_is_told() -> None:
    class Wrong(Line):
        def configure_callbacks(self) -> Any:
            return [EarlyStopping]

    with pytest.raises(ConfigurationError, match=r"configure_callbacks\(\).*call the class first"):
        quiet_trainer(max_epochs=1).fit(Wrong(), batches(1))


# ---------------------------------------------------------------------- example_input_array


class Convolves(TaskModule):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.example_input_array = example
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.up(self.conv(x))).mean(dim=(2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).pow(2).mean()


def test_shapes_and_flops_in_the_summary(mode: str, capsys: Any) -> None:
    task = Convolves(flow.ones(2, 3, 6, 6))
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=ModelSummary())
    trainer.fit(task, [flow.ones(2, 3, 6, 6)])
    text = capsys.readouterr().out
    flops = {
        # by hand: 2 x (images x pixels x outputs) x (inputs x kernel)
        "conv": 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3),
        "up": 2 * (2 * 4 * 4 * 8) * (4 * 2 * 2),
        "norm": 0,
        "head": 2 * (2 * 2) * 4,
    }
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    for name, count in flops.items():
        assert rows[name][-1] == f"{count:,}"
    assert rows["conv"][-3:-1] == ["2x3x6x6", "2x8x4x4"]
    assert rows["head"][-3:-1] == ["2x4", "2x2"]
    assert f"{sum(flops.values()):,} FLOPs in a forward" in text
    assert "forward" not in vars(task.conv)


def test_an_example_that_does_not_fit_is_told_and_changes_nothing(mode: str) -> None:
    task = Convolves(flow.ones(2, 5))
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=ModelSummary())
    with pytest.warns(OFEngineWarning, match=r"Convolves.forward\(example_input_array\) raised"):
        trainer.fit(task, [flow.ones(2, 3, 6, 6)])
    assert trainer.global_step == 1
    assert task.norm.training


class Widths(Convolves):
    """OneFlow finds the wrong width only in C++, and tells all of its frames."""

    def forward(self, x: Any) -> Any:
        return self.head(x)


def test_of_an_example_that_does_not_fit_no_frames_of_oneflow_s_are_told(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=ModelSummary())
    with pytest.warns(OFEngineWarning, match=r"raised RuntimeError: \(5 vs 4\), in") as caught:
        trainer.fit(Widths(flow.ones(2, 5)), [flow.ones(2, 4)])
    told = next(str(each.message) for each in caught if "example_input_array" in str(each.message))
    assert "in OneFlow's matmul_op: the summary has no shapes" in told
    assert not [part for part in ("File", ".cpp", "Error Type") if part in told]


def test_an_example_changes_no_running_statistics(mode: str) -> None:
    shown, plain = Convolves(flow.ones(2, 3, 6, 6)), Convolves(None)
    plain.load_state_dict(shown.state_dict())
    for task in (shown, plain):
        trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=ModelSummary())
        trainer.fit(task, [flow.ones(2, 3, 6, 6)])
    assert bits(shown) == bits(plain)
