"""A DataModule: what is called when, where the data comes from, and what is told."""

from __future__ import annotations

from typing import Any, List

import pytest
from helpers import Line, batches, numbered_batches, quiet_trainer
from oneflow.utils.data import DataLoader

from ofengine import (
    Callback,
    ConfigurationError,
    DataError,
    DataModule,
    OFEngineError,
    OFEngineWarning,
    Trainer,
)

CALLS: List[Any] = []


class Data(DataModule):
    def prepare_data(self) -> None:
        CALLS.append("prepare_data")

    def setup(self, stage: str) -> None:
        CALLS.append(("setup", stage, type(self.trainer).__name__))
        self.rows = numbered_batches(3)

    def teardown(self, stage: str) -> None:
        CALLS.append(("teardown", stage))

    def train_dataloader(self) -> Any:
        CALLS.append("train_dataloader")
        return self.rows

    def val_dataloader(self) -> Any:
        CALLS.append("val_dataloader")
        return [DataLoader(self.rows), DataLoader(self.rows[:2])]  # type: ignore[arg-type]

    def test_dataloader(self) -> Any:
        return self.rows[:2]

    def predict_dataloader(self) -> Any:
        return self.rows


class Task(Line):
    def prepare_data(self) -> None:
        CALLS.append("prepare_data of the task")

    def setup(self, stage: str) -> None:
        CALLS.append("setup of the task")

    def teardown(self, stage: str) -> None:
        CALLS.append("teardown of the task")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", batch.mean())

    test_step = validation_step

    def forward(self, batch: Any) -> Any:
        return batch.mean()


@pytest.fixture(autouse=True)
def _no_calls_yet() -> None:
    CALLS.clear()


def test_what_is_called_when(mode: str) -> None:
    data, trainer = Data(), quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(Task(), datamodule=data)
    assert [
        *("prepare_data", "prepare_data of the task", ("setup", "fit", "Trainer")),
        *("setup of the task", "train_dataloader", "val_dataloader"),
        *("teardown of the task", ("teardown", "fit")),
    ] == CALLS
    assert trainer.datamodule is data and data.trainer is trainer
    assert (trainer.global_step, trainer.has_validation) == (3, True)


def test_every_verb_takes_it_in_the_place_of_its_data_too(mode: str) -> None:
    trainer, task = quiet_trainer(mode=mode, max_epochs=1), Task()
    trainer.fit(task, Data())
    assert trainer.validate(task, Data()) == [
        {"seen/dataloader_idx_0": 1.0},
        {"seen/dataloader_idx_1": 0.5},
    ]
    assert trainer.test(task, datamodule=Data()) == [{"seen": 0.5}]
    predicted = [float(each.numpy()) for each in trainer.predict(task, datamodule=Data())]
    assert predicted == [0.0, 1.0, 2.0]
    stages = [each[1] for each in CALLS if each[0] == "teardown"]
    assert stages == ["fit", "validate", "test", "predict"]
    trainer.validate(task, batches())
    assert trainer.datamodule is None


def test_a_loader_that_it_does_not_have_is_the_task_s(mode: str) -> None:
    class Half(DataModule):
        def train_dataloader(self) -> Any:
            return batches(3)

    class Own(Line):
        def train_dataloader(self) -> Any:
            return batches(1)

        def val_dataloader(self) -> Any:
            return batches(2)

    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(Own(), datamodule=Half())
    assert (trainer.global_step, trainer.has_validation) == (3, True)


def test_it_is_torn_down_after_an_error(mode: str) -> None:
    class Fails(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        quiet_trainer(mode=mode, max_epochs=1, callbacks=Fails()).fit(Task(), Data())
    assert CALLS[-1] == ("teardown", "fit")


def test_previews_searches_and_proofs_set_it_up(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    assert trainer.preview(Task(), Data()).total_steps == 6
    trainer.lr_find(Task(), Data(), num_steps=3)
    assert trainer.prove(Task(), Data(), steps=3).equal
    assert [each for each in CALLS if each == ("teardown", "fit")] == [("teardown", "fit")] * 3


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_both_are_too_many(verb: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{verb} was given dataloaders and a datamodule"):
        getattr(quiet_trainer(max_epochs=1), verb)(Task(), batches(), datamodule=Data())


@pytest.mark.parametrize(
    ("given", "says"), [(Data, r"call it first, as in Data\(\)"), (3, "an ofengine.DataModule")]
)
def test_what_is_none_is_told(given: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        quiet_trainer(max_epochs=1).fit(Task(), datamodule=given)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_one_without_data_is_told(verb: str) -> None:
    name = {"fit": "train", "validate": "val"}.get(verb, verb)
    with pytest.raises(DataError, match=rf"{verb} has no data: write DataModule.{name}_dataloader"):
        getattr(quiet_trainer(max_epochs=1), verb)(Task(), datamodule=DataModule())


def test_names_of_lightning_s_are_told() -> None:
    with pytest.raises(OFEngineError, match="save_hyperparameters of a DataModule is Lightning's"):
        DataModule().save_hyperparameters()
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(DataModule(), "nonsense")  # noqa: B009
    kind = type("Old", (Data,), {"transfer_batch_to_device": lambda self, *args: None})
    with pytest.warns(OFEngineWarning, match="Old.transfer_batch_to_device is a hook"):
        quiet_trainer(max_epochs=1).fit(Task(), kind())


def test_it_needs_no_init() -> None:
    class Own(DataModule):
        def __init__(self, count: int) -> None:
            self.count = count

        def train_dataloader(self) -> Any:
            return batches(self.count)

    trainer: Trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Line(), Own(3))
    assert trainer.global_step == 3
