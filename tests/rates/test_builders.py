"""The builders: groups by name, without weight decay, spread rates, freezing."""

from __future__ import annotations

import re
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from hypothesis import given, strategies
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine.rates import (
    by_pattern,
    freeze,
    layer_decay,
    no_weight_decay,
    rates,
    rates_between,
    unfreeze,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(flow.zeros(1, 3, 4))
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


@pytest.fixture
def model() -> Model:
    return Model()


def named(model: nn.Module, groups: List[Dict[str, Any]]) -> Dict[str, List[str]]:
    """The names of each group's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


# ---------------------------------------------------------------------- by_pattern


def test_groups_come_in_the_order_of_their_patterns(model: Model) -> None:
    groups = by_pattern(
        model,
        {
            "head.*": {},
            "backbone.*": {"lr_scale": 0.1, "weight_decay": 0.01},
            "pos_embed": {"name": "positions", "lr": 1e-4},
        },
    )
    assert named(model, groups) == {
        "head.*": ["head.weight", "head.bias"],
        "backbone.*": [
            *("backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"),
            *("backbone.2.weight", "backbone.2.bias"),
        ],
        "positions": ["pos_embed"],
    }
    assert [{k: v for k, v in g.items() if k not in ("name", "params")} for g in groups] == [
        {},
        {"lr_scale": 0.1, "weight_decay": 0.01},
        {"lr": 1e-4},
    ]


def test_patterns_may_be_regular_expressions(model: Model) -> None:
    patterns = {r"backbone\.[01]\..*": {}, r"backbone\.2\..*|head\..*|pos_embed": {}}
    expected = [4, 5]
    groups = by_pattern(model, patterns, regex=True)
    assert [len(group["params"]) for group in groups] == expected
    groups = by_pattern(model, {re.compile(each): {} for each in patterns})
    assert [len(group["params"]) for group in groups] == expected
    assert [group["name"] for group in groups] == list(patterns)
    # A glob may stand beside a compiled expression; both match the whole name.
    groups = by_pattern(model, {re.compile(r"head\.\w+"): {}, "[!h]*": {}})
    assert [len(group["params"]) for group in groups] == [2, 7]


def test_lr_of_the_builder_is_every_groups(model: Model) -> None:
    groups = by_pattern(model, {"head.*": {}, "[!h]*": {"lr_scale": 0.5}}, lr=1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3]


def test_frozen_parameters_are_left_out(model: Model) -> None:
    freeze(model.backbone, model.pos_embed)
    assert named(model, by_pattern(model, {"backbone.*": {}, "head.*": {}})) == {
        "head.*": ["head.weight", "head.bias"]
    }


def test_one_error_names_all_that_is_wrong_with_the_patterns(model: Model) -> None:
    with pytest.raises(RateError) as refused:
        by_pattern(model, {"backbone.*": {}, "*.bias": {}, "neck.*": {}, "head.b*": {}})
    assert str(refused.value) == (
        "each trainable parameter belongs to one pattern, but "
        "pattern 'neck.*' matches no parameter; "
        "no pattern matches 'pos_embed', 'head.weight'; "
        "several patterns match 'backbone.0.bias' ('backbone.*' and '*.bias'), "
        "'backbone.1.bias' ('backbone.*' and '*.bias'), "
        "'backbone.2.bias' ('backbone.*' and '*.bias'), "
        "'head.bias' ('*.bias' and 'head.b*'). "
        "The parameters of Model are called like 'pos_embed', 'backbone.0.weight', "
        "'backbone.0.bias' and 6 more."
    )


@pytest.mark.parametrize(
    ("patterns", "options", "message"),
    [
        ({}, {}, "has no patterns"),
        ({"*": {"lr": 0.1}}, {"lr": 0.2}, r"group '\*' has lr=0.1, and by_pattern\(lr=...\) sets"),
        ({"*": {"params": []}}, {}, "has params of its own"),
        ({"*": 0.1}, {}, "has 0.1 for its options"),
        ({"(": {}}, {"regex": True}, r"'\(' is no regular expression"),
        (
            {"head.*": {"name": "a"}, "[!h]*": {"name": "a"}},
            {},
            "2 groups are called 'a'",
        ),
        ({"*": {"lr_scale": -1.0}}, {}, r"group '\*' has lr_scale=-1.0"),
        ({"*": {"lr": float("nan")}}, {}, r"group '\*' has lr=nan"),
        ({"*": {"weight_decay": "1"}}, {}, r"group '\*' has weight_decay='1'"),
        ({"*": {}}, {"lr": float("inf")}, "by_pattern has lr=inf"),
    ],
)
def test_by_pattern_refuses(
    model: Model, patterns: Any, options: Dict[str, Any], message: str
) -> None:
    with pytest.raises(RateError, match=message):
        by_pattern(model, patterns, **options)


@given(cuts=strategies.sets(strategies.integers(1, 5), max_size=4))
def test_patterns_that_partition_the_names_give_a_partition(cuts: Any) -> None:
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(6)])
    edges = [0, *sorted(cuts), 6]
    patterns = [f"[{a}-{b - 1}].*" for a, b in zip(edges, edges[1:])]
    groups = by_pattern(model, {pattern: {} for pattern in patterns})
    assert [len(group["params"]) for group in groups] == [
        2 * (b - a) for a, b in zip(edges, edges[1:])
    ]
    together = [id(p) for group in groups for p in group["params"]]
    assert together == [id(p) for p in model.parameters()]


# ---------------------------------------------------------------------- no_weight_decay

WITHOUT = [
    *("pos_embed", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.2.bias"),
    "head.bias",
]
WITH = ["backbone.0.weight", "backbone.2.weight", "head.weight"]


def test_a_model_becomes_two_groups(model: Model) -> None:
    groups = no_weight_decay(model, weight_decay=0.05)
    assert named(model, groups) == {"decay": WITH, "no_decay": WITHOUT}
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


def test_every_group_is_split_and_keeps_its_options(model: Model) -> None:
    groups = by_pattern(
        model,
        {
            "head.*": {"name": "head", "lr": 0.1, "lr_decay_scale": 0.9},
            "backbone.1.*": {"name": "norm"},
            "backbone.[02].weight": {"name": "matrices", "weight_decay": 0.3},
            "*d": {"name": "positions"},
            "backbone.[02].bias": {"name": "biases", "lr_scale": 2.0},
        },
    )
    split = no_weight_decay(groups, model)
    assert [{k: v for k, v in group.items() if k != "params"} for group in split] == [
        {"name": "head_decay", "lr": 0.1, "lr_decay_scale": 0.9},
        {"name": "head_no_decay", "lr": 0.1, "lr_decay_scale": 0.9, "weight_decay": 0.0},
        {"name": "norm_no_decay", "weight_decay": 0.0},
        {"name": "matrices_decay", "weight_decay": 0.3},
        {"name": "positions_no_decay", "weight_decay": 0.0},
        {"name": "biases_no_decay", "lr_scale": 2.0, "weight_decay": 0.0},
    ]
    assert sum(len(group["params"]) for group in split) == 9
    assert "weight_decay" not in groups[0]
    assert len(groups[0]["params"]) == 2


def test_it_takes_groups_written_by_hand(model: Model) -> None:
    by_hand = [{"params": model.head.parameters()}, {"params": model.pos_embed, "name": "x"}]
    split = no_weight_decay(by_hand, model)
    assert named(model, split) == {
        "group_0_decay": ["head.weight"],
        "group_0_no_decay": ["head.bias"],
        "x_no_decay": ["pos_embed"],
    }


def test_the_names_can_be_chosen(model: Model) -> None:
    split = no_weight_decay(model, names=["pos_*", "weight"])
    assert [group["name"] for group in split] == ["no_decay"]
    by_dimension = no_weight_decay([{"name": "all", "params": model.parameters()}], names=())
    assert [len(group["params"]) for group in by_dimension] == [4, 5]


def test_no_weight_decay_refuses(model: Model) -> None:
    groups = [{"name": "all", "params": list(model.parameters()), "weight_decay": 0.1}]
    with pytest.raises(RateError, match="needs the model"):
        no_weight_decay(groups)
    with pytest.raises(RateError, match=r"weight_decay=0.1, and no_weight_decay is given 0.2"):
        no_weight_decay(groups, model, weight_decay=0.2)
    with pytest.raises(RateError, match=r"shape \(1, 3, 4\) that is not part of the model"):
        no_weight_decay(groups, model.head, names=["head"])
    with pytest.raises(RateError, match="clip its two halves one by one"):
        no_weight_decay([{**groups[0], "clip_grad_max_norm": 1.0}], model)
    with pytest.raises(RateError, match="takes a list of groups"):
        no_weight_decay(list(model.parameters()), model)
    with pytest.raises(RateError, match="weight_decay=-1"):
        no_weight_decay(model, weight_decay=-1)


def test_weights_without_decay_stay_where_no_gradient_moves_them(mode: str) -> None:
    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            nn.init.ones_(self.layer.weight)
            nn.init.ones_(self.layer.bias)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.layer(batch) * 0.0).sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(no_weight_decay(self, weight_decay=0.5), lr=0.5)

    task = Task()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [flow.ones(3, 4)] * 2)
    assert (task.layer.weight.numpy() == 0.5625).all()  # (1 - 0.5 * 0.5) ** 2
    assert (task.layer.bias.numpy() == 1.0).all()


# ---------------------------------------------------------------------- rates_between


def groups_of(count: int, **options: Any) -> List[Dict[str, Any]]:
    return [{"name": f"g{i}", "params": [], **options} for i in range(count)]


def test_rates_are_spread_as_fastai_does() -> None:
    # fastai: even_mults(1e-5, 1e-3, 3) == [1e-5, 1e-4, 1e-3]; one group has the upper rate.
    spread = rates_between(1e-5, 1e-3, groups_of(3))
    assert [group["lr"] for group in spread] == pytest.approx([1e-5, 1e-4, 1e-3], rel=1e-12)
    assert [group["lr"] for group in rates(1e-5, 1e-3, groups_of(1))] == [1e-3]
    assert rates is rates_between


@given(
    low=strategies.floats(1e-8, 1e-2),
    high=strategies.floats(1e-8, 1e2),
    count=strategies.integers(2, 40),
)
def test_rates_have_a_constant_ratio_and_exact_ends(low: float, high: float, count: int) -> None:
    groups = groups_of(count, lr_scale=0.5)
    spread = [group["lr"] for group in rates_between(low, high, groups)]
    assert (spread[0], spread[-1]) == (low, high)
    for before, middle, after in zip(spread, spread[1:], spread[2:]):
        assert middle * middle == pytest.approx(before * after, rel=1e-9)
    assert all("lr" not in group for group in groups)


def test_halves_of_a_group_have_one_rate(model: Model) -> None:
    layers = layer_decay(model, 1.0, stages=[["pos_embed", "backbone"], "head"])
    spread = rates_between(1e-4, 1e-2, no_weight_decay(layers, model))
    assert [(group["name"], group["lr"]) for group in spread] == [
        ("stem_decay", 1e-4),
        ("stem_no_decay", 1e-4),
        ("head_decay", 1e-2),
        ("head_no_decay", 1e-2),
    ]


def test_rates_between_refuses() -> None:
    with pytest.raises(RateError, match=r"group .g0. has lr=0\.1, and rates_between"):
        rates_between(1e-5, 1e-3, groups_of(2, lr=0.1))
    for low, high in ((0, 1e-3), (1e-3, 0.0)):
        with pytest.raises(RateError, match="a geometric spread needs a rate above 0"):
            rates_between(low, high, groups_of(2))
    for low, high in ((-1e-5, 1e-3), (1e-5, float("inf")), (True, 1e-3)):
        with pytest.raises(RateError, match=r"rates_between has .*finite number"):
            rates_between(low, high, groups_of(2))


# ---------------------------------------------------------------------- freeze


def test_freeze_and_unfreeze(model: Model) -> None:
    freeze(model.backbone, [model.pos_embed], model.head.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze(model.head, model.backbone[1].weight)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        *("backbone.1.weight", "head.weight", "head.bias")
    ]


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_freezing_nothing_is_refused(function: Any) -> None:
    with pytest.raises(RateError, match="a ReLU without parameters"):
        function(nn.ReLU())
    with pytest.raises(RateError, match="was given 'backbone'"):
        function("backbone")
