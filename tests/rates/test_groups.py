"""The check of the parameter groups: every mistake that OneFlow lets pass without a word."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List, Optional

import oneflow as flow
import pytest
from helpers import quiet_trainer, weights_of
from hypothesis import given, strategies as st
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine.errors import OFEngineWarning
from ofengine.rates.groups import check_groups


class Net(TaskModule):
    """Three modules, the last of them a pooling layer without parameters."""

    def __init__(self, groups: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)
        self.pool = nn.Identity()
        self.groups = groups
        self.called: List[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.called.append(1)
        return self.head(self.body(batch)).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        return self.groups(self) if self.groups else super().param_groups()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.5)


def check(task: TaskModule, optimizer: Optional[Any] = None) -> Any:
    """The groups of ``task``; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_groups(task, optimizer or task.configure_optimizers())


def halves(**keys: Any) -> Any:
    """Two good groups, with ``keys`` added to the second."""
    return lambda task: [
        {"name": "body", "params": task.body.parameters()},
        {"name": "head", "params": task.head.parameters(), **keys},
    ]


# ---------------------------------------------------------------------- what is good


def test_good_groups_are_described_in_order() -> None:
    """Names, rates and sizes come out as they were written, defaults filled in."""
    first, second = check(Net(halves(lr=0.1, lr_scale=0.2, lr_decay_scale=0.9)))
    assert (first.name, first.lr, first.lr_scale, first.lr_decay_scale) == ("body", 0.5, 1.0, 1.0)
    assert (first.tensors, first.numbers, first.declares_scale) == (4, 2 * 3 + 3 + 3 + 3, False)
    assert (second.name, second.lr, second.lr_scale) == ("head", 0.1, 0.2)
    assert (second.lr_decay_scale, second.declares_scale) == (0.9, True)
    assert (second.tensors, second.numbers) == (2, 4)


def test_the_default_is_one_group_of_all_trainable_parameters() -> None:
    """A task without ``param_groups`` trains everything that is not frozen."""
    task = Net()
    task.body[0].weight.requires_grad_(False)
    (group,) = check(task)
    assert (group.name, group.tensors) == ("all", 5)


def test_groups_without_names_are_numbered() -> None:
    """The cookbook's groups have no names: they are called group_0, group_1, ..."""
    task = Net(
        lambda task: [{"params": task.body.parameters()}, {"params": task.head.parameters()}]
    )
    assert [group.name for group in check(task)] == ["group_0", "group_1"]


@pytest.mark.parametrize(
    "optimizer, keys",
    [
        ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "dampening": 0.0}),
        ("Adam", {"betas": (0.9, 0.99), "eps": 1e-6, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.1, "do_bias_correction": False}),
        ("RMSprop", {"alpha": 0.9, "centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("Adadelta", {"rho": 0.9}),
        ("LAMB", {"adam_w_mode": False}),
        ("SGD", {"clip_grad_max_norm": 1.0, "clip_grad_norm_type": 2.0}),
    ],
)
def test_every_option_of_the_optimizer_is_known(optimizer: str, keys: Dict[str, Any]) -> None:
    """A group may have any option of its optimizer, and no warning comes of it."""
    task = Net(halves(**keys))
    check(task, getattr(flow.optim, optimizer)(task.param_groups()))


def test_frozen_parameters_need_no_group() -> None:
    """What is frozen may be left out."""
    task = Net(lambda task: [{"params": task.head.parameters()}])
    for parameter in task.body.parameters():
        parameter.requires_grad_(False)
    check(task)


def test_tied_parameters_are_one_parameter() -> None:
    """A parameter under two names in the task is trained once, in one group."""
    task = Net(lambda task: [{"params": task.parameters()}])
    task.second_head = nn.Linear(3, 1)
    task.second_head.weight = task.head.weight
    (group,) = check(task)
    assert group.tensors == 7


# ---------------------------------------------------------------------- parameters


def test_an_orphan_is_named_and_found_before_training(mode: str) -> None:
    """A trainable parameter in no group would never train."""
    task = Net(lambda task: [{"params": task.body.parameters()}])
    before = weights_of(task)
    with pytest.raises(RateError, match=r"2 trainable parameter.*'head.weight', 'head.bias'"):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.ones(2, 2)])
    assert not task.called
    assert all((before[name] == array).all() for name, array in weights_of(task).items())


def test_many_orphans_are_counted() -> None:
    """Not every name of a large module is listed."""
    task = Net(lambda task: [{"params": task.head.parameters()}])
    task.more = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    with pytest.raises(RateError, match=r"44 trainable.*and 40 more"):
        check(task)


class Classifier(Net):
    """As the cookbook's model: ``classifier`` is trained, ``classifer`` was meant to be."""

    def __init__(self, typo: str, real: str) -> None:
        super().__init__(lambda task: [{"params": getattr(task.model, real).parameters()}])
        del self.body, self.head
        self.model = nn.Module()
        setattr(self.model, real, nn.Sequential(nn.Linear(2, 2)))
        setattr(self.model, typo, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "typo, real",
    [("classifer", "classifier"), ("clasifier", "classifier"), ("faetures", "features")],
)
def test_the_cookbook_s_typo_is_hinted_at(typo: str, real: str) -> None:
    """An orphan beside a module of almost the same name: perhaps it was meant."""
    with pytest.raises(RateError) as caught:
        check(Classifier(typo, real))
    assert f"'model.{typo}.0.weight'" in str(caught.value)
    assert f"'model.{typo}' stands beside 'model.{real}'" in str(caught.value)


@pytest.mark.parametrize("one, other", [("layer1", "layer2"), ("encoder", "decoder_norm")])
def test_no_hint_where_there_is_no_typo(one: str, other: str) -> None:
    """Numbered layers, and names that differ, are no misspellings of each other."""
    with pytest.raises(RateError) as caught:
        check(Classifier(one, other))
    assert "misspelling" not in str(caught.value)


def test_a_parameter_in_two_groups_is_named_with_both() -> None:
    """Eager mode would step it twice, graph mode would abort the process."""
    task = Net(
        lambda task: [
            {"name": "all", "params": task.parameters()},
            {"name": "head", "params": task.head.parameters()},
        ]
    )
    with pytest.raises(RateError, match=r"'head.weight'.*'all' and 'head'"):
        check(task)


def test_a_parameter_twice_in_one_group_is_named() -> None:
    """The same within one group."""
    task = Net(
        lambda task: [
            {"name": "both", "params": [*task.parameters(), task.head.bias]},
        ]
    )
    with pytest.raises(RateError, match=r"'head.bias'.*'both'"):
        check(task)


def test_graph_mode_does_not_reach_the_abort() -> None:
    """With a duplicate, graph mode raises too and the process lives on."""
    task = Net(lambda task: [{"params": [*task.parameters(), task.head.bias]}])
    with pytest.raises(RateError):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, [flow.ones(2, 2)])


def test_a_parameter_that_is_not_the_task_s() -> None:
    """A group's parameter that no attribute of the task holds is not trained in graph mode."""
    stranger = nn.Linear(5, 7)
    task = Net(lambda task: [{"params": task.parameters()}, {"params": stranger.parameters()}])
    with pytest.raises(RateError, match=r"'group_1'.*\(7, 5\).*not part of Net"):
        check(task)


def test_a_frozen_parameter_in_a_group_is_warned_of_by_name() -> None:
    """``requires_grad=False`` in a group: it will not train."""
    task = Net(halves())
    task.head.bias.requires_grad_(False)
    with pytest.warns(OFEngineWarning, match=r"'head' holds 1 frozen.*'head.bias'"):
        check_groups(task, task.configure_optimizers())


def test_an_empty_group_is_warned_of_by_name() -> None:
    """As the cookbook's pooling layer: the group exists, and holds nothing."""
    task = Net(lambda t: [*halves()(t), {"name": "pooling", "params": t.pool.parameters()}])
    with pytest.warns(OFEngineWarning, match="'pooling' is empty") as caught:
        groups = check_groups(task, task.configure_optimizers())
    assert len(caught) == 1
    assert (groups[2].tensors, groups[2].numbers) == (0, 0)


def test_a_warning_points_at_the_user_s_line() -> None:
    """Warnings name the file in which ``fit`` was called, not one of the engine's."""
    task = Net(lambda t: [*halves()(t), {"name": "pooling", "params": t.pool.parameters()}])
    with pytest.warns(OFEngineWarning) as caught:
        quiet_trainer(max_epochs=1).fit(task, [flow.ones(2, 2)])
    assert [warning.filename for warning in caught] == [__file__]


# ---------------------------------------------------------------------- keys and values


@pytest.mark.parametrize(
    "key, meant",
    [
        ("lr_scal", "lr_scale"),
        ("lrscale", "lr_scale"),
        ("lr_sclae", "lr_scale"),
        ("LR_scale", "lr_scale"),
        ("lr_scaling", "lr_scale"),
        ("lr_decay_scal", "lr_decay_scale"),
        ("lr_decayscale", "lr_decay_scale"),
        ("decay_scale", "lr_decay_scale"),
        ("momentun", "momentum"),
        ("weight_deacy", "weight_decay"),
        ("nme", "name"),
    ],
)
def test_a_misspelt_key_is_an_error_that_says_what_was_meant(key: str, meant: str) -> None:
    """OneFlow takes any key and reads only its own."""
    with pytest.raises(RateError, match=f"'head' has the key '{key}'.*did you mean '{meant}'"):
        check(Net(halves(**{key: 0.5})))


@pytest.mark.parametrize("key", ["tag", "stage_of_training", "frozen_until"])
def test_an_unknown_key_that_resembles_none_is_warned_of(key: str) -> None:
    """Perhaps the user reads it himself: a warning that names key and group."""
    task = Net(halves(**{key: 3}))
    with pytest.warns(OFEngineWarning, match=f"'head' has the key '{key}'.*no effect"):
        check_groups(task, task.configure_optimizers())


BAD_NUMBERS = [-0.1, -1, float("nan"), float("inf"), float("-inf"), "0.1", True, None, [0.1]]


@pytest.mark.parametrize("key", ["lr", "lr_scale", "lr_decay_scale"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_a_rate_or_scale_that_is_no_proper_number(key: str, value: Any) -> None:
    """Negative, not finite, or no number at all: an error that names group, key and value."""
    task = Net(halves())
    optimizer = task.configure_optimizers()
    optimizer.param_groups[1].options[key] = value  # OneFlow lets all of these pass
    with pytest.raises(RateError) as caught:
        check(task, optimizer)
    assert f"group 'head' has {key}={value!r}" in str(caught.value)


@given(value=st.floats(0, 1e6), key=st.sampled_from(["lr", "lr_scale", "lr_decay_scale"]))
def test_any_finite_number_from_0_on_is_fine(value: float, key: str) -> None:
    """Zero, tiny and huge ones too; it comes out as it was written."""
    group = check(Net(halves(**{key: value})))[1]
    assert getattr(group, key) == value


def test_whole_numbers_are_numbers() -> None:
    """``lr=1`` and ``lr_scale=2`` need no point."""
    group = check(Net(halves(lr=1, lr_scale=2)))[1]
    assert (group.lr, group.lr_scale) == (1.0, 2.0)


def test_a_name_twice() -> None:
    """Two groups of one name could not be told apart in logs."""
    task = Net(
        lambda task: [
            {"name": "net", "params": task.body.parameters()},
            {"name": "net", "params": task.head.parameters()},
        ]
    )
    with pytest.raises(RateError, match="2 parameter groups are called 'net'"):
        check(task)


def test_a_name_that_another_group_has_by_its_number() -> None:
    """A group called group_1 beside the one that is called so for want of a name."""
    task = Net(
        lambda task: [
            {"name": "group_1", "params": task.body.parameters()},
            {"params": task.head.parameters()},
        ]
    )
    with pytest.raises(RateError, match="2 parameter groups are called 'group_1'"):
        check(task)


@pytest.mark.parametrize("name", ["", 7, None], ids=repr)
def test_a_name_that_is_no_text(name: Any) -> None:
    """A name is a text of at least one letter."""
    with pytest.raises(RateError, match="parameter group 1 has name="):
        check(Net(halves(name=name)))


def test_the_base_rate_under_a_scheduler_is_the_group_s_own() -> None:
    """A scheduler has written into ``lr`` when the check comes: ``initial_lr`` counts."""
    task = Net(halves(lr=0.25))
    optimizer = task.configure_optimizers()
    flow.optim.lr_scheduler.WarmUpLR(optimizer, warmup_factor=0.1, warmup_iters=5)
    assert optimizer.param_groups[1]["lr"] == 0.025
    groups = check_groups(task, optimizer, scheduled=True)
    assert [group.lr for group in groups] == [0.5, 0.25]


def test_oneflow_never_trains_a_parameter_that_is_not_contiguous_so_it_is_refused() -> None:
    weight = nn.Parameter(flow.ones(3, 4).t())
    optimizer = flow.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert set(weight.numpy().ravel()) == {1.0}

    class Turned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(flow.ones(3, 4).t())

    with pytest.raises(
        RateError, match=r"'turned' is not contiguous .* nn.Parameter\(turned\.cont"
    ):
        check(Turned())
    task = Turned()
    task.turned.requires_grad_(False)
    check(task)
