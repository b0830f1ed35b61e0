"""Mistakes with optimizers, groups and rates end in one clear sentence."""

from __future__ import annotations

import re
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import oneflow as flow
import pytest
from helpers import (
    Line,
    batches,
    quiet_trainer,
    refused,
    sentence,
)
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import (
    Callback,
    ConfigurationError,
    OFEngineError,
    RateError,
    TaskModule,
)
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback

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


# ---------------------------------------------------------------------- parameter groups


def grouped(groups: Callable[[Any], Any]) -> TaskModule:
    task: TaskModule = type("Grouped", (Line,), {"param_groups": lambda self: groups(self)})()
    return task


GROUPS: List[Tuple[str, Callable[[Any], Any], Optional[str]]] = [
    ("no group", lambda t: [], r"an empty list.*param_groups\(\)"),
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


# ---------------------------------------------------------------------- while it trains


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
