"""A hook that takes other arguments than it is given is told, with what to write."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict

import pytest
from helpers import Bare, Line, batches, quiet_trainer, refused, sentence

from ofengine import Callback, ConfigurationError, DataModule


def _of(base: type, **methods: Any) -> Any:
    return type("Mine", (base,), methods)()


class Data(DataModule):
    def train_dataloader(self) -> Any:
        return batches()


TASKS: Dict[str, Any] = {
    "setup": (lambda self: None, "self, stage"),
    "on_train_epoch_end": (lambda self, outputs: None, "self"),
    "on_train_batch_end": (lambda self, a, b, c, d: None, "self, outputs, batch, batch_idx"),
    "on_train_batch_start": (lambda self, batch: None, "self, batch, batch_idx"),
    "on_fit_start": (lambda: None, "self"),
    "prepare_data": (lambda self, stage: None, "self"),
    "on_save_checkpoint": (lambda self: None, "self, checkpoint"),
    "configure_optimizers": (lambda self, lr: None, "self"),
    "configure_callbacks": (lambda self, which: None, "self"),
}


@pytest.mark.parametrize("hook", TASKS)
def test_of_a_task(hook: str, mode: str) -> None:
    method, given = TASKS[hook]
    task = _of(Line, **{hook: method})
    refused(task, ConfigurationError, rf"Mine\.{hook}\(.*write `def {hook}\({given}\)`", mode=mode)


def test_of_param_groups_which_the_default_optimizer_asks(mode: str) -> None:
    task = _of(Bare, training_step=lambda self, batch: None, param_groups=lambda self, lr: [])
    refused(task, ConfigurationError, r"write `def param_groups\(self\)`", mode=mode)


CALLBACKS: Dict[str, Any] = {
    "on_train_end": (lambda self: None, "self, trainer, task"),
    "teardown": (lambda self, trainer, task: None, "self, trainer, task, stage"),
    "load_state_dict": (lambda self: None, "self, state"),
}


@pytest.mark.parametrize("hook", CALLBACKS)
def test_of_a_callback(hook: str, mode: str) -> None:
    method, given = CALLBACKS[hook]
    says = rf"Mine\.{hook}\(.*write `def {hook}\({given}\)`"
    refused(
        Line(), ConfigurationError, says, mode=mode, callbacks=[_of(Callback, **{hook: method})]
    )


@pytest.mark.parametrize(
    ("hook", "method", "given"),
    [
        ("setup", lambda self: None, "self, stage"),
        ("teardown", lambda self: None, "self, stage"),
        ("prepare_data", lambda self, stage: None, "self"),
        ("train_dataloader", lambda self, stage: None, "self"),
    ],
)
def test_of_a_data_module(mode: str, hook: str, method: Callable[..., Any], given: str) -> None:
    for verb in ("fit", "preview"):
        trainer = quiet_trainer(mode=mode, max_epochs=1)
        with pytest.raises(ConfigurationError) as error:
            getattr(trainer, verb)(Line(), _of(Data, **{hook: method}))
        sentence(error, rf"Mine\.{hook}\(.*write `def {hook}\({given}\)`")
        assert trainer.global_step == 0


def _drops_all(method: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def dropped(self: Any, *_: Any) -> Any:
        return method(self)

    return dropped


class Called(Callback):
    """Other ways to take what is given."""

    def __init__(self) -> None:
        self.calls = 0

    def setup(self, *given: Any) -> None:
        self.calls += len(given)

    @_drops_all
    def on_train_start(self: Any) -> None:
        self.calls += 1

    def on_train_end(self, trainer: Any, task: Any, more: int = 5) -> None:
        self.calls += more

    @staticmethod
    def on_train_epoch_end(trainer: Any, task: Any) -> None:  # type: ignore[override]
        task.ended = True


def test_what_can_be_called_is_left_alone(mode: str) -> None:
    class Own(Line):
        def param_groups(self, lr: float = 0.1, *more: Any) -> Any:
            return [{"params": self.parameters(), "lr": lr}]

        def test_dataloader(self, size: int) -> Any:  # for nobody asks for it
            raise AssertionError

    called, task = Called(), Own()
    quiet_trainer(mode=mode, max_epochs=1, callbacks=called).fit(task, batches())
    assert called.calls == 3 + 1 + 5 and task.ended  # type: ignore[attr-defined]
