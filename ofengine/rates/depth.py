"""How deep each parameter of a model lies: its layers, from the stem to the head."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

import attrs
from oneflow import nn

from ofengine.errors import RateError

Stage = Union[nn.Module, str, Any]
"""A module, a parameter, or the name of either in the model; or a list of them."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_JOINT = re.compile("embed|merg|downsampl|transition|projection", re.IGNORECASE)
"""Classes of what stands between two stages."""

_OTHER_TASKS = re.compile(r"flowvision\.models\.(detection|segmentation|style_transfer)\b")


@attrs.frozen
class _Family:
    """Where the module tree does not tell the layers of a class of models.

    The patterns are matched against the beginning of a parameter's name. What ``blocks``
    matches is a layer of its own; what ``after`` matches belongs to the layer before it; what
    ``head`` matches belongs to the head wherever it stands; what ``joins[0]`` matches belongs
    to the layer that begins with ``joins[1]``, a template.
    """

    blocks: str = ""
    after: str = ""
    head: str = ""
    joins: Tuple[str, str] = ("", "")


_FAMILIES: Dict[str, _Family] = {
    "AlexNet": _Family(blocks=r"features\.\d+\."),
    "VGG": _Family(blocks=r"features\.\d+\."),
    "GoogLeNet": _Family(blocks=r"inception\d\w\.", head=r"aux\d\."),
    "Inception3": _Family(blocks=r"Mixed_\d\w\.", head=r"AuxLogits\."),
    "DLA": _Family(blocks=r"level\d\."),
    "HighResolutionNet": _Family(head=r"(incre|downsamp)_modules\.|final_layer\."),
    "PyramidVisionTransformer": _Family(joins=(r"pos_embed([2-4])$", r"block\1.0.")),
    "LeViT": _Family(after=r"blocks\.\d+\.m\.0\."),  # an MLP belongs to its attention
    "RegionViT": _Family(after=r"layers\.\d+\.peg\."),
    "UniFormer": _Family(joins=(r"patch_embed([2-4])\.", r"blocks\1.0.")),
}


@attrs.frozen
class _Unit:
    """A piece of the model that is not divided: its parameters' names, and what it is."""

    kind: str  # "block", "after" (belongs to the block before) or "other"
    names: List[str]


# ---------------------------------------------------------------------- layers found


def find_layers(model: nn.Module, rule: str = "published") -> List[List[str]]:
    """The names of the parameters of each layer, layer 0 (the stem) first, the head last.

    See :func:`ofengine.rates.layer_decay` for the rules. A module that holds nothing but one
    model, as a task does, stands for that model.

    Raises:
        RateError: ``model`` is not one of flowvision's classification models (or a
            ``Sequential`` with blocks), so that only ``stages`` can tell the layers.
    """
    prefix = ""
    while not _is_known(model):
        children = [(name, child) for name, child in model.named_children() if _has_numbers(child)]
        if len(children) != 1 or any("." not in name for name, _ in model.named_parameters()):
            raise _not_understood(model)
        prefix, model = f"{prefix}{children[0][0]}.", children[0][1]
    classes = {base.__name__ for base in type(model).__mro__}
    if "ConvNeXt" in classes:
        layers = _convnext(model, rule)
    else:
        found = [_FAMILIES[name] for name in _FAMILIES if name in classes]
        layers = _layers(model, found[0] if found else _Family(), rule)
    return [[prefix + name for name in layer] for layer in layers]


def _is_known(model: nn.Module) -> bool:
    modules = [base.__module__ for base in type(model).__mro__]
    if any(_OTHER_TASKS.match(name) for name in modules):
        raise _not_understood(model)
    if any(name.startswith("flowvision.models.") for name in modules):
        return True
    return isinstance(model, nn.Sequential) and len(list(model.children())) > 2


def _not_understood(model: nn.Module) -> RateError:
    children = [repr(name) for name, child in model.named_children() if _has_numbers(child)]
    example = ", ".join(children if len(children) < 5 else [*children[:2], "...", children[-1]])
    return RateError(
        f"layer_decay cannot tell the layers of {type(model).__name__}: it knows flowvision's "
        "classification models. Name the layers yourself, from the input to the head: "
        f"layer_decay(model, stages=[{example or '...'}])."
    )


def _convnext(model: nn.Module, rule: str) -> List[List[str]]:
    names = [name for name, _ in model.named_parameters()]
    depths = [len(list(stage.children())) for stage in model.stages.children()]
    if rule == "timm":
        before = [1 + sum(depths[:stage]) for stage in range(len(depths))]
        last = 1 + sum(depths)
    else:
        # Three blocks of the third stage make a layer; so does each other stage as a whole.
        before = [1, 2, 3, 3 + -(-depths[2] // 3)]
        last = before[3] + 1
    layers: List[List[str]] = [[] for _ in range(last + 1)]
    for name in names:
        layers[_convnext_layer(name, before, last, rule)].append(name)
    return layers


def _convnext_layer(name: str, before: Sequence[int], last: int, rule: str) -> int:
    part, *rest = name.split(".")
    if part == "downsample_layers":
        stage = int(rest[0])
        return 0 if stage == 0 else before[stage]
    if part != "stages":
        return last
    stage, block = int(rest[0]), int(rest[1])
    if rule == "timm":
        return before[stage] + block
    return before[stage] + (block // 3 if stage == 2 else 0)


def _layers(model: nn.Module, family: _Family, rule: str) -> List[List[str]]:
    """The units of ``model`` in order, each put into the stem, a block's layer, or the head."""
    layers: List[List[str]] = [[]]
    between: List[_Unit] = []
    head: List[str] = []
    joining: List[Tuple[str, str]] = []
    units = _by_pattern(model, family.blocks) if family.blocks else _units(model, "")
    for unit in units:
        joined = re.match(family.joins[0], unit.names[0]) if family.joins[0] else None
        if family.head and re.match(family.head, unit.names[0]):
            head += unit.names
        elif joined is not None:
            joining += [(name, joined.expand(family.joins[1])) for name in unit.names]
        elif family.after and re.match(family.after, unit.names[0]):
            layers[-1] += unit.names
        elif unit.kind == "block":
            _close(layers, between)
            layers.append([name for each in between for name in each.names] + unit.names)
            if len(layers) == 2 and between:
                layers[:] = [layers[1][: -len(unit.names)], unit.names]
            between = []
        else:
            between.append(unit)
    if rule == "timm" or family.blocks:
        _close(layers, between)
    head = [name for unit in between for name in unit.names] + head
    if not layers[0]:
        del layers[0]  # nothing stands before the first block: it is the stem
    if len(layers) < 3 or not head:
        raise _not_understood(model)
    for name, target in joining:
        next(layer for layer in layers if any(n.startswith(target) for n in layer)).append(name)
    return [*layers, head]


def _close(layers: List[List[str]], between: List[_Unit]) -> None:
    """Give what follows a block and belongs to it (norms) to its layer."""
    while len(layers) > 1 and between and between[0].kind == "after":
        layers[-1] += between.pop(0).names


def _units(module: nn.Module, prefix: str) -> Iterator[_Unit]:
    """The undivided pieces of ``module``, in the order in which they were defined."""
    own = [name for name, _ in module.named_parameters() if "." not in name]
    for name in own:
        yield _Unit("other", [prefix + name])
    listed = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        if not _has_numbers(child):
            continue
        full = f"{prefix}{name}."
        if _is_stage(child):
            yield from _units(child, full)
            continue
        parameters = dict(child.named_parameters())
        kind = "other"
        if all(parameter.ndim <= 1 for parameter in parameters.values()):
            kind = "after"
        elif listed and _is_block(child):
            kind = "block"
        yield _Unit(kind, [full + each for each in parameters])


def _by_pattern(model: nn.Module, blocks: str) -> Iterator[_Unit]:
    """The pieces of ``model`` that are named ``blocks``, and the parameters between them."""
    pieces: Dict[str, List[Tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        match = re.match(blocks, name)
        pieces.setdefault(match.group() if match else name, []).append((name, parameter))
    for piece, members in pieces.items():
        kind = "block" if re.match(blocks, piece) else "other"
        if kind == "block" and all(parameter.ndim <= 1 for _, parameter in members):
            kind = "after"
        yield _Unit(kind, [name for name, _ in members])


def _is_stage(module: nn.Module) -> bool:
    """True for a list of blocks, and for a module that holds one."""
    children = [child for child in module.children() if _has_numbers(child)]
    if isinstance(module, _CONTAINERS):
        composite = sum(_is_composite(child) for child in children)
        return composite >= 2 or (composite == len(children) > 0)
    blocks, block = getattr(module, "blocks", None), getattr(module, "block", None)
    # RegionViT says `block`; EfficientNet does so too, for the one row of layers in a block.
    return any(
        isinstance(each, kinds) and _is_stage(each)
        for each, kinds in ((blocks, _CONTAINERS), (block, nn.ModuleList))
    )


def _is_block(module: nn.Module) -> bool:
    if not _is_composite(module) or _JOINT.search(type(module).__name__):
        return False
    # A plain row of layers is a stem's or a joint's convolution with its norm.
    return not isinstance(module, nn.Sequential) or any(
        _is_composite(child) for child in module.children()
    )


def _is_composite(module: nn.Module) -> bool:
    leaves = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    return len(leaves) > 1


def _has_numbers(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


# ---------------------------------------------------------------------- layers told


def read_stages(model: nn.Module, stages: Sequence[Union[Stage, List[Stage]]]) -> List[List[str]]:
    """The names of the parameters of each of ``stages``, lowest first.

    Raises:
        RateError: a stage is not part of ``model`` or has no parameters, or a trainable
            parameter is in no stage or in two.
    """
    if isinstance(stages, (str, nn.Module)) or len(stages) < 2:
        raise RateError(
            f"stages={stages!r}: give a list of at least two, from the input to the head."
        )
    owner: Dict[str, int] = {}
    twice: List[str] = []
    layers: List[List[str]] = []
    for index, stage in enumerate(stages):
        members = stage if isinstance(stage, (list, tuple)) else [stage]
        names = [name for member in members for name in _names_in(model, member, index)]
        for name in names:
            if name in owner:
                twice.append(f"{name!r} (stages {owner[name]} and {index})")
            owner[name] = index
        layers.append(names)
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and name not in owner
    ]
    if twice or missing:
        raise RateError(
            "every trainable parameter belongs to exactly one stage, but "
            + "; ".join(
                f"{some(names)} {what}"
                for names, what in ((twice, "twice"), ([repr(n) for n in missing], "in none"))
                if names
            )
            + "."
        )
    return layers


def _names_in(model: nn.Module, member: Stage, index: int) -> List[str]:
    parameters = dict(model.named_parameters())
    if isinstance(member, str):
        inside = [name for name in parameters if name == member or name.startswith(f"{member}.")]
        what = f"{member!r}"
    else:
        wanted = (
            {id(p) for p in member.parameters()} if isinstance(member, nn.Module) else {id(member)}
        )
        inside = [name for name, parameter in parameters.items() if id(parameter) in wanted]
        what = f"a {type(member).__name__}"
    if not inside:
        children = ", ".join(repr(name) for name, _ in model.named_children())
        raise RateError(
            f"stage {index} names {what}, which has no parameter of {type(model).__name__}: name "
            f"one of its modules ({children}) or parameters."
        )
    return inside


def some(names: Sequence[str], most: int = 10) -> str:
    """A list for an error's text, cut where it is long."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
