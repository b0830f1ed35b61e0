"""Builders of parameter groups: by name, by depth; and freezing."""

from __future__ import annotations

import fnmatch
import re
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Pattern,
    Sequence,
    Union,
)

import oneflow as flow
from oneflow import nn

from ofengine.errors import RateError
from ofengine.rates.depth import Stage, find_layers, read_stages, some
from ofengine.rates.regroup import (
    Groups,
    check_names,
    check_number,
    refuse_second_lr,
    split_decay,
    trains,
)

_NUMBERS = ("lr", "lr_scale", "lr_decay_scale", "weight_decay")
_SMALLEST = 2.0**-126
"""The smallest normal float32."""


# ---------------------------------------------------------------------- by name


def by_pattern(
    model: nn.Module,
    patterns: Mapping[Union[str, Pattern[str]], Mapping[str, Any]],
    *,
    lr: Optional[float] = None,
    regex: bool = False,
) -> Groups:
    """Parameter groups by the parameters' full names.

    ::

        by_pattern(self.model, {"features.*": dict(lr_scale=0.1), "classifier.*": dict()})

    Every trainable parameter has to be matched by exactly one pattern. Frozen parameters
    (``requires_grad=False``) are left out; a pattern that matches nothing else gives no group.

    Args:
        model: the model whose ``named_parameters()`` are matched.
        patterns: options of the group, by pattern; the groups come in the same order. A
            pattern is a glob (``*`` matches dots too) or a compiled regular expression, and
            has to match the whole name. A group is called ``name`` in its options, by default
            like its pattern.
        lr: the base rate of every group; default: the optimizer's.
        regex: read patterns that are texts as regular expressions too.

    Raises:
        RateError: a trainable parameter is matched by no pattern or by several, a pattern
            matches no parameter, ``lr`` is given here and in a group, a name is used twice,
            or a number is negative or not finite.
    """
    if not patterns:
        raise RateError('by_pattern has no patterns: give a dict such as {"*": dict()}.')
    check_number("by_pattern", "lr", lr)
    parameters = dict(model.named_parameters())
    tests = {pattern: _test(pattern, regex) for pattern in patterns}
    hits = {name: [pattern for pattern, test in tests.items() if test(name)] for name in parameters}
    wrong = [
        (f"pattern {_text(pattern)!r} matches no parameter", "")
        for pattern in patterns
        if not any(pattern in found for found in hits.values())
    ]
    trainable = {name: parameter for name, parameter in parameters.items() if trains(parameter)}
    unmatched = [repr(name) for name in trainable if not hits[name]]
    if unmatched:
        wrong.append(("no pattern matches ", some(unmatched)))
    twice = [
        f"{name!r} ({' and '.join(repr(_text(p)) for p in hits[name])})"
        for name in trainable
        if len(hits[name]) > 1
    ]
    if twice:
        wrong.append(("several patterns match ", some(twice)))
    if wrong:
        raise RateError(
            "each trainable parameter belongs to one pattern, but "
            + "; ".join(what + which for what, which in wrong)
            + f". The parameters of {type(model).__name__} are called like "
            + some([repr(name) for name in parameters], 3)
            + "."
        )
    groups: Groups = []
    for pattern, options in patterns.items():
        group = _options(_text(pattern), options, lr)
        group["params"] = [p for name, p in trainable.items() if pattern in hits[name]]
        if group["params"]:
            groups.append(group)
    check_names(groups)
    return groups


def _test(pattern: Union[str, Pattern[str]], regex: bool) -> Callable[[str], bool]:
    if isinstance(pattern, str) and not regex:
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise RateError(f"{pattern!r} is no regular expression: {error}.") from error
    return lambda name: expression.fullmatch(name) is not None


def _text(pattern: Union[str, Pattern[str]]) -> str:
    return pattern if isinstance(pattern, str) else pattern.pattern


def _options(name: str, options: Mapping[str, Any], lr: Optional[float]) -> Dict[str, Any]:
    if not isinstance(options, Mapping):
        raise RateError(
            f"pattern {name!r} has {options!r} for its options: write dict(lr_scale=0.1), or "
            "dict() for none."
        )
    if "params" in options:
        raise RateError(f"pattern {name!r} has params of its own: the pattern says which they are.")
    group = {"name": name, **options}
    for key in _NUMBERS:
        check_number(f"group {group['name']!r}", key, group.get(key))
    if lr is not None:
        refuse_second_lr(group, "by_pattern(lr=...)")
        group["lr"] = lr
    return group


# ---------------------------------------------------------------------- by depth


def layer_decay(
    model: nn.Module,
    decay: float = 0.75,
    lr: Optional[float] = None,
    stages: Optional[Sequence[Union[Stage, List[Stage]]]] = None,
    weight_decay: Optional[float] = None,
    no_weight_decay: bool = False,
    rule: str = "published",
) -> Groups:
    """Layerwise learning rate decay: the nearer to the input, the lower the rate.

    Layer *i* of a model whose head is layer *n* has ``lr_scale = decay ** (n - i)``: the head
    1, the stem ``decay ** n``. The groups are called "stem", "layer_1", ..., "head"; frozen
    parameters are left out.

    Of flowvision's classification models the layers are found: cls_token, pos_embed,
    patch_embed or the first convolutions are layer 0, the i-th block (from 0) is layer i + 1,
    and whatever follows the last block (final norm, last 1x1 convolution, pooling, auxiliary
    and main classifiers) is the head, so that n is the number of blocks plus 1. What lies
    between two blocks (a patch merging, a transition) belongs to the later one, a norm to the
    earlier one. In AlexNet and VGG each convolution is a block. ConvNeXt has fewer layers than
    blocks: each stage is a layer, but the third, where three blocks are one, so that n is 13
    (7 for the tiny model).

    Args:
        model: the model, or a task that holds nothing but one.
        decay: above 0 and at most 1.
        lr: the base rate of every group; default: the optimizer's.
        stages: the layers of any other model, the lowest first, the head last: modules,
            parameters, the names of either in ``model``, or lists of them.
        weight_decay: the weight decay of every group; default: the optimizer's.
        no_weight_decay: split each group by :func:`ofengine.rates.no_weight_decay`.
        rule: "published", or "timm" for the layers that timm assigns, which differ in two
            points: a final norm belongs to the last block, and each block of ConvNeXt is a
            layer of its own (its final norm stays with the head).

    Raises:
        RateError: the layers cannot be found, a trainable parameter is not in exactly one
            stage, a number is out of range, or the lowest ``lr_scale`` would not be a normal
            float32.

    Sources: Clark et al., ELECTRA, 2020; BEiT (https://arxiv.org/abs/2106.08254,
    ``beit/optim_factory.py`` of microsoft/unilm); MAE (https://arxiv.org/abs/2111.06377,
    ``util/lr_decay.py`` of facebookresearch/mae); ConvNeXt (https://arxiv.org/abs/2201.03545,
    ``optim_factory.py`` of facebookresearch/ConvNeXt, and for the tiny model's 7 layers its
    ``object_detection``); timm's ``group_matcher``. Discriminative fine-tuning is from ULMFiT
    (https://arxiv.org/abs/1801.06146), which decays by 1 / 2.6.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise RateError(
            f"layer_decay(decay={decay!r}): give a factor above 0 and at most 1, such as 0.75."
        )
    if rule not in ("published", "timm"):
        raise RateError(f"layer_decay(rule={rule!r}): the rule is 'published' or 'timm'.")
    check_number("layer_decay", "lr", lr)
    check_number("layer_decay", "weight_decay", weight_decay)
    parameters = dict(model.named_parameters())
    layers = find_layers(model, rule) if stages is None else read_stages(model, stages)
    head = len(layers) - 1
    if decay**head < _SMALLEST:
        raise RateError(
            f"layer_decay(decay={decay!r}) over {head} layers leaves the stem a lr_scale of "
            f"{decay**head:.1g}, which float32 cannot hold: use a larger decay."
        )
    groups: Groups = []
    for layer, names in enumerate(layers):
        trainable = [parameters[name] for name in names if trains(parameters[name])]
        name = "head" if layer == head else f"layer_{layer}" if layer else "stem"
        group: Dict[str, Any] = {"name": name, "params": trainable}
        if lr is not None:
            group["lr"] = lr
        group["lr_scale"] = float(decay) ** (head - layer)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay
        if trainable:
            groups.append(group)
    return split_decay(groups, model) if no_weight_decay else groups


# ---------------------------------------------------------------------- freezing


def freeze(*what: Any) -> None:
    """Set ``requires_grad`` of all parameters of ``what`` to False: they do not train.

    Args:
        what: modules, parameters, or lists of them.

    Running statistics of batch norm still change while a frozen module is in training mode.
    During training a change is noticed at the start of an epoch.

    Raises:
        RateError: something is neither a module nor a parameter, or has no parameters.
    """
    for parameter in _parameters_of("freeze", what):
        parameter.requires_grad_(False)


def unfreeze(*what: Any) -> None:
    """Set ``requires_grad`` of all parameters of ``what`` to True. As :func:`freeze`."""
    for parameter in _parameters_of("unfreeze", what):
        parameter.requires_grad_(True)


def _parameters_of(caller: str, what: Iterable[Any]) -> List[Any]:
    found: List[Any] = []
    for each in what:
        if isinstance(each, nn.Module):
            inside = list(each.parameters())
        elif isinstance(each, flow.Tensor):
            inside = [each]
        elif isinstance(each, (list, tuple, Iterator)):
            inside = _parameters_of(caller, each)
        else:
            raise RateError(
                f"{caller} was given {each!r}: give modules, parameters, or lists of them."
            )
        if not inside:
            raise RateError(f"{caller} was given a {type(each).__name__} without parameters.")
        found += inside
    return found
