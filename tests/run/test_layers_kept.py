"""Layers that a user has put in eval mode stay so; parameters that cannot train are told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Bare, assert_same_arrays, batches, quiet_trainer, refused, weights_of
from oneflow import nn

from ofengine import Callback, RateError, TaskModule


class Net(TaskModule):
    """A trunk with a batch norm and dropout, and a head with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)
        with flow.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(flow.full(tuple(parameter.shape), 0.25 * (index + 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.head(self.norm(self.trunk(batch))) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.01)


def data() -> List[Any]:
    numbers = np.random.RandomState(0).standard_normal((4, 5, 2)).astype("float32")
    return [flow.tensor(each) for each in numbers]


def by_hand(task: Net, epochs: int) -> Dict[str, np.ndarray]:
    """What a loop written by hand makes of ``task``, whose layers it leaves as they are."""
    optimizer = task.configure_optimizers()
    for _ in range(epochs):
        for batch in data():
            task.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(task)


class Modes(Callback):
    """Notes which layers are in eval mode at each step."""

    def __init__(self) -> None:
        self.seen: List[List[str]] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([name for name, each in task.named_modules() if not each.training])


FROZEN = ["trunk", "trunk.0", "trunk.1", "trunk.2"]


def with_frozen_trunk(kind: Any = Net) -> Any:
    task = kind()
    task.trunk.eval()
    return task


def test_a_trunk_in_eval_mode_stays_so_through_validation(mode: str) -> None:
    task, modes = with_frozen_trunk(), Modes()
    trainer = quiet_trainer(mode=mode, max_epochs=3, callbacks=[modes], val_check_interval=2)
    trainer.fit(task, data(), data())
    assert modes.seen == [FROZEN] * 12
    assert [name for name, each in task.named_modules() if not each.training] == FROZEN
    # Dropout of no effect is what makes a loop by hand comparable.
    assert_same_arrays(weights_of(task), by_hand(with_frozen_trunk(), 3))
    assert not task.trunk[1].running_mean.numpy().any()
    assert task.norm.running_mean.numpy().any()


def test_it_is_told_once_which_layers_do_not_train(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ofengine"):
        quiet_trainer(mode=mode, max_epochs=2).fit(with_frozen_trunk(), data(), data())
    told = [each.getMessage() for each in caplog.records if "eval mode" in each.getMessage()]
    assert told == ["layers that are in eval mode stay so in training: trunk."]


def test_other_verbs_and_further_fits_leave_the_layers_as_they_are(mode: str) -> None:
    task = with_frozen_trunk()
    for _ in range(2):
        modes = Modes()
        trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[modes])
        trainer.validate(task, data())
        trainer.fit(task, data(), data())
        trainer.validate(task, data())
        assert modes.seen == [FROZEN] * 4
    assert_same_arrays(weights_of(task), by_hand(with_frozen_trunk(), 2))


@pytest.mark.filterwarnings("ignore:.*does not keep what")  # notes are to begin anew
def test_a_resumed_run_has_them_as_they_were(mode: str, tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "saved")

    def fit(task: Net, resume: Any = None) -> Modes:
        modes = Modes()
        trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[modes, Saves()])
        trainer.fit(task, data(), data(), ckpt_path=resume)
        return modes

    whole, resumed = with_frozen_trunk(), with_frozen_trunk()
    fit(whole)
    assert fit(resumed, tmp_path / "saved").seen == [FROZEN] * 2
    assert_same_arrays(weights_of(resumed), weights_of(whole))
    assert_same_arrays(weights_of(resumed), by_hand(with_frozen_trunk(), 2))


def test_a_task_in_eval_mode_as_a_whole_trains(mode: str) -> None:
    for put in (lambda task: task.eval(), lambda task: task.train(False)):
        task, modes = with_frozen_trunk(), Modes()
        put(task)
        quiet_trainer(mode=mode, max_epochs=1, callbacks=[modes]).fit(task, data())
        assert modes.seen == [[]] * 4


def test_a_run_cut_off_in_validation_leaves_no_layer_in_eval_mode(mode: str) -> None:
    class Breaks(Net):
        broken = True

        def on_validation_batch_end(self, *_: Any) -> None:
            if self.broken:
                raise KeyError("by the user")

    task, modes = with_frozen_trunk(Breaks), Modes()
    with pytest.raises(KeyError):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, data(), data())
    assert [name for name, each in task.named_modules() if not each.training] == FROZEN
    Breaks.broken = False
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[modes]).fit(task, data(), data())
    assert modes.seen == [FROZEN] * 4


def test_a_train_method_of_the_user_s_is_called(mode: str) -> None:
    class Own(Net):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.trunk.eval()
            return self

    modes = Modes()
    quiet_trainer(mode=mode, max_epochs=2, callbacks=[modes]).fit(Own(), data(), data())
    assert modes.seen == [FROZEN] * 8


def test_a_train_method_of_a_layer_is_called(mode: str) -> None:
    class Trunk(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    task, modes = Net(), Modes()
    task.trunk = Trunk(*task.trunk)
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[modes]).fit(task, data(), data())
    assert modes.seen == [["trunk.1"]] * 4


def test_layers_may_be_put_in_eval_mode_later(mode: str) -> None:
    class Later(Net):
        def on_train_start(self) -> None:
            self.trunk.eval()

    modes = Modes()
    quiet_trainer(mode=mode, max_epochs=2, callbacks=[modes]).fit(Later(), data(), data())
    assert modes.seen == [FROZEN] * 8


# ---------------------------------------------------------------------- made too late


class Late(Bare):
    """Makes a layer, or does another thing, in the hook ``at``."""

    def __init__(self, at: str, do: Callable[[Any], None]) -> None:
        super().__init__()
        self.at, self.do = at, do

    def _at(self, hook: str) -> None:
        if hook == self.at:
            self.do(self)

    def on_fit_start(self) -> None:
        self._at("on_fit_start")

    def on_train_start(self) -> None:
        self._at("on_train_start")

    def on_train_epoch_start(self) -> None:
        self._at("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self._at("on_train_epoch_end")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._at("training_step")
        loss = self.layer(batch).mean()
        return loss + (self.head(batch).mean() if "head" in self._modules else 0)


def add_head(task: Any) -> None:
    task.head = nn.Linear(2, 1)


def replace_layer(task: Any) -> None:
    task.layer = nn.Linear(2, 1)


def add_deep(task: Any) -> None:
    task.layer.head = nn.Linear(2, 1)


def add_parameter(task: Any) -> None:
    task.head_scale = nn.Parameter(flow.zeros(1))


HOOKS = ["on_fit_start", "on_train_start", "on_train_epoch_start"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("do", "name"),
    [
        (add_head, "'head.weight'"),
        (add_deep, "'layer.head.weight'"),
        (replace_layer, "'layer.weight'"),
        (add_parameter, "'head_scale'"),
    ],
)
def test_a_layer_that_comes_after_the_optimizer_is_refused(
    mode: str, hook: str, do: Any, name: str
) -> None:
    refused(Late(hook, do), RateError, name, "no group", "__init__", mode=mode)


def test_a_layer_made_in_the_first_step_is_told_behind_it() -> None:
    def once(task: Any) -> None:
        if "head" not in task._modules:
            add_head(task)

    refused(Late("training_step", once), RateError, "'head.weight'", "no group", trained=1)


def test_a_layer_made_at_an_epoch_s_end_is_told_at_the_next_one_s_start(mode: str) -> None:
    late = Late("on_train_epoch_end", add_head)
    refused(late, RateError, "'head.weight'", mode=mode, trained=2, max_epochs=2)


def test_what_is_unfrozen_and_in_no_group_is_told(mode: str) -> None:
    def unfreeze(task: Any) -> None:
        task.extra.requires_grad_(True)

    task = Late("on_train_epoch_end", unfreeze)
    task.extra = nn.Linear(2, 1)
    task.extra.requires_grad_(False)
    refused(
        task, RateError, "'extra.weight'", "unfrozen", "group", mode=mode, trained=2, max_epochs=2
    )


def test_a_layer_made_early_or_frozen_or_given_to_the_optimizer_is_fine(mode: str) -> None:
    class Early(Late):
        def setup(self, stage: str) -> None:
            add_head(self)

    def frozen(task: Any) -> None:
        add_head(task)
        task.head.requires_grad_(False)

    for task in (Early("", add_head), Late("on_train_start", frozen)):
        before = weights_of(task).get("head.bias")
        trainer = quiet_trainer(mode=mode, max_epochs=2)
        trainer.fit(task, batches())
        assert trainer.global_step == 4
        assert before is None
    assert quiet_trainer(mode=mode, max_epochs=1).fit(Late("", add_head), batches()) is None
