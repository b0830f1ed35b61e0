"""A name that Lightning has and ofengine has not is told with what to write here."""

from __future__ import annotations

import sys
from typing import Any

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

import ofengine.callbacks
import ofengine.loggers
import ofengine.metrics
from ofengine import (
    Callback,
    ConfigurationError,
    OFEngineError,
    OFEngineWarning,
    TaskModule,
    Trainer,
)
from ofengine.lightning_classes import EXPORTS


class Line(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()


DATA = [flow.ones(1, 1)]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("amp_backend", "precision="),
        ("accelerator", "device="),
        ("deterministic", "seed"),
        ("benchmark", "cudnn"),
        ("gpus", "devices="),
    ],
)
def test_an_argument_of_lightning_s_trainer(argument: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"no argument '{argument}'") as error:
        Trainer(**{argument: 1})
    assert says in str(error.value)
    assert isinstance(error.value, TypeError)


def test_a_misspelt_argument_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'max_epochs'"):
        Trainer(max_epoch=3)
    with pytest.raises(ConfigurationError, match="use one of accumulate_grad_batches, callbacks"):
        Trainer(xyzzy=3)


@pytest.mark.parametrize(
    ("argument", "says"),
    [("datamodule", "give it to fit"), ("dataloaders", "validate"), ("sync_dist", "self.log")],
)
def test_an_argument_of_something_else_than_the_trainer(argument: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"no argument '{argument}'.*{says}"):
        Trainer(**{argument: 1})


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_an_argument_of_a_verb(verb: str) -> None:
    call = getattr(quiet_trainer(max_epochs=1), verb)
    with pytest.raises(ConfigurationError, match=f"{verb} has no argument 'model'"):
        call(Line(), model=object())
    with pytest.raises(ConfigurationError, match="did you mean 'datamodule'"):
        call(Line(), datamodul=object())
    with pytest.raises(ConfigurationError, match="use one of ckpt_path, data"):
        call(Line(), xyzzy=object())


def test_an_argument_of_log(mode: str) -> None:
    class Logs(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("loss", outputs["loss"], rank_zero_only=True)

    says = "log has no argument 'rank_zero_only': the values of all ranks count"
    with pytest.raises(ConfigurationError, match=says):
        quiet_trainer(mode=mode, max_epochs=1).fit(Logs(), DATA)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("progress_bar_dict", "progress_bar_metrics"),
        ("lr_schedulers", "lr_scheduler"),
    ],
)
def test_an_attribute_of_lightning_s_trainer(name: str, says: str) -> None:
    trainer = quiet_trainer()
    with pytest.raises(OFEngineError, match=f"trainer.{name} is Lightning's name") as error:
        getattr(trainer, name)
    assert says in str(error.value)
    assert not hasattr(trainer, name)
    assert getattr(trainer, name, 7) == 7


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("global_rank", "trainer.global_rank"),
        ("datamodule", "trainer.datamodule"),
        ("optimizer_step", "on_after_optimizer_step"),
        ("transfer_batch_to_device", "collate_fn"),
    ],
)
def test_an_attribute_of_a_lightning_module(name: str, says: str) -> None:
    with pytest.raises(OFEngineError, match=f"self.{name} of a task is Lightning's name") as error:
        getattr(Line(), name)
    assert says in str(error.value)
    assert not hasattr(Line(), name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("from ofengine import LightningModule", "write TaskModule"),
        ("from ofengine.callbacks import RichProgressBar", "write ProgressBar"),
        ("from ofengine.loggers import WandbLogger", "examples/other_loggers.py"),
        ("from ofengine.metrics import MetricCollection", "log each"),
    ],
)
def test_an_import_of_lightning_s(line: str, says: str) -> None:
    with pytest.raises(ImportError, match=f"which is Lightning's: .*{says}") as error:
        exec(line, {})
    assert isinstance(error.value, OFEngineError)
    module = sys.modules[line.split()[1]]
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
    assert not hasattr(module, "nonsense")


def test_no_name_that_is_exported_is_in_the_table_of_others() -> None:
    for each in (ofengine, ofengine.callbacks, ofengine.loggers, ofengine.metrics):
        assert not set(each.__all__) & set(EXPORTS)


def test_optimizers_are_by_name_and_not_by_number(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(Line(), DATA)
    assert trainer.optimizers["optimizer"] is trainer.optimizer
    with pytest.raises(ConfigurationError, match=r"write trainer.optimizers\['optimizer'\]"):
        trainer.optimizers[0]
    with pytest.raises(KeyError, match="'other'"):
        trainer.optimizers["other"]


def test_a_name_of_nobody_s_is_python_s_own_error() -> None:
    for owner in (quiet_trainer(), Line()):
        with pytest.raises(AttributeError, match="nonsense") as error:
            getattr(owner, "nonsense")  # noqa: B009
        assert not isinstance(error.value, OFEngineError)


HOOKS = [
    *("training_epoch_end", "validation_epoch_end", "optimizer_step", "backward"),
    *("transfer_batch_to_device", "lr_scheduler_step"),
]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_nothing_calls_is_told(hook: str, mode: str) -> None:
    kind = type("Ported", (Line,), {hook: lambda self, *args: None})
    with pytest.warns(OFEngineWarning, match=f"Ported.{hook} is a hook of Lightning's"):
        quiet_trainer(mode=mode, max_epochs=1).fit(kind(), DATA)


def test_a_hook_of_a_callback_that_nothing_calls_is_told() -> None:
    kind = type("Old", (Callback,), {"on_epoch_end": lambda self, *args: None})
    with pytest.warns(OFEngineWarning, match="Old.on_epoch_end is a hook of Lightning's"):
        quiet_trainer(max_epochs=1, callbacks=kind()).fit(Line(), DATA)


def test_manual_optimization_is_refused_before_training(mode: str) -> None:
    class Manual(Line):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigurationError, match="automatic_optimization is Lightning's name"):
        quiet_trainer(mode=mode, max_epochs=1).fit(Manual(), DATA)


def test_a_user_s_own_attribute_of_such_a_name_is_theirs(mode: str) -> None:
    class Own(Line):
        def __init__(self) -> None:
            super().__init__()
            self.logger, self.automatic_optimization = "mine", True

    task = Own()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, DATA)
    assert task.logger == "mine"
