"""A user's mistakes end in one clear sentence, before training wherever it can be known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type

import numpy as np
import oneflow as flow
import pytest
from helpers import OfUnknownLength, quiet_trainer
from oneflow import nn
from oneflow.optim import lr_scheduler
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import (
    Callback,
    ConfigurationError,
    DataError,
    DeviceError,
    GraphModeError,
    OFEngineError,
    OFEngineWarning,
    RateError,
    TaskModule,
    Trainer,
)
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

# What comes out of OneFlow itself must not be handed on as it is.
NOT_FOR_USERS = ("\x1b", "ci-user", "Traceback", "NoneType", "\n")


class Line(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


class Bare(TaskModule):
    """A task with a model and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)


class Trained(Callback):
    """Counts what was trained before the error came."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def batches(count: int = 2) -> List[Any]:
    return [flow.ones(2, 2) * (index + 1) for index in range(count)]


def sentence(error: pytest.ExceptionInfo[OFEngineError], *parts: str) -> str:
    """The error's text, which is one readable line with all ``parts`` in it."""
    text = str(error.value)
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"
    for ugly in NOT_FOR_USERS:
        assert ugly not in text, f"{ugly!r} is in: {text}"
    assert len(text) > 20, text
    return text


def refused(
    task: Any,
    kind: Type[OFEngineError],
    *parts: str,
    mode: str = "eager",
    train: Any = None,
    validation: Any = None,
    trained: int = 0,
    **arguments: Any,
) -> str:
    """``fit`` raises ``kind`` with ``parts`` in its text, after ``trained`` batches."""
    counter = Trained()
    callbacks = [counter, *arguments.pop("callbacks", [])]
    arguments.setdefault("max_epochs", 1)
    trainer = quiet_trainer(mode=mode, callbacks=callbacks, **arguments)
    with pytest.raises(kind) as error:
        trainer.fit(task, batches() if train is None else train, validation)
    assert counter.batches == trained
    return sentence(error, *parts)


# ---------------------------------------------------------------------- the training step


def test_no_training_step(mode: str) -> None:
    refused(Bare(), ConfigurationError, "Bare", "training_step", "def training_step", mode=mode)


RETURNS: List[Tuple[str, Callable[[Any], Any], str]] = [
    ("nothing", lambda loss: None, r"return"),
    ("a dict without loss", lambda loss: {"los": loss}, r"'loss'.*'los'"),
    ("a vector", lambda loss: flow.stack([loss, loss]), r"\(2,\).*mean"),
    ("a detached loss", lambda loss: loss.detach(), r"detached"),
    ("a float", lambda loss: 3.0, r"float"),
    ("a tuple", lambda loss: (loss, 1), r"tuple"),
    ("a dict whose loss is a float", lambda loss: {"loss": 1.0}, r"float"),
    ("a string", lambda loss: "loss", r"str"),
]


@pytest.mark.parametrize(
    ("returned", "hint"), [pytest.param(f, hint, id=name) for name, f, hint in RETURNS]
)
def test_a_training_step_that_returns_no_loss(
    mode: str, returned: Callable[[Any], Any], hint: str
) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned(self.layer(batch).mean())

    refused(Wrong(), ConfigurationError, r"Wrong\.training_step", hint, mode=mode)


def test_a_training_step_without_gradients(mode: str) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with flow.no_grad():
                return self.layer(batch).mean()

    refused(Wrong(), ConfigurationError, r"Wrong\.training_step", "no_grad|detached", mode=mode)


def test_a_training_step_that_takes_nothing(mode: str) -> None:
    class Wrong(Line):
        def training_step(self) -> Any:  # type: ignore[override]
            return self.layer(flow.ones(1, 2)).mean()

    refused(
        Wrong(), ConfigurationError, r"training_step", r"def training_step\(self, batch", mode=mode
    )


def test_a_frozen_model(mode: str) -> None:
    task = Line()
    task.layer.requires_grad_(False)
    refused(task, RateError, "Line", "trainable|frozen", mode=mode)


# ---------------------------------------------------------------------- task and data


def test_the_class_instead_of_an_object(mode: str) -> None:
    refused(Line, ConfigurationError, "Line", r"Line\(\)|call", mode=mode)


@pytest.mark.parametrize("thing", [nn.Linear(2, 1), None, "task"])
def test_something_that_is_no_task(thing: Any) -> None:
    refused(thing, ConfigurationError, "TaskModule")


def test_task_and_data_swapped() -> None:
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(max_epochs=1).fit(batches(), Line())  # type: ignore[arg-type]
    sentence(error, "first argument", "list", "TaskModule")


def test_a_task_that_forgot_to_call_super_init() -> None:
    class Forgot(TaskModule):
        def __init__(self) -> None:
            self.rate = 0.1

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return batch.mean()

    refused(Forgot(), OFEngineError, "Forgot", r"super\(\)\.__init__\(\)")


def test_a_task_without_parameters() -> None:
    class Empty(TaskModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return batch.mean()

    refused(Empty(), OFEngineError, "Empty", "parameter")


@pytest.mark.parametrize(
    ("verb", "loader"),
    [
        ("fit", "train_dataloader"),
        ("validate", "val_dataloader"),
        ("test", "test_dataloader"),
        ("predict", "predict_dataloader"),
    ],
)
def test_no_data(verb: str, loader: str) -> None:
    class All(Line):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return None

        predict_step = test_step

    with pytest.raises(DataError) as error:
        getattr(quiet_trainer(max_epochs=1), verb)(All())
    sentence(error, f"{verb} has no data", rf"All\.{loader}\(\)")


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_dataloader(mode: str, empty: Any) -> None:
    refused(Line(), DataError, "train_dataloader", "empty", mode=mode, train=empty)


def test_a_dataset_smaller_than_a_batch_with_drop_last() -> None:
    loader = DataLoader(TensorDataset(flow.ones(3, 2)), batch_size=4, drop_last=True)
    refused(Line(), DataError, "empty", "drop_last", train=loader)


def test_an_empty_validation_dataloader() -> None:
    loader = DataLoader(TensorDataset(flow.ones(3, 2)), batch_size=4, drop_last=True)
    refused(Line(), DataError, "val_dataloader", "empty", validation=loader)


def test_a_loader_of_unknown_length_that_turns_out_empty(mode: str) -> None:
    refused(Line(), DataError, "train_dataloader", "no batch", mode=mode, train=OfUnknownLength([]))


def test_a_generator_is_used_up_after_one_epoch(mode: str) -> None:
    generator = (batch for batch in batches())
    # Python cannot rewind it; the sentence says so instead of speaking of an empty loader.
    refused(
        Line(), DataError, "train_dataloader", r"(?i)generator|iterator|once",
        mode=mode, train=generator, max_epochs=2, trained=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: TensorDataset(flow.ones(4, 2)), id="a dataset"),
        pytest.param(lambda: 5, id="a number"),
        pytest.param(lambda: "cifar10", id="a name"),
        pytest.param(lambda: flow.ones(4, 2), id="a tensor"),
        pytest.param(lambda: {"train": batches()}, id="a dict"),
        pytest.param(lambda: DataLoader, id="the class"),
        pytest.param(lambda: batches, id="a function"),
    ],
)
def test_what_is_no_dataloader(data: Callable[[], Any]) -> None:
    refused(Line(), DataError, "train_dataloader", "DataLoader", train=data())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: {"val": batches()}, id="a dict"),
        pytest.param(lambda: 5, id="a number"),
        pytest.param(
            lambda: [DataLoader(TensorDataset(flow.ones(4, 2))), batches()], id="a mixed list"
        ),
    ],
)
def test_what_is_no_validation_dataloader(data: Callable[[], Any]) -> None:
    with pytest.raises(DataError) as error:
        quiet_trainer().validate(Line(), data())
    sentence(error, "val_dataloader", "dataloader")


def test_validation_data_without_a_validation_step(mode: str) -> None:
    class NoValidation(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

    refused(
        NoValidation(), ConfigurationError, "NoValidation", "validation_step",
        mode=mode, validation=batches(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "step"),
    [("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step|forward")],
)
def test_a_verb_without_its_step_says_what_to_write(mode: str, verb: str, step: str) -> None:
    with pytest.raises(OFEngineError) as error:
        getattr(quiet_trainer(mode=mode), verb)(Bare(), batches())
    sentence(error, "Bare", step, r"write|def ")


# ---------------------------------------------------------------------- the optimizer


def sgd(task: nn.Module) -> Any:
    return flow.optim.SGD(task.parameters(), lr=0.1)


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 5)


class Configuration(NamedTuple):
    name: str
    make: Callable[[Any], Any]
    hint: str


CONFIGURATIONS = [
    Configuration("nothing", lambda task: None, "nothing|None"),
    Configuration("a number", lambda task: 5, "int"),
    Configuration("the class", lambda task: flow.optim.SGD, r"SGD|class|type"),
    Configuration("an empty dict", lambda task: {}, "'optimizer'|optimizer"),
    Configuration("a wrong key", lambda task: {"optimiser": sgd(task)}, "'optimiser'.*'optimizer'"),
    Configuration(
        "a wrong key for the scheduler",
        lambda task: {"optimizer": sgd(task), "lr_schedular": None},
        "'lr_schedular'.*'lr_scheduler'",
    ),
    Configuration("no optimizer at all", lambda task: [], "optimizer"),
    Configuration("two optimizers", lambda task: [sgd(task), sgd(task)], "2 optimizers"),
    Configuration(
        "two schedulers",
        lambda task: (lambda o: ([o], [cosine(o), cosine(o)]))(sgd(task)),
        "2 schedulers",
    ),
    Configuration(
        "optimizer, scheduler without their lists",
        lambda task: (lambda o: (o, cosine(o)))(sgd(task)),
        r"\[optimizer\], \[|\"lr_scheduler\"|'lr_scheduler'",
    ),
    Configuration(
        "the scheduler of another optimizer",
        lambda task: {"optimizer": sgd(task), "lr_scheduler": cosine(sgd(task))},
        "another optimizer",
    ),
    Configuration(
        "a number for the scheduler",
        lambda task: {"optimizer": sgd(task), "lr_scheduler": 5},
        "int.*lr_scheduler",
    ),
    Configuration(
        "the scheduler's class",
        lambda task: {"optimizer": sgd(task), "lr_scheduler": lr_scheduler.CosineAnnealingLR},
        "scheduler",
    ),
    Configuration(
        "an empty dict for the scheduler",
        lambda task: {"optimizer": sgd(task), "lr_scheduler": {}},
        "'scheduler'",
    ),
    Configuration(
        "a wrong key beside the scheduler",
        lambda task: (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": cosine(o), "intervall": 1}}
        )(sgd(task)),
        "intervall",
    ),
    Configuration(
        "a wrong interval",
        lambda task: (
            lambda o: {
                "optimizer": o,
                "lr_scheduler": {"scheduler": cosine(o), "interval": "batch"},
            }
        )(sgd(task)),
        "interval='batch'.*step.*epoch",
    ),
    Configuration(
        "a wrong frequency",
        lambda task: (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": cosine(o), "frequency": 0}}
        )(sgd(task)),
        "frequency=0",
    ),
    Configuration(
        "ReduceLROnPlateau without its metric",
        lambda task: (
            lambda o: {"optimizer": o, "lr_scheduler": lr_scheduler.ReduceLROnPlateau(o)}
        )(sgd(task)),
        "ReduceLROnPlateau.*monitor",
    ),
]


@pytest.mark.parametrize(
    ("make", "hint"), [pytest.param(each.make, each.hint, id=each.name) for each in CONFIGURATIONS]
)
def test_configure_optimizers_that_returns(
    mode: str, make: Callable[[Any], Any], hint: str
) -> None:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            return make(self)

    refused(Wrong(), OFEngineError, r"Wrong\.configure_optimizers", hint, mode=mode)


def test_an_error_of_the_user_s_own_stays_what_it_is(mode: str) -> None:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        quiet_trainer(mode=mode, max_epochs=1).fit(Wrong(), batches())


# ---------------------------------------------------------------------- log


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        pytest.param(lambda batch: batch, r"\(2, 2\).*mean", id="a matrix"),
        pytest.param(lambda batch: "hello", "str", id="a string"),
        pytest.param(lambda batch: {"a": 1.0}, "log_dict", id="a dict"),
        pytest.param(lambda batch: None, "None|nothing", id="nothing"),
        pytest.param(lambda batch: [1.0], "list", id="a list"),
    ],
)
def test_logging_what_is_no_number(mode: str, value: Callable[[Any], Any], hint: str) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("metric", value(batch))
            return self.layer(batch).mean()

    refused(Wrong(), ConfigurationError, "metric", hint, mode=mode)


def test_logging_under_a_name_that_is_no_text(mode: str) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log(3, batch.mean())  # type: ignore[arg-type]
            return self.layer(batch).mean()

    refused(Wrong(), ConfigurationError, "log", "3", mode=mode)


def test_log_dict_of_what_is_no_dict(mode: str) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict([1.0])  # type: ignore[arg-type]
            return self.layer(batch).mean()

    refused(Wrong(), ConfigurationError, "log_dict", "list", mode=mode)


def test_logging_neither_on_step_nor_on_epoch(mode: str) -> None:
    class Wrong(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("metric", batch.mean(), on_step=False, on_epoch=False)
            return self.layer(batch).mean()

    # It would be reported nowhere, silently; Lightning refuses it too.
    refused(Wrong(), ConfigurationError, "metric", "on_step", "on_epoch", mode=mode)


def test_log_before_and_after_a_run(mode: str) -> None:
    task = Line()
    with pytest.raises(ConfigurationError) as error:
        task.log("metric", 1.0)
    sentence(error, "Line", "fit")
    quiet_trainer(mode=mode, max_epochs=1).fit(task, batches())
    with pytest.raises(ConfigurationError) as error:
        task.log("metric", 1.0)
    sentence(error, "log", "outside")


@pytest.mark.parametrize("hook", ["on_fit_start", "setup"])
def test_log_in_a_hook_where_nothing_runs_yet(hook: str) -> None:
    def early(self: Any, *_: Any) -> None:
        self.log("metric", 1.0)

    task = type("Early", (Line,), {hook: early})()
    refused(task, ConfigurationError, "log", "outside")


@pytest.mark.parametrize("hook", ["on_train_end", "on_validation_end", "on_fit_end"])
def test_a_metric_is_refused_or_reported_but_never_lost(mode: str, hook: str) -> None:
    def late(self: Any, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            self.log("metric", 7.0)

    task = type("Late", (Line,), {hook: late})()
    trainer = quiet_trainer(mode=mode, max_epochs=1, num_sanity_val_steps=0)
    try:
        trainer.fit(task, batches(), batches(1))
    except ConfigurationError as error:
        assert "log" in str(error)
    else:
        assert trainer.callback_metrics["metric"] == 7.0


def test_a_python_number_logged_in_a_compiled_step_warns_that_it_stays() -> None:
    class Frozen(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("metric", 1.5)
            return self.layer(batch).mean()

    with pytest.warns(UserWarning, match="metric.*once"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Frozen(), batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_trainer(mode="eager", max_epochs=1).fit(Frozen(), batches())


# ---------------------------------------------------------------------- before a run


@pytest.mark.parametrize("name", ["trainer", "optimizer", "device", "current_epoch", "global_step"])
def test_a_task_without_a_trainer(name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        getattr(Line(), name)
    sentence(error, "Line", "fit")


@pytest.mark.parametrize("name", ["optimizer", "rates"])
def test_what_a_trainer_has_only_from_fit_on(name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        getattr(quiet_trainer(), name)
    sentence(error, "fit")


def test_saving_before_there_is_anything_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer().save_checkpoint(tmp_path / "weights")
    sentence(error, "fit")


def test_a_misspelt_layer_is_one_error(mode: str) -> None:
    class Typo(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layr(batch).mean()

    with pytest.raises((AttributeError, OFEngineError), match="layr") as error:
        quiet_trainer(mode=mode, max_epochs=1).fit(Typo(), batches(1))
    chain, each = [], error.value
    while each is not None:
        chain.append(type(each))
        each = each.__cause__ or each.__context__
    assert KeyError not in chain


def test_task_trainer_does_not_hide_a_misspelt_attribute() -> None:
    task = Line()
    quiet_trainer(max_epochs=1).fit(task, batches())
    with pytest.raises(AttributeError, match="trainerr"):
        task.trainerr  # noqa: B018


# ---------------------------------------------------------------------- a graph of one's own


class OwnGraph(nn.Graph):
    """The cookbook's way to write a graph."""

    def __init__(self, task: TaskModule, optimizer: Any) -> None:
        super().__init__()
        self.layer = task.layer
        if optimizer is not None:
            self.add_optimizer(optimizer)

    def build(self, batch: Any) -> Any:
        loss = self.layer(batch).mean()
        loss.backward()
        return loss


def with_graph(make: Callable[[Any], Any]) -> TaskModule:
    task: TaskModule = type("Own", (Line,), {"build_graph": lambda self: make(self)})()
    return task


@pytest.mark.parametrize("returned", [None, 5, OwnGraph])
def test_build_graph_that_returns_no_graph(returned: Any) -> None:
    task = with_graph(lambda task: returned)
    refused(task, ConfigurationError, "build_graph", "nn.Graph", mode="graph")


def test_build_graph_without_the_optimizer() -> None:
    task = with_graph(lambda task: OwnGraph(task, None))
    refused(task, ConfigurationError, "OwnGraph", r"add_optimizer\(", mode="graph")


def test_build_graph_with_another_optimizer() -> None:
    task = with_graph(lambda task: OwnGraph(task, sgd(task)))
    refused(task, ConfigurationError, "OwnGraph", r"add_optimizer\(", mode="graph")


def test_a_graph_of_one_s_own_without_backward() -> None:
    class Forgot(OwnGraph):
        def build(self, batch: Any) -> Any:
            return self.layer(batch).mean()

    task = with_graph(lambda task: Forgot(task, task.optimizer))
    refused(task, OFEngineError, "Forgot", "backward", mode="graph")


@pytest.mark.parametrize("returned", [None, {}, ()])
def test_a_graph_of_one_s_own_without_a_loss(returned: Any) -> None:
    class Forgot(OwnGraph):
        def build(self, batch: Any) -> Any:
            self.layer(batch).mean().backward()
            return returned

    task = with_graph(lambda task: Forgot(task, task.optimizer))
    refused(task, OFEngineError, "loss", mode="graph")


def test_a_graph_of_one_s_own_that_returns_a_vector() -> None:
    class Vector(OwnGraph):
        def build(self, batch: Any) -> Any:
            self.layer(batch).mean().backward()
            return batch

    task = with_graph(lambda task: Vector(task, task.optimizer))
    refused(task, OFEngineError, r"loss", r"\(2, 2\)", mode="graph")


def test_one_graph_object_for_two_shapes_of_batch() -> None:
    made: List[Any] = []

    def once(task: Any) -> Any:
        if not made:
            made.append(OwnGraph(task, task.optimizer))
        return made[0]

    refused(
        with_graph(once), ConfigurationError, "build_graph", r"new|anew|each",
        mode="graph", train=[flow.ones(2, 2), flow.ones(1, 2)], trained=1,
    )  # fmt: skip


def test_accumulation_with_a_graph_of_one_s_own() -> None:
    refused(
        with_graph(lambda task: OwnGraph(task, task.optimizer)),
        ConfigurationError, "accumulate_grad_batches=2", "build_graph",
        mode="graph", accumulate_grad_batches=2,
    )  # fmt: skip


def test_clipping_with_a_graph_of_one_s_own() -> None:
    refused(
        with_graph(lambda task: OwnGraph(task, task.optimizer)),
        ConfigurationError, "gradient_clip_val", "OwnGraph|build_graph",
        mode="graph", gradient_clip_val=1.0,
    )  # fmt: skip


# ---------------------------------------------------------------------- what a trace cannot do


def in_a_step(use: Callable[[Any, Any, int], Any]) -> TaskModule:
    """A task whose training step does ``use(task, batch, batch_idx)`` on the side."""

    class Uses(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            use(self, batch, batch_idx)
            return self.layer(batch).mean()

    return Uses()


def line_of(function: Any) -> str:
    """``file:line`` of a function written in one line."""
    code = function.__code__
    return re.escape(f"{code.co_filename}:{code.co_firstlineno}")


READS: List[Callable[[Any, Any, int], Any]] = [
    lambda task, batch, index: batch.mean().item(),
    lambda task, batch, index: batch.numpy(),
    lambda task, batch, index: float(batch.mean()),
    lambda task, batch, index: int(batch.mean()),
    lambda task, batch, index: 1 if batch.sum() > 0 else 2,
    lambda task, batch, index: f"{batch.sum()}",
    lambda task, batch, index: batch.tolist(),
    lambda task, batch, index: batch[batch > 0],
    lambda task, batch, index: batch.nonzero(),
]


@pytest.mark.parametrize("read", READS)
def test_reading_a_tensor_in_a_compiled_step_names_the_line(
    read: Callable[[Any, Any, int], Any],
) -> None:
    refused(
        in_a_step(read), GraphModeError,
        r"training_step", line_of(read), r'mode="eager"', mode="graph",
    )  # fmt: skip


USES_OF_THE_INDEX: List[Callable[[Any, Any, int], Any]] = [
    lambda task, batch, index: index == 0,
    lambda task, batch, index: index % 2,
    lambda task, batch, index: not index,
    lambda task, batch, index: f"{index}",
    lambda task, batch, index: "%d" % index,  # noqa: UP031
    lambda task, batch, index: batch * index,
    lambda task, batch, index: index * batch,
    lambda task, batch, index: flow.pow(batch, index),
    lambda task, batch, index: batch[index],
    lambda task, batch, index: [1, 2][index],
    lambda task, batch, index: {0: 1}[index],
    lambda task, batch, index: range(index),
    lambda task, batch, index: max(index, 1),
    lambda task, batch, index: abs(index),
    lambda task, batch, index: 2**index,
    lambda task, batch, index: 1 << index,
    lambda task, batch, index: flow.tensor(index),
    lambda task, batch, index: task.log("index", index),
]


@pytest.mark.parametrize("use", USES_OF_THE_INDEX)
def test_no_use_of_batch_idx_in_a_compiled_step_is_frozen_silently(
    use: Callable[[Any, Any, int], Any],
) -> None:
    refused(in_a_step(use), GraphModeError, r"batch_idx", line_of(use), mode="graph")


def test_adding_batch_idx_to_a_tensor_in_a_compiled_step_neither_freezes_it_nor_crashes(
    tmp_path: Path,
) -> None:
    # OneFlow crashes where something that is neither tensor nor number is added to a tensor.
    script = tmp_path / "adds.py"
    script.write_text(
        """
from helpers import quiet_trainer
import oneflow as flow
from oneflow import nn
from ofengine import Callback, GraphModeError, TaskModule

class Adds(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return {"loss": self.layer(batch).mean(), "sum": (batch + batch_idx).mean()}

class Prints(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        print(float(outputs["sum"]), flush=True)

try:
    quiet_trainer(mode="graph", max_epochs=1, callbacks=Prints()).fit(Adds(), [flow.ones(1, 2)] * 3)
except GraphModeError as error:
    print("refused:", error)
"""
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    if lines != ["1.0", "2.0", "3.0"]:
        (line,) = lines
        assert line.startswith("refused: batch_idx")


@pytest.mark.parametrize(
    "use",
    [
        lambda task, batch, index: task.current_epoch,
        lambda task, batch, index: task.global_step,
        lambda task, batch, index: task.trainer.current_epoch,
        lambda task, batch, index: task.trainer.global_step,
    ],
)
def test_progress_read_in_a_compiled_step_is_not_frozen_silently(
    use: Callable[[Any, Any, int], Any],
) -> None:
    refused(
        in_a_step(use), GraphModeError, r"current_epoch|global_step", line_of(use), mode="graph"
    )


def test_batch_idx_may_be_passed_on_unused_and_used_in_eager_mode(mode: str) -> None:
    class Passes(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Line.training_step(self, batch, batch_idx)

    quiet_trainer(mode=mode, max_epochs=1).fit(Passes(), batches())
    for use in USES_OF_THE_INDEX:
        quiet_trainer(mode="eager", max_epochs=1).fit(in_a_step(use), batches(1))


@pytest.mark.parametrize(
    "use",
    [
        lambda task, batch, index: 1 / 0,
        lambda task, batch, index: int("mine"),
        lambda task, batch, index: task.no_such_thing,
        lambda task, batch, index: task.layer(batch[:, :1]),
    ],
)
def test_a_plain_bug_in_a_compiled_step_is_shown_with_its_line(
    use: Callable[[Any, Any, int], Any],
) -> None:
    task = in_a_step(use)
    with pytest.raises(Exception) as eager:
        quiet_trainer(max_epochs=1).fit(task, batches())
    refused(task, GraphModeError, line_of(use), type(eager.value).__name__, mode="graph")


def test_reading_a_tensor_in_validation_suggests_eager_validation_alone() -> None:
    class Reads(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", batch.mean().item())

    refused(
        Reads(), GraphModeError, r"validation_step", r"test_mistakes\.py:\d+", r'eval_mode="eager"',
        mode="graph", validation=batches(),
    )  # fmt: skip


def test_a_validation_step_that_returns_what_no_graph_can_return() -> None:
    class Returns(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"thing": object()}

    text = refused(
        Returns(), OFEngineError, "validation_step", "return", mode="graph", validation=batches()
    )
    assert "a batch holds" not in text  # it is not the batch


def test_the_sanity_check_finds_a_mistake_in_validation_before_training(mode: str) -> None:
    class Wrong(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("metric", batch)

    refused(Wrong(), ConfigurationError, "metric", mode=mode, validation=batches())


def test_a_numpy_array_in_a_batch_of_a_graph() -> None:
    array = np.ones((2, 2), dtype="float32")
    for batch in (array, (flow.ones(2, 2), array), {"x": [array]}, array[0, 0]):
        refused(Line(), DataError, "numpy", r"from_numpy|tensor", mode="graph", train=[batch])


@pytest.mark.parametrize("thing", [object(), {1, 2}, b"bytes"])
def test_another_thing_in_a_batch_of_a_graph(thing: Any) -> None:
    refused(
        Line(),
        DataError,
        type(thing).__name__,
        "tensor",
        mode="graph",
        train=[(thing, flow.ones(2))],
    )


def test_a_batch_whose_strings_change_does_not_compile_for_each_batch_in_silence() -> None:
    class Named(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean()

    data = [(flow.ones(2, 2), [f"image{index}.png"]) for index in range(12)]
    compiled: List[int] = []

    class Compiles(Callback):
        def on_before_graph_compile(self, *_: Any) -> None:
            compiled.append(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(mode="graph", max_epochs=1, callbacks=Compiles())
        trainer.fit(Named(), data)
    warned = [str(each.message) for each in caught if "compil" in str(each.message)]
    assert len(compiled) < 12 or warned, f"{len(compiled)} compilations, and not a word about it"


# ---------------------------------------------------------------------- rates and callbacks


class ChangesTheRate(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 0.5


def test_changing_lr_by_hand_in_eager_mode() -> None:
    refused(
        Line(), RateError, r"'all'", r"0\.1", r"0\.5", r"lr_decay_scale|scheduler",
        callbacks=[ChangesTheRate()], trained=1,
    )  # fmt: skip


def test_changing_lr_by_hand_in_graph_mode_is_not_ignored_silently() -> None:
    # There it would have no effect at all.
    refused(
        Line(), RateError, r"'all'", r"0\.1", r"0\.5", mode="graph",
        callbacks=[ChangesTheRate()], trained=1,
    )  # fmt: skip


class LoadsAnOptimizer(Callback):
    """Its state_dict has another rate, and OneFlow makes new groups of it."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        state = trainer.optimizer.state_dict()
        state["param_groups"][0]["_options"]["lr"] = 0.5
        trainer.optimizer.load_state_dict(state)


def test_loading_an_optimizer_s_state_in_mid_run_changes_no_rate_silently(mode: str) -> None:
    refused(
        Line(), RateError, r"'all'", r"0\.1", r"0\.5", mode=mode,
        callbacks=[LoadsAnOptimizer()], trained=1,
    )  # fmt: skip


class InTurn(TaskModule):
    """Two groups under a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.first(batch) + self.second(batch)).mean()

    def param_groups(self) -> Any:
        return [{"params": layer.parameters(), "lr": 0.1} for layer in (self.first, self.second)]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups())
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 1 / (1 + step)}


class ChangesGroups(Callback):
    def __init__(self, change: Callable[[List[Any]], List[Any]]) -> None:
        self.change = change

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.optimizer.param_groups = self.change(trainer.optimizer.param_groups)


@pytest.mark.parametrize(
    ("change", "count"), [(lambda g: g[:1], 1), (lambda g: [], 0), (lambda g: [*g, g[0]], 3)]
)
def test_another_number_of_groups_in_mid_run(
    mode: str, change: Callable[[List[Any]], List[Any]], count: int
) -> None:
    refused(
        InTurn(), RateError, f"{count} parameter groups instead of 2", "param_groups",
        mode=mode, callbacks=[ChangesGroups(change)], trained=1,
    )  # fmt: skip


def test_a_group_that_is_replaced_in_its_list_is_under_the_plan_too() -> None:
    class Replaces(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, idx: int) -> None:
            groups, own = trainer.optimizer.param_groups, trainer.optimizer._default_options
            if idx == 1:
                old = groups[0]
                groups[0] = type(old)({"params": old.parameters, **old.options}, own)

    used: List[Tuple[float, float]] = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            live = trainer.optimizer.param_groups[0]["lr"]
            used.append((live, trainer.rates.rates(trainer.global_step)[0]))

    quiet_trainer(max_epochs=1, callbacks=[Replaces(), Notes()]).fit(InTurn(), batches(5))
    assert len({live for live, _ in used}) == 5
    assert [live for live, _ in used] == [planned for _, planned in used]


@pytest.mark.parametrize("kind", [LRDecayCallback, GraphLRScaleCallback])
@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True])
def test_every_n_batches_of_a_rate_callback(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        kind(every_n_batches=value)
    sentence(error, kind.__name__, "every_n_batches", re.escape(repr(value)))


@pytest.mark.parametrize("kind", [LRDecayCallback, GraphLRScaleCallback])
@pytest.mark.parametrize("key", ["lr", "lr_decay", "", 5])
def test_the_key_of_a_rate_callback(kind: Any, key: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        kind(key=key)
    sentence(error, kind.__name__, "key", "lr_decay_scale", "lr_scale")


@pytest.mark.parametrize("kind", [LRDecayCallback, GraphLRScaleCallback])
@pytest.mark.parametrize("value", ["no", 2, "epoch"])
def test_per_epoch_of_a_rate_callback(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        kind(per_epoch=value)
    sentence(error, kind.__name__, "per_epoch")


PAIRS: List[Tuple[Callable[[], List[Callback]], str]] = [
    (lambda: [LRDecayCallback(5), GraphLRScaleCallback(7)], "5.*7"),
    (lambda: [LRDecayCallback(key="lr_scale"), GraphLRScaleCallback(key="lr_decay_scale")], "lr_"),
    (lambda: [LRDecayCallback(per_epoch=False), GraphLRScaleCallback(per_epoch=True)], "per_epoch"),
    (lambda: [LRDecayCallback(5), LRDecayCallback(7)], "5.*7"),
]


@pytest.mark.parametrize(("pair", "hint"), PAIRS)
def test_a_pair_that_disagrees(mode: str, pair: Callable[[], List[Callback]], hint: str) -> None:
    refused(Line(), RateError, "LRDecayCallback", "disagree", hint, mode=mode, callbacks=pair())


def test_a_callback_s_class_instead_of_an_object() -> None:
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(callbacks=[LRDecayCallback])
    sentence(error, "LRDecayCallback", "call")


def test_a_misspelt_hook_is_pointed_out() -> None:
    class Typo(Callback):
        def on_train_epoch_begin(self, trainer: Any, task: Any) -> None:
            pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            quiet_trainer(max_epochs=1, callbacks=Typo()).fit(Line(), batches(1))
        except ConfigurationError as error:
            assert "on_train_epoch_begin" in str(error)
            return
    assert [each for each in caught if "on_train_epoch_begin" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("configure_optimizer", "configure_optimizers"),
        ("param_group", "param_groups"),
        ("val_dataloaders", "val_dataloader"),
        ("configure_graphs", "configure_graph"),
        ("validation_steps", "validation_step"),
    ],
)
def test_a_misspelt_method_is_pointed_out(name: str, meant: str) -> None:
    def step(self: Any, batch: Any) -> Any:
        return self.layer(batch).mean()

    task = type("Typo", (Bare,), {"training_step": step, name: lambda self, *_: None})()
    with pytest.warns(OFEngineWarning, match=f"Typo.{name} .*did you mean {meant}[?]"):
        quiet_trainer(max_epochs=1).fit(task, batches(1))


def test_a_method_of_the_user_s_own_is_no_misspelt_one() -> None:
    """Neither one with a name of its own, nor one beside the method it might be mistaken for."""

    class Own(Line):
        def param_group(self, part: Any) -> Any:
            return {"params": part.parameters(), "lr": 0.1}

        def param_groups(self) -> Any:
            return [self.param_group(self.layer)]

        def train_step(self, batch: Any) -> Any:
            return self.layer(batch).mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.train_step(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_trainer(max_epochs=1).fit(Own(), batches(1))


class OnInstances:
    """A descriptor that the class itself does not have."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            raise AttributeError("instances only")
        return 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_param_groups", lambda self: self.parameters()),
        ("param_group", lambda self: self.parameters()),
        ("_predict_step", lambda self: None),
        ("build_graphs", lambda self: None),
        ("test_steps", 5),
        ("test_steps", OnInstances()),
        ("val_dataloaders", property(lambda self: None)),
        ("configure_graphs", nn.Linear(1, 1)),
    ],
)
def test_names_that_only_look_like_the_engine_s(name: str, value: Any) -> None:
    """A helper of one's own ``configure_optimizers``, and what is no method at all."""
    task = type("Own", (Line,), {name: value})()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_trainer(max_epochs=1).fit(task, batches(1))


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", "", 0, None, "mps"])
def test_a_device_that_is_none(device: Any) -> None:
    with pytest.raises(DeviceError) as error:
        Trainer(device=device, logger=False)
    sentence(error, "device", re.escape(repr(device)), '"cuda', '"auto"')


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(flow.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(flow.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pretend(monkeypatch, 0)
    with pytest.raises(DeviceError) as error:
        Trainer(device=device, logger=False)
    sentence(error, re.escape(repr(device)), "no GPU", '"auto"|"cpu"', "doctor")


def test_a_gpu_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    with pytest.raises(DeviceError) as error:
        Trainer(device="cuda:2", logger=False)
    sentence(error, "cuda:2", "2 GPU", "cuda:1")


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_the_device_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: str
) -> None:
    pretend(monkeypatch, gpus)
    chosen = quiet_trainer(device=device).device
    kind, _, index = expected.partition(":")
    assert (chosen.type, chosen.index) == (kind, int(index or 0))


# ---------------------------------------------------------------------- parameter groups


def grouped(groups: Callable[[Any], Any]) -> TaskModule:
    task: TaskModule = type("Grouped", (Line,), {"param_groups": lambda self: groups(self)})()
    return task


GROUPS: List[Tuple[str, Callable[[Any], Any], Optional[str]]] = [
    ("a parameter forgotten", lambda t: [{"params": [t.layer.weight]}], "'layer.bias'"),
    (
        "a parameter twice",
        lambda t: [
            {"name": "a", "params": t.parameters()},
            {"name": "b", "params": [t.layer.bias]},
        ],
        "'layer.bias'.*'a'.*'b'",
    ),
    (
        "a misspelt key",
        lambda t: [{"params": t.parameters(), "lr_scal": 0.1}],
        "'lr_scal'.*'lr_scale'",
    ),
    ("a negative scale", lambda t: [{"params": t.parameters(), "lr_scale": -1.0}], "lr_scale=-1"),
    ("a rate as text", lambda t: [{"params": t.parameters(), "lr": "0.1"}], "lr='0.1'"),
    ("not a number", lambda t: [{"params": t.parameters(), "lr": float("nan")}], "lr=nan"),
    (
        "one name twice",
        lambda t: [
            {"name": "a", "params": [t.layer.bias]},
            {"name": "a", "params": [t.layer.weight]},
        ],
        "'a'",
    ),
    ("a name that is no text", lambda t: [{"name": 3, "params": t.parameters()}], "name=3"),
    (
        "a parameter of another model",
        lambda t: [{"params": [*t.parameters(), nn.Parameter(flow.ones(3))]}],
        r"\(3,\)",
    ),
]


@pytest.mark.parametrize(
    ("groups", "hint"), [pytest.param(make, hint, id=name) for name, make, hint in GROUPS]
)
def test_parameter_groups_with(mode: str, groups: Callable[[Any], Any], hint: str) -> None:
    refused(grouped(groups), RateError, hint, mode=mode)
