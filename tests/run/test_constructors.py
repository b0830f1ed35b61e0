"""An argument that a class of ofengine's has not, is told; those of a user's class are theirs."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import typing
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple, Type

import oneflow as flow
import pytest
from helpers import sentence
from oneflow import nn

from ofengine import Callback, ConfigurationError, Trainer
from ofengine.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradualUnfreezing,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Throughput,
)
from ofengine.errors import UnknownArgumentError
from ofengine.lightning_classes import CLASS_ARGUMENTS
from ofengine.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from ofengine.metrics import Accuracy, Metric


def _public() -> Iterator[Any]:
    """The public classes that take arguments of ofengine's own, and no others."""
    for module in ("", ".callbacks", ".loggers", ".metrics", ".rates"):
        home = importlib.import_module(f"ofengine{module}")
        for name in home.__all__:
            each = getattr(home, name)
            is_class = inspect.isclass(each) and not issubclass(each, (Exception, Warning))
            if is_class and each.__init__ not in (object.__init__, nn.Module.__init__):
                yield pytest.param(each, id=name)


@pytest.mark.parametrize("cls", list(_public()))
def test_an_argument_that_a_public_class_has_not(cls: Type[Any]) -> None:
    with pytest.raises(UnknownArgumentError) as error:
        cls(nonsense=1)
    sentence(error, f"{cls.__name__} has no argument 'nonsense': ")
    assert isinstance(error.value, TypeError) and isinstance(error.value, ConfigurationError)


@pytest.mark.parametrize("cls", list(_public()))
def test_a_public_class_has_the_signature_and_the_hints_of_its_source(cls: Type[Any]) -> None:
    init = cls.__init__
    parameters = inspect.signature(init).parameters
    assert next(iter(parameters)) == "self" and "given" not in parameters
    assert set(typing.get_type_hints(init)) - {"return"} == set(parameters) - {"self"}
    assert init.__globals__["__name__"] == inspect.unwrap(init).__module__


GIVEN: Dict[str, Tuple[Any, Dict[str, Any], str]] = {
    "swa_lrs": (StochasticWeightAveraging, {"swa_lrs": 0.1}, "lr_scheduler of configure_opt"),
    "save_weights_only": (ModelCheckpoint, {"save_weights_only": True}, "save_weights"),
    "verbose": (ModelCheckpoint, {"verbose": True}, "leave it out"),
    "on train": (ModelCheckpoint, {"save_on_train_epoch_end": True}, "after validation"),
    "versions": (ModelCheckpoint, {"enable_version_counter": False}, "-v1"),
    "buffers": (EMAWeightAveraging, {"use_buffers": True}, "write include_buffers"),
    "updates": (EMAWeightAveraging, {"update_every_n_steps": 2}, "write every_n_steps"),
    "margin": (BatchSizeFinder, {"margin": 0.1}, "write memory_limit"),
    "samples": (Throughput, {"batch_size_fn": len}, "write samples"),
    "prefix": (CSVLogger, {"save_dir": "x", "prefix": "a"}, "the names that you log"),
    "graph": (TensorBoardLogger, {"save_dir": "x", "log_graph": True}, "ModelSummary"),
    "folder": (TensorBoardLogger, {"save_dir": "x", "sub_dir": "a"}, "write it into name"),
    "task": (Accuracy, {"task": "binary"}, "num_classes tells it"),
    "misspelt": (GradualUnfreezing, {"every_n_epoch": 2}, r"did you mean 'every_n_epochs'\?"),
    "of a base": (JSONLinesLogger, {"save_dir": "x", "flush_logs": 2}, "JSONLinesLogger has no"),
    "and missing": (EarlyStopping, {"moniter": "loss"}, r"did you mean 'monitor'\?"),
}


@pytest.mark.parametrize(("cls", "given", "says"), GIVEN.values(), ids=GIVEN)
def test_what_to_write_instead(cls: Any, given: Dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownArgumentError) as error:
        cls(**given)
    sentence(error, says)


def test_the_tables_name_classes_and_none_of_their_arguments() -> None:
    homes = [importlib.import_module(f"ofengine.{name}") for name in ("callbacks", "loggers")]
    known = {name: each for home in homes for name, each in vars(home).items()}
    for name, table in CLASS_ARGUMENTS.items():
        own = Metric if name == "Metric" else known[name]
        assert not set(table) & set(inspect.signature(own.__init__).parameters), name


class Mine(EarlyStopping):
    def __init__(self, colour: str, **rest: Any) -> None:
        super().__init__("loss", **rest)
        self.colour = colour


class Plain(Callback):
    def __init__(self, swa_lrs: float, *, verbose: bool = False) -> None:
        self.swa_lrs = swa_lrs


class Counts(Metric):
    def __init__(self, task: str) -> None:
        self.task = task

    def sums(self, x: Any) -> Dict[str, Any]:  # type: ignore[override]
        return {"n": flow.ones(1, dtype=flow.float64)}


def test_a_user_s_own_class_has_the_arguments_that_it_says() -> None:
    assert Mine("red", patience=2).colour == "red"
    assert Plain(0.1).swa_lrs == 0.1
    assert Counts(task="mine").task == "mine"
    assert list(inspect.signature(Plain).parameters) == ["swa_lrs", "verbose"]
    with pytest.raises(UnknownArgumentError, match="EarlyStopping has no argument 'patiense'"):
        Mine("red", patiense=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'") as error:
        Plain(0.1, nonsense=2)  # type: ignore[call-arg]
    assert not isinstance(error.value, ConfigurationError)


def test_other_mistakes_with_arguments_are_python_s() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'monitor'"):
        EarlyStopping()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes from 1 to 3 positional arguments but 4 were given"):
        Throughput(len, len, len)  # type: ignore[call-arg]


def test_what_was_made_is_copied_and_pickled(tmp_path: Path) -> None:
    for each in (Mine("red"), ModelCheckpoint(tmp_path), Accuracy(top_k=2)):
        for again in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert type(again) is type(each)
    Trainer(device="cpu", max_epochs=1, logger=False, callbacks=copy.deepcopy(Mine("blue")))
