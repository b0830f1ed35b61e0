"""layer_decay: depths by the published rules, for flowvision's models and for stages."""

from __future__ import annotations

import sys
from typing import Any, Dict, Iterator, List, Optional, Tuple

import flowvision.models
import oneflow as flow
import pytest
from flowvision.models import ModelCreator
from flowvision.models.convnext import ConvNeXt
from flowvision.models.vision_transformer import VisionTransformer
from hypothesis import given, strategies
from oneflow import nn

from ofengine import RateError, TaskModule
from ofengine.rates import freeze, layer_decay


def depths(model: nn.Module, groups: List[Dict[str, Any]], decay: float) -> Dict[str, int]:
    """How many layers each parameter lies below the head, by its name, read from lr_scale."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    steps = {decay**below: below for below in range(200)}
    return {
        names[id(parameter)]: steps[group["lr_scale"]]
        for group in groups
        for parameter in group["params"]
    }


def layers(model: nn.Module, **options: Any) -> Dict[str, int]:
    """The layer of each parameter, 0 for the stem."""
    below = depths(model, layer_decay(model, 0.5, **options), 0.5)
    head = max(below.values())
    assert set(below) == {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: head - each for name, each in below.items()}


# ---------------------------------------------------------------------- ViT


def tiny_vit(depth: int = 3) -> VisionTransformer:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=depth, num_heads=2, num_classes=5
    )


@given(depth=strategies.integers(2, 5), decay=strategies.sampled_from([0.65, 0.75, 1.0]))
def test_vit_has_the_scales_of_beit_and_mae(depth: int, decay: float) -> None:
    model = tiny_vit(depth)

    def published(name: str) -> int:  # MAE's get_layer_id_for_vit, in words of its paper's code
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_decay(model, decay)
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr_scale"] == pytest.approx(
                decay ** (depth + 1 - published(name)), rel=1e-15
            )
    assert sorted(seen) == sorted(names.values())
    expected = ["stem", *(f"layer_{i + 1}" for i in range(depth)), "head"]
    assert [group["name"] for group in groups] == expected


def test_vit_has_the_depths_of_timm() -> None:
    # timm's group_matcher for VisionTransformer: stem cls_token, pos_embed, patch_embed;
    # blocks.<i>; norm with the last block; the rest behind it.
    model = tiny_vit(3)
    found = layers(model, rule="timm")
    assert {name: found[name] for name in found if not name.startswith("blocks.")} == {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "patch_embed.proj.bias": 0,
        "norm.weight": 3,
        "norm.bias": 3,
        "head.weight": 4,
        "head.bias": 4,
    }
    blocks = {name: layer for name, layer in found.items() if name.startswith("blocks.")}
    assert len(blocks) == 36
    assert all(layer == int(name.split(".")[1]) + 1 for name, layer in blocks.items())
    # The published rule differs in the final norm alone.
    differing = {name for name, layer in layers(model).items() if layer != found[name]}
    assert differing == {"norm.weight", "norm.bias"}


def test_a_distilled_vit_has_its_tokens_in_the_stem_and_both_heads_at_the_end() -> None:
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=5, distilled=True
    )
    found = layers(model)
    assert found["dist_token"] == 0
    assert found["head_dist.weight"] == found["head.weight"] == found["norm.weight"] == 3


# ---------------------------------------------------------------------- ConvNeXt


def convnext(*depths: int) -> ConvNeXt:
    return ConvNeXt(depths=list(depths), dims=[2, 3, 4, 5], num_classes=5)


@pytest.mark.parametrize("blocks", [27, 9])
def test_convnext_has_the_published_layers(blocks: int) -> None:
    # ConvNeXt's get_num_layer_for_convnext: 12 layers and the head for small, base, large and
    # xlarge (27 blocks in the third stage); its detection code has 6 for tiny (9 blocks).
    last = {27: 12, 9: 6}[blocks]
    joints = [0, 2, 3, last]
    found = layers(convnext(3, 3, blocks, 3))
    for name, layer in found.items():
        part, *rest = name.split(".")
        if part == "downsample_layers":
            expected = joints[int(rest[0])]
        elif part == "stages":
            stage, block = int(rest[0]), int(rest[1])
            expected = [1, 2, 3 + block // 3, last][stage]
        else:
            expected = last + 1
        assert layer == expected, name
    assert set(found.values()) == set(range(last + 2))


def test_convnext_has_the_depths_of_timm() -> None:
    # timm's group_matcher: every block is a layer, and a stage's downsample is with its first.
    found = layers(convnext(2, 1, 3, 2), rule="timm")
    expected = {
        "downsample_layers.0": 0,
        "stages.0.0": 1,
        "stages.0.1": 2,
        "downsample_layers.1": 3,
        "stages.1.0": 3,
        "downsample_layers.2": 4,
        "stages.2.0": 4,
        "stages.2.1": 5,
        "stages.2.2": 6,
        "downsample_layers.3": 7,
        "stages.3.0": 7,
        "stages.3.1": 8,
        "norm": 9,
        "head": 9,
    }
    for name, layer in found.items():
        (start,) = [each for each in expected if f"{name}.".startswith(f"{each}.")]
        assert layer == expected[start], name


# ---------------------------------------------------------------------- the other families

# Name, layers (stem and head included) as its paper counts blocks, and the layers of a few
# parameters (by the beginning of their names): the first block, a joint, the last block.
FAMILIES: List[Tuple[str, int, Dict[str, int]]] = [
    ("resnet18", 2 + 8, {"conv1": 0, "bn1": 0, "layer1.0": 1, "layer2.0.downsample": 3, "fc": 9}),
    ("resnet50", 2 + 16, {"layer1.2": 3, "layer2.0": 4, "layer4.2": 16, "fc": 17}),
    ("resnext50_32x4d", 2 + 16, {"layer3.0": 8}),
    ("wide_resnet50_2", 2 + 16, {"layer3.0": 8}),
    ("res2net50_26w_4s", 2 + 16, {"layer3.0": 8}),
    ("se_resnet50", 2 + 16, {"layer0": 0, "layer3.0": 8, "last_linear": 17}),
    ("senet154", 2 + 3 + 8 + 36 + 3, {"layer0.conv3": 0, "layer2.0": 4, "layer4.2": 50}),
    ("iresnet50", 2 + 3 + 4 + 14 + 3, {"layer4.0": 22, "bn2": 25, "fc": 25, "features": 25}),
    ("alexnet", 5 + 1, {"features.0": 0, "features.10": 4, "classifier.1": 5}),
    ("vgg11_bn", 8 + 1, {"features.0": 0, "features.1": 0, "features.4": 1, "features.26": 7}),
    ("vgg16", 13 + 1, {"features.28": 12, "classifier.0": 13, "classifier.6": 13}),
    ("squeezenet1_0", 2 + 8, {"features.0": 0, "features.3": 1, "features.12": 8}),
    ("googlenet", 2 + 9, {"conv3": 0, "inception3a": 1, "inception5b": 9, "aux1": 10, "fc": 10}),
    ("inception_v3", 2 + 11, {"Conv2d_4a": 0, "Mixed_5b": 1, "Mixed_7c": 11, "AuxLogits": 12}),
    (
        "densenet121",
        2 + 6 + 12 + 24 + 16,
        {
            "features.conv0": 0,
            "features.denseblock1.denselayer6": 6,
            "features.transition1": 7,
            "features.denseblock2.denselayer1": 7,
            "features.norm5": 59,
            "classifier": 59,
        },
    ),
    ("mobilenet_v2", 2 + 17, {"features.0": 0, "features.1": 1, "features.17": 17}),
    ("mobilenet_v3_small", 2 + 11, {"features.0": 0, "features.11": 11, "features.12": 12}),
    ("mobilenet_v3_large", 2 + 15, {"features.15": 15, "classifier.0": 16}),
    ("shufflenet_v2_x0_5", 2 + 4 + 8 + 4, {"conv1": 0, "stage3.0": 5, "conv5": 17, "fc": 17}),
    ("mnasnet0_5", 2 + 16, {"layers.6": 0, "layers.8.0": 1, "layers.9.0": 4, "layers.14": 17}),
    ("efficientnet_b0", 2 + 16, {"features.0": 0, "features.2.1": 3, "features.7.0": 16}),
    ("regnet_x_400mf", 2 + 22, {"stem": 0, "trunk_output.block2": 2, "fc": 23}),
    ("regnet_y_400mf", 2 + 16, {"stem": 0, "trunk_output.block1": 1, "fc": 17}),
    ("rexnetv1_1_0", 2 + 16, {"features.1": 0, "features.3": 1, "features.18": 16}),
    ("rexnet_lite_1_0", 2 + 16, {"features.1": 0, "features.3": 1, "output": 17}),
    ("ghostnet", 2 + 17, {"conv_stem": 0, "blocks.0.0": 1, "blocks.9.0": 17, "conv_head": 18}),
    ("genet_small", 2 + 5, {"module_list.1": 0, "module_list.3": 1, "module_list.8": 6}),
    ("dla34", 2 + 6, {"base_layer": 0, "level0": 1, "level5.root": 6, "fc": 7}),
    (
        "hrnet_w18_small",
        2 + 4,
        {"conv2": 0, "layer1": 1, "transition1": 2, "stage4": 4, "incre": 5, "final": 5},
    ),
    ("convmixer_768_32_relu", 2 + 32, {"2": 0, "3.0": 1, "3.3": 1, "34.0": 32, "37": 33}),
    ("convnext_iso_small_224", 2 + 18, {"stem": 0, "blocks.17": 18, "norm": 19}),
    ("deit_small_patch16_LS_224", 2 + 12, {"pos_embed": 0, "blocks.11": 12, "norm": 13}),
    (
        "cait_XS24_384",
        2 + 24 + 2,
        {"cls_token": 0, "blocks.23": 24, "blocks_token_only.1": 26, "norm": 27},
    ),
    ("mlp_mixer_s16_224", 2 + 8, {"stem": 0, "blocks.7": 8, "norm": 9}),
    ("gmlp_ti16_224", 2 + 30, {"stem": 0, "blocks.29": 30}),
    ("resmlp_12_224", 2 + 12, {"patch_embed": 0, "blocks.11": 12, "norm": 13}),
    (
        "swin_tiny_patch4_window7_224",
        2 + 2 + 2 + 6 + 2,
        {"patch_embed": 0, "layers.0.downsample": 3, "layers.1.blocks.0": 3, "norm": 13},
    ),
    (
        "cswin_tiny_224",
        2 + 1 + 2 + 21 + 1,
        {"stage1_conv_embed": 0, "merge1": 2, "stage2.0": 2, "merge3": 25, "norm": 26},
    ),
    (
        "crossformer_tiny_patch4_group7_224",
        2 + 1 + 1 + 8 + 6,
        {"patch_embed": 0, "layers.0.downsample": 2, "layers.3.blocks.5": 16, "norm": 17},
    ),
    (
        "pvt_tiny",
        2 + 2 + 2 + 2 + 2,
        {"pos_embed1": 0, "cls_token": 0, "pos_embed2": 3, "patch_embed2": 3, "block4.1": 8},
    ),
    (
        "poolformer_s12",
        2 + 2 + 2 + 6 + 2,
        {"patch_embed": 0, "network.1": 3, "network.2.0": 3, "norm": 13},
    ),
    (
        "uniformer_small",
        2 + 3 + 4 + 8 + 3,
        {"patch_embed1": 0, "patch_embed2": 4, "blocks2.0": 4, "blocks4.2": 18, "norm": 19},
    ),
    (
        "van_tiny",
        2 + 3 + 3 + 5 + 2,
        {"patch_embed1": 0, "norm1": 3, "patch_embed2": 4, "block2.0": 4, "norm4": 14},
    ),
    (
        "levit_128s",
        2 + 2 + 3 + 4 + 2,  # two blocks that halve the resolution
        {"patch_embed": 0, "blocks.0": 1, "blocks.1": 1, "blocks.4": 3, "head_dist": 12},
    ),
    ("mobilevit_xx_small", 2 + 1 + 3 + 2 + 2 + 2, {"conv_1.": 0, "layer_5.1": 10, "conv_1x1": 11}),
    (
        "regionvit_tiny_224",
        2 + 2 + 2 + 8 + 2,
        {"cls_token": 0, "layers.0.block.1": 1, "layers.1.block.0": 3, "layers.1.block.1": 3},
    ),
    ("fan_tiny_12_p16_224", 2 + 12 + 2, {"pos_embed": 0, "cls_attn_blocks.0": 13, "norm": 15}),
    ("fan_tiny_8_p4_hybrid", 2 + 8 + 2, {"patch_embed.backbone": 0, "blocks.0": 1, "norm": 11}),
]

SLOW = (
    "convnext_iso_small_224",
    "crossformer_tiny_patch4_group7_224",
    "regionvit_tiny_224",
    "regnet_x_400mf",
    "swin_tiny_patch4_window7_224",
)
"""Those that take more than a second to make."""


@pytest.fixture(scope="module")
def without_slow_initialization() -> Iterator[None]:
    """The weights' values do not matter here, and drawing them takes longer than all else."""
    patch = pytest.MonkeyPatch()
    for name, module in list(sys.modules.items()):
        if name.startswith("flowvision.") or module is nn.init:
            for function in [each for each in vars(module) if hasattr(nn.init, each)]:
                if function[0] != "_" and function[-1] == "_":
                    patch.setattr(module, function, lambda tensor, *_, **__: tensor)
    yield
    patch.undo()


@pytest.mark.usefixtures("without_slow_initialization")
@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        pytest.param(*family, id=family[0], marks=pytest.mark.slow if family[0] in SLOW else [])
        for family in FAMILIES
    ],
)
def test_flowvision_family(name: str, count: int, some: Dict[str, int]) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(flowvision.models, name, None)
    model = model(**options) if options else ModelCreator.create_model(name)
    found = layers(model)
    assert set(found.values()) == set(range(count))
    for start, layer in some.items():
        met = {found[each] for each in found if each.startswith(start)}
        assert met, start
        assert min(met) == layer, start


def test_the_scales_of_a_resnet() -> None:
    groups = layer_decay(flowvision.models.resnet18(), decay=0.8, lr=0.1, weight_decay=0.01)
    assert [group["name"] for group in groups] == [
        "stem", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "layer_6", "layer_7",
        "layer_8", "head",
    ]  # fmt: skip
    by_hand = [0.134217728, 0.16777216, 0.2097152, 0.262144, 0.32768, 0.4096, 0.512, 0.64, 0.8, 1]
    assert [group["lr_scale"] for group in groups] == pytest.approx(by_hand, rel=1e-12)
    assert {group["lr"] for group in groups} == {0.1}
    assert {group["weight_decay"] for group in groups} == {0.01}
    assert "lr" not in layer_decay(flowvision.models.resnet18())[0]


def test_frozen_parameters_are_left_out_and_the_layers_keep_their_depth() -> None:
    model = flowvision.models.resnet18()
    freeze(model.conv1, model.bn1, model.layer1)
    groups = layer_decay(model, 0.5)
    assert [group["name"] for group in groups][:2] == ["layer_3", "layer_4"]
    assert groups[0]["lr_scale"] == 0.5**6


def test_a_task_stands_for_the_model_in_it() -> None:
    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_vit(2)
            self.loss_fn = nn.CrossEntropyLoss()

    found = layers(Task())
    assert found["model.cls_token"] == 0
    assert found["model.blocks.1.norm1.weight"] == 2
    assert found["model.head.weight"] == 3


def test_weight_decay_of_layers_is_split_by_mae_rule() -> None:
    groups = layer_decay(tiny_vit(2), 0.5, weight_decay=0.05, no_weight_decay=True)
    assert [(group["name"], group["weight_decay"], group["lr_scale"]) for group in groups] == [
        ("stem_decay", 0.05, 0.125),
        ("stem_no_decay", 0.0, 0.125),
        ("layer_1_decay", 0.05, 0.25),
        ("layer_1_no_decay", 0.0, 0.25),
        ("layer_2_decay", 0.05, 0.5),
        ("layer_2_no_decay", 0.0, 0.5),
        ("head_decay", 0.05, 1.0),
        ("head_no_decay", 0.0, 1.0),
    ]
    # patch_embed.proj.weight against cls_token, pos_embed and patch_embed.proj.bias.
    assert [len(group["params"]) for group in groups[:2]] == [1, 3]
    # qkv, proj, fc1, fc2 against their biases and two norms.
    assert [len(group["params"]) for group in groups[2:4]] == [4, 8]


# ---------------------------------------------------------------------- models of one's own


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(flow.zeros(1, 4))
        self.stem = nn.Linear(4, 4)
        self.body = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 2)


def test_stages_may_be_modules_parameters_names_and_lists() -> None:
    model = Own()
    stages = [["stem", model.token], model.body[0], ["body.1", model.body[2]], "head"]
    groups = layer_decay(model, decay=0.5, stages=stages)
    assert [(g["name"], g["lr_scale"], len(g["params"])) for g in groups] == [
        ("stem", 0.125, 3),
        ("layer_1", 0.25, 2),
        ("layer_2", 0.5, 4),
        ("head", 1.0, 2),
    ]


@given(
    count=strategies.integers(2, 30),
    decay=strategies.floats(0.1, 1, exclude_min=True, allow_nan=False),
)
def test_stages_fall_off_geometrically_from_a_head_of_one(count: int, decay: float) -> None:
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(count)])
    scales = [g["lr_scale"] for g in layer_decay(model, decay, stages=list(model))]
    assert scales[-1] == 1.0
    for lower, upper in zip(scales, scales[1:]):
        assert lower == pytest.approx(upper * decay, rel=1e-12)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["stem", "body", "head"], r"'token' in none\."),
        (["token", "stem", "head"], r"'body\.0\.weight', .* in none\."),
        (
            [["token", "stem"], "body", ["body.2", "head"]],
            r"'body\.2\.weight' \(stages 1 and 2\), 'body\.2\.bias' \(stages 1 and 2\) twice\.",
        ),
        (["token", "stm", "body", "head"], "stage 1 names 'stm', which has no parameter of Own"),
        (["token", "act", "body", "head"], "stage 1 names 'act', which has no parameter"),
        (["token", nn.Linear(2, 2)], "stage 1 names a Linear, which has no parameter of Own"),
        (["head"], "give a list of at least two"),
        ("head", "give a list of at least two"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(RateError, match=message):
        layer_decay(Own(), stages=stages)


def test_a_model_it_does_not_know_is_refused_with_what_to_write() -> None:
    with pytest.raises(RateError) as refused:
        layer_decay(Own())
    assert str(refused.value) == (
        "layer_decay cannot tell the layers of Own: it knows flowvision's classification models. "
        "Name the layers yourself, from the input to the head: "
        "layer_decay(model, stages=['stem', 'body', 'head'])."
    )


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))]
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(RateError, match="cannot tell the layers"):
        layer_decay(model)


@pytest.mark.slow
def test_models_of_other_tasks_are_refused() -> None:
    with pytest.raises(RateError, match="cannot tell the layers"):
        layer_decay(ModelCreator.create_model("fast_neural_style"))
    with pytest.raises(RateError, match="cannot tell the layers"):
        layer_decay(
            flowvision.models.segmentation.lraspp_mobilenet_v3_large_coco(pretrained_backbone=False)
        )


@pytest.mark.parametrize("decay", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.5", None])
def test_decay_lies_above_0_and_is_at_most_1(decay: Optional[Any]) -> None:
    with pytest.raises(RateError, match="above 0 and at most 1"):
        layer_decay(tiny_vit(), decay=decay)


def test_a_scale_that_float32_cannot_hold_is_refused() -> None:
    # 1e-5 ** 9 = 1e-45 is below 2 ** -126 = 1.2e-38.
    with pytest.raises(RateError, match=r"over 9 layers .* 1e-45"):
        layer_decay(flowvision.models.resnet18(), decay=1e-5)


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "1e-3"])
def test_numbers_are_finite_and_not_negative(option: str, value: Any) -> None:
    with pytest.raises(RateError, match=f"{option}=.*finite number that is not negative"):
        layer_decay(tiny_vit(), **{option: value})


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(RateError, match="'published' or 'timm'"):
        layer_decay(tiny_vit(), rule="keras")
