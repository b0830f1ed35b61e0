"""A user's mistakes end in one clear sentence, before training wherever it can be known."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple

import oneflow as flow
import pytest
from helpers import (
    Bare,
    Line,
    OfUnknownLength,
    batches,
    quiet_trainer,
    refused,
    sentence,
)
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import (
    Callback,
    ConfigurationError,
    DataError,
    DeviceError,
    OFEngineError,
    OFEngineWarning,
    RateError,
    TaskModule,
    Trainer,
)
from ofengine.callbacks import LRDecayCallback

# ---------------------------------------------------------------------- the training step


def test_no_training_step(mode: str) -> None:
    refused(Bare(), ConfigurationError, "Bare", "training_step", "def training_step", mode=mode)


RETURNS: List[Tuple[str, Callable[[Any], Any], str]] = [
    ("nothing", lambda loss: None, r"return"),
    ("a dict without loss", lambda loss: {"los": loss}, r"'loss'.*'los'"),
    ("an empty dict", lambda loss: {}, r"'loss' \(it has no keys\)"),
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
        pytest.param(lambda: {"train": 5}, id="a dict of no loaders"),
        pytest.param(lambda: DataLoader, id="the class"),
        pytest.param(lambda: batches, id="a function"),
    ],
)
def test_what_is_no_dataloader(data: Callable[[], Any]) -> None:
    refused(Line(), DataError, "train_dataloader", "DataLoader", train=data())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: {"val": 5}, id="a dict of no loaders"),
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


# ---------------------------------------------------------------------- log


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        pytest.param(lambda batch: batch, r"\(2, 2\).*mean", id="a matrix"),
        pytest.param(lambda batch: "hello", "str", id="a string"),
        pytest.param(lambda batch: {"a": 1.0}, "log_dict", id="a dict"),
        pytest.param(lambda batch: None, "the object itself", id="what a metric's update returns"),
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


@pytest.mark.parametrize(
    "name",
    ["trainer", "optimizer", "device", "current_epoch", "global_step", "logger", "loggers"],
)
def test_a_task_without_a_trainer(name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        getattr(Line(), name)
    assert "Lightning" not in sentence(error, "Line is not attached to a Trainer yet", "fit")


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


# ---------------------------------------------------------------------- callbacks and hooks


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
    monkeypatch.setattr(flow.cuda, "get_device_capability", lambda index: (8, 0))


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


class Global(TaskModule):
    """Its layer's weight, or else a buffer, lies on several devices as OneFlow sees it."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        everywhere = {"placement": flow.placement("cpu", [0]), "sbp": flow.sbp.broadcast}
        if part == "net.weight":
            self.net.to_global(**everywhere)
        else:
            self.register_buffer(part, flow.ones(2, **everywhere))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


@pytest.mark.parametrize("part", ["net.weight", "mean"])
def test_a_model_of_global_tensors_is_refused(mode: str, part: str) -> None:
    with pytest.raises(DeviceError, match=rf"'{part}' is a global tensor.*to_local\(\)"):
        quiet_trainer(mode=mode, max_epochs=1).fit(Global(part), [flow.ones(2, 2)])
