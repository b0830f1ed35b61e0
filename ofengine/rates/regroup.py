"""What works on parameter groups that exist: no weight decay for some, rates for all."""

from __future__ import annotations

import fnmatch
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import oneflow as flow
from oneflow import nn

from ofengine.errors import RateError

Groups = List[Dict[str, Any]]
"""What ``TaskModule.param_groups`` returns."""

NO_DECAY_NAMES = (
    "pos_embed*", "absolute_pos_embed", "relative_position_bias_table", "cls_token",
    "dist_token", "mask_token",
)  # fmt: skip
"""Parameters (the last part of their names) that get no weight decay though they have more
than one dimension, as in BEiT, MAE, DeiT and Swin."""


# ---------------------------------------------------------------------- no weight decay


def no_weight_decay(
    groups: Union[nn.Module, Sequence[Mapping[str, Any]]],
    model: Optional[nn.Module] = None,
    *,
    weight_decay: Optional[float] = None,
    names: Sequence[str] = NO_DECAY_NAMES,
) -> Groups:
    """Split groups so that biases, norms and the like have no weight decay.

    Without weight decay are all parameters of at most one dimension, and those called
    ``names``. Each group becomes two, "<name>_decay" and "<name>_no_decay", with all its other
    options; a half without parameters is dropped. It composes with the other builders and with
    groups written by hand::

        no_weight_decay(layer_decay(model, 0.75), model, weight_decay=0.05)

    Args:
        groups: the groups to split, or a model, whose trainable parameters then are one group.
        model: where the names of the parameters are looked up.
        weight_decay: that of the first halves; default: what the group or the optimizer says.
        names: globs over the last part of a parameter's name.

    Raises:
        RateError: a parameter is not one of ``model``, ``weight_decay`` is given here and in a
            group, or a group that has ``clip_grad_max_norm`` would be split, which would clip
            the halves one by one.
    """
    check_number("no_weight_decay", "weight_decay", weight_decay)
    if isinstance(groups, nn.Module):
        model = groups
        groups = [{"name": "", "params": [p for p in model.parameters() if trains(p)]}]
    if model is None and names:
        raise RateError(
            "no_weight_decay needs the model, to look up the parameters' names: write "
            "no_weight_decay(groups, model), or names=() to go by their dimensions alone."
        )
    return split_decay(groups, model, weight_decay, names)


def split_decay(
    groups: Sequence[Mapping[str, Any]],
    model: Optional[nn.Module],
    weight_decay: Optional[float] = None,
    names: Sequence[str] = NO_DECAY_NAMES,
) -> Groups:
    called = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    result: Groups = []
    for index, group in enumerate(checked_groups(groups, "no_weight_decay")):
        name = group.get("name", f"group_{index}")
        if weight_decay is not None and "weight_decay" in group:
            raise RateError(
                f"group {name!r} has weight_decay={group['weight_decay']!r}, and no_weight_decay "
                f"is given {weight_decay!r} for all: write it in one place."
            )
        halves: Tuple[List[Any], List[Any]] = ([], [])
        for parameter in group["params"]:
            if names and id(parameter) not in called:
                raise RateError(
                    f"group {name!r} holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not part of the model given to no_weight_decay."
                )
            last = called.get(id(parameter), "").rpartition(".")[2]
            without = parameter.ndim <= 1 or any(fnmatch.fnmatchcase(last, each) for each in names)
            halves[without].append(parameter)
        if all(halves) and "clip_grad_max_norm" in group:
            raise RateError(
                f"group {name!r} has clip_grad_max_norm, which would clip its two halves one by "
                "one: clip by Trainer(gradient_clip_val=...), or split the group yourself."
            )
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        for half, suffix, extra in (
            (halves[0], "decay", decay),
            (halves[1], "no_decay", {"weight_decay": 0.0}),
        ):
            if half:
                full = f"{name}_{suffix}" if name else suffix
                result.append({**group, "name": full, "params": half, **extra})
    check_names(result)
    return result


def whole(name: str) -> str:
    """The name of the group that ``no_weight_decay`` made the group ``name`` of."""
    for suffix in ("_no_decay", "_decay"):
        if name.endswith(suffix) and name != suffix:
            return name[: -len(suffix)]
    return name


# ---------------------------------------------------------------------- slices


def rates_between(low: float, high: float, groups: Sequence[Mapping[str, Any]]) -> Groups:
    """Base rates spread geometrically over ``groups``, as by fastai's ``slice(low, high)``.

    Group *i* of *n* has ``lr = low * (high / low) ** (i / (n - 1))``: the first ``low``, the
    last ``high``; a single group has ``high``. The halves that :func:`no_weight_decay` made of
    a group have the same rate. A group's ``lr_scale`` goes on multiplying.

    Args:
        low: the first group's rate, above 0.
        high: the last group's rate, above 0.
        groups: groups without ``lr``, as made by the other builders or by hand.

    Raises:
        RateError: a group has a ``lr`` already, or a rate is not above 0 and finite.

    Source: fastai, ``Learner.fit_one_cycle(lr_max=slice(low, high))``, ``even_mults``.
    """
    for key, value in (("low", low), ("high", high)):
        check_number("rates_between", key, value)
        if value == 0:
            raise RateError(f"rates_between({key}=0): a geometric spread needs a rate above 0.")
    checked = checked_groups(groups, "rates_between")
    keys = [whole(str(group.get("name", index))) for index, group in enumerate(checked)]
    ranks = {key: rank for rank, key in enumerate(dict.fromkeys(keys))}
    last = len(ranks) - 1
    for group, key in zip(checked, keys):
        refuse_second_lr(group, "rates_between")
        rank = ranks[key]
        # The ends exactly, whatever the power's rounding.
        between = low * (high / low) ** (rank / last) if last else high
        group["lr"] = high if rank == last else low if rank == 0 else between
    return checked


rates = rates_between


# ---------------------------------------------------------------------- checks


def checked_groups(groups: Sequence[Mapping[str, Any]], caller: str) -> Groups:
    """Copies of ``groups`` with their parameters as lists."""
    copies: Groups = []
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise RateError(
                f'{caller} takes a list of groups, dicts with "params", not {group!r:.60}.'
            )
        params = group["params"]
        listed = [params] if isinstance(params, flow.Tensor) else list(params)
        copies.append({**group, "params": listed})
    return copies


def check_names(groups: Groups) -> None:
    names = [group["name"] for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise RateError(
                f"{names.count(name)} groups are called {name!r}: give each its own name."
            )


def check_number(owner: str, key: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise RateError(f"{owner} has {key}={value!r}: give a finite number that is not negative.")


def refuse_second_lr(group: Mapping[str, Any], builder: str) -> None:
    if "lr" in group:
        raise RateError(
            f"group {group.get('name', '?')!r} has lr={group['lr']!r}, and {builder} sets the rate "
            "of all groups: write it in one place (a group's lr_scale multiplies the rate)."
        )


def trains(parameter: Any) -> bool:
    return bool(parameter.requires_grad)
