"""Groups tell of whatever can change a rate, a scale or the clipping in them."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine._oneflow.watched_options import WatchedOptions, set_quietly, watch_options


def adam(*options: Dict[str, Any]) -> flow.optim.Optimizer:
    parameters = [nn.Parameter(flow.ones(1)) for _ in options]
    groups = [{"params": [each], **given} for each, given in zip(parameters, options)]
    return flow.optim.Adam(groups, lr=0.5)


WRITES: Dict[str, Callable[[Any], Any]] = {
    "group[...] =": lambda group: group.__setitem__("lr", 0.5),
    "options[...] =": lambda group: group.options.__setitem__("lr_scale", 1.0),
    "setdefault": lambda group: group.setdefault("lr_scale", 2.0),
    "options.setdefault": lambda group: group.options.setdefault("lr_scale", 2.0),
    "update": lambda group: group.options.update(lr=3.0),
    "update from a dict": lambda group: group.options.update({"lr": 3.0}),
    "pop": lambda group: group.options.pop("lr"),
    "popitem": lambda group: group.options.popitem(),
    "del": lambda group: group.options.__delitem__("lr"),
    "clear": lambda group: group.options.clear(),
    "|=": lambda group: WatchedOptions.__ior__(group.options, {"lr": 1.0}),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_noted(name: str) -> None:
    optimizer = adam({}, {})
    mark = watch_options(optimizer)
    mark.rates = False
    WRITES[name](optimizer.param_groups[1])
    assert mark.rates


def test_every_way_to_change_a_dict_is_known() -> None:
    reads = {"copy", "fromkeys", "get", "items", "keys", "values"}
    own = {name for name in vars(WatchedOptions) if not name.startswith("__")}
    assert {name for name in dir(dict) if not name.startswith("__")} - reads <= own


def test_what_an_optimizer_writes_itself_is_not_noted() -> None:
    optimizer = adam({"lr": 0.25})
    mark = watch_options(optimizer)
    mark.rates = mark.clips = False
    (group,) = optimizer.param_groups
    group.parameters[0].sum().backward()
    optimizer.step()
    assert "bias_correction1" in group
    set_quietly(group.options, "lr", 0.125)
    assert not mark.rates
    assert not mark.clips
    assert group["lr"] == 0.125


def test_clipping_is_noted_where_a_group_has_it_or_gets_it() -> None:
    clipping = {"clip_grad_max_norm": 1.0, "clip_grad_norm_type": 2.0}
    assert watch_options(adam({}, clipping)).clips
    optimizer = adam({}, {})
    mark = watch_options(optimizer)
    assert not mark.clips
    optimizer.param_groups[1]["clip_grad_max_norm"] = 1.0
    assert mark.clips


def test_new_groups_get_the_mark_of_the_others() -> None:
    optimizer = adam({}, {})
    mark = watch_options(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(flow.ones(1))]})
    assert watch_options(optimizer) is mark
    mark.rates = False
    optimizer.param_groups[2]["lr"] = 9.0
    assert mark.rates


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), dict.copy,
             lambda each: each.copy()],
)  # fmt: skip
def test_a_copy_is_a_plain_dict(twin: Callable[[Any], Any]) -> None:
    optimizer = adam({"name": "one"})
    watch_options(optimizer)
    options = optimizer.param_groups[0].options
    assert type(options) is WatchedOptions
    assert type(twin(options)) is dict
    assert twin(options) == options


class Two(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(flow.ones(1)) for _ in range(2))

    def param_groups(self) -> Any:
        return [{"params": [each], "lr": 1.0} for each in (self.one, self.two)]

    def training_step(self, batch: Any) -> Any:
        return (self.one * batch + self.two * batch).sum()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups())


@pytest.mark.parametrize("number", [3, 4])
def test_a_rate_written_by_hand_is_refused(mode: str, number: int) -> None:
    class Writes(Two):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == number:
                self.trainer.optimizer.param_groups[1].options.update(lr=0.5)

    trainer = quiet_trainer(mode=mode, max_epochs=1)
    with pytest.raises(RateError, match=r"was changed by hand from 1 to 0\.5"):
        trainer.fit(Writes(), [flow.ones(1)] * 8)
    assert trainer.global_step == number + 2  # at the end of the step after it


def test_a_group_that_begins_to_clip_clips_from_the_next_step_on() -> None:
    class Clips(Two):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(self.two.item())
            if batch_idx == 1:
                group = self.trainer.optimizer.param_groups[1]
                group["clip_grad_norm_type"] = 2.0
                group["clip_grad_max_norm"] = 0.25

    seen = [1.0]
    quiet_trainer(mode="eager", max_epochs=1).fit(Clips(), [flow.ones(1)] * 4)
    moved = [before - after for before, after in zip(seen, seen[1:])]
    assert moved == pytest.approx([1.0, 1.0, 0.25, 0.25], abs=1e-5)
