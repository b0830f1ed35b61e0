"""A verb within a verb: refused where it would take a run away, and else both are as alone."""

from __future__ import annotations

import copy
from typing import Any, Callable

import oneflow as flow
import pytest
from helpers import Line, bits, quiet_trainer, weights_of

from ofengine import Callback, ConfigurationError

DATA = [flow.ones(2, 2)] * 2
HOOKS = {
    "fit": "setup on_train_batch_end on_train_epoch_end on_validation_end on_train_end on_fit_end",
    "validate": "on_validation_batch_end on_validation_epoch_end teardown",
    "test": "on_test_end",
    "predict": "on_predict_batch_end",
}


class Whole(Line):
    """With all steps."""

    test_step = Line.validation_step

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)


def at(hook: str, action: Callable[[Any, Any], Any]) -> Callback:
    """A callback that does something at ``hook``, the first time."""
    done = []

    def act(self: Any, trainer: Any, task: Any, *_: Any) -> None:
        if not done:
            done.append(hook)
            action(trainer, task)

    made: Callback = type("At", (Callback,), {hook: act})()
    return made


def run(outer: str, callback: Callback, mode: str = "eager") -> Any:
    task = Whole()
    for parameter in task.parameters():
        flow.nn.init.ones_(parameter)
    trainer = quiet_trainer(mode=mode, max_epochs=2, num_sanity_val_steps=0, callbacks=callback)
    getattr(trainer, outer)(task, DATA, *([DATA] if outer == "fit" else []))
    return task


CASES = [(outer, hook) for outer, hooks in HOOKS.items() for hook in hooks.split()]


@pytest.mark.parametrize("inner", HOOKS)
@pytest.mark.parametrize(("outer", "hook"), CASES)
def test_a_verb_within_one_of_the_same_trainer_is_refused(
    outer: str, hook: str, inner: str
) -> None:
    said = rf"^{inner}\(\) was called while {outer}\(\) of this Trainer is running: .*deepcopy"
    with pytest.raises(ConfigurationError, match=said):
        run(outer, at(hook, lambda trainer, task: getattr(trainer, inner)(task, DATA)))


@pytest.mark.parametrize("inner", HOOKS)
def test_a_verb_of_another_trainer_with_the_same_task_is_refused(inner: str, mode: str) -> None:
    other = quiet_trainer(mode=mode, max_epochs=1)
    act = at("on_train_epoch_end", lambda trainer, task: getattr(other, inner)(task, DATA))
    with pytest.raises(ConfigurationError, match=r"of another Trainer, with the same task, is ru"):
        run("fit", act, mode)


@pytest.mark.parametrize("inner", HOOKS)
def test_a_verb_of_another_trainer_with_a_copy_changes_nothing(inner: str, mode: str) -> None:
    other = quiet_trainer(mode=mode, max_epochs=1)
    act = at(
        "on_train_epoch_end",
        lambda trainer, task: getattr(other, inner)(copy.deepcopy(task), DATA),
    )
    assert bits(weights_of(run("fit", act, mode))) == bits(weights_of(run("fit", Callback(), mode)))


def test_what_the_engine_tries_itself_is_no_such_verb(mode: str) -> None:
    found = []
    act = at("on_fit_start", lambda trainer, task: found.append(trainer.lr_find(task, DATA)))
    task = run("fit", act, mode)
    assert found
    assert bits(weights_of(task)) == bits(weights_of(run("fit", Callback(), mode)))


def test_after_an_error_the_trainer_and_the_task_are_free_again() -> None:
    task = Whole()
    trainer = quiet_trainer(callbacks=at("on_validation_end", lambda trainer, task: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        trainer.validate(task, DATA)
    trainer.validate(task, DATA)
    quiet_trainer().test(task, DATA)
