"""The parameter groups of a task, checked before training starts."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set, Tuple

import attrs
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.optimizer_state import default_options
from ofengine.errors import RateError, warn

ENGINE_KEYS = ("name", "lr_scale", "lr_decay_scale")
"""The keys of a parameter group that are the engine's own."""

_CLIPPING_KEYS = ("clip_grad_max_norm", "clip_grad_norm_type")
_OTHER_KEYS = ("params", "lr", "initial_lr", *_CLIPPING_KEYS)


def _as_tuple(names: Iterable[str]) -> Tuple[str, ...]:
    return tuple(names)


@attrs.frozen
class Group:
    """What the engine knows of one parameter group.

    ``lr``, ``lr_scale`` and ``lr_decay_scale`` are as in the definition of a rate, see
    :class:`ofengine.RatePlan`.
    """

    name: str
    lr: float
    lr_scale: float
    lr_decay_scale: float
    tensors: int
    """How many parameters (tensors) the group has."""
    numbers: int
    """How many numbers they hold."""
    declares_scale: bool
    """True where the user wrote ``lr_scale`` or ``lr_decay_scale``."""
    parameters: Tuple[str, ...] = attrs.field(default=(), converter=_as_tuple)
    """The full names of its parameters in the task."""


def check_groups(task: nn.Module, optimizer: Optimizer, scheduled: bool = False) -> List[Group]:
    """Check the groups of ``optimizer`` against ``task``; describe them, in order.

    ``scheduled`` says that the rates move: the base rate is then ``initial_lr`` where there is
    one, which a scheduler keeps when it is made and writes its own first rate into ``lr``.

    Raises :class:`RateError` for: a trainable parameter in no group or in two, a parameter
    that is not the task's, a misspelt key, a rate or scale that is negative or not finite, a
    name used twice. Warns of an empty group, a frozen parameter in a group, an unknown key.
    """
    return check_groups_of(task, {"": (optimizer, scheduled)})[""]


def check_groups_of(
    task: nn.Module, optimizers: Mapping[str, Tuple[Optimizer, bool]]
) -> Dict[str, List[Group]]:
    """As :func:`check_groups`, of several optimizers by name, which share the parameters.

    Each comes with its ``scheduled``.
    """
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    checked: Dict[str, List[Group]] = {}
    members: List[Tuple[str, List[Any]]] = []
    for owner, (optimizer, scheduled) in optimizers.items():
        groups = checked[owner] = [
            _describe(index, options, optimizer, scheduled, names)
            for index, options in enumerate(optimizer.param_groups)
        ]
        _check_names([group.name for group in groups])
        for group, options in zip(groups, optimizer.param_groups):
            name = f"{owner}/{group.name}" if owner else group.name
            members.append((name, list(options.parameters)))
    _check_membership(task, names, members)
    return checked


def _describe(
    index: int, options: Any, optimizer: Optimizer, scheduled: bool, names: Dict[int, str]
) -> Group:
    given = dict(options.options)
    name = given.get("name", f"group_{index}")
    if not isinstance(name, str) or not name:
        raise RateError(f"parameter group {index} has name={name!r}: a name is a text.")
    _check_keys(name, given, optimizer)
    _check_clipping(name, given)
    parameters = list(options.parameters)
    return Group(
        name=name,
        lr=_number(name, "lr", given.get("initial_lr" if scheduled else "lr", given["lr"])),
        lr_scale=_number(name, "lr_scale", given.get("lr_scale", 1.0)),
        lr_decay_scale=_number(name, "lr_decay_scale", given.get("lr_decay_scale", 1.0)),
        tensors=len(parameters),
        numbers=sum(parameter.numel() for parameter in parameters),
        declares_scale="lr_scale" in given or "lr_decay_scale" in given,
        parameters=[names[id(p)] for p in parameters if id(p) in names],
    )


def _number(group: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RateError(
            f"group {group!r} has {key}={value!r}, a {type(value).__name__}: write a number."
        )
    if not math.isfinite(value) or value < 0:
        raise RateError(f"group {group!r} has {key}={value!r}: it must be finite and not negative.")
    return float(value)


def _check_keys(group: str, given: Dict[str, Any], optimizer: Optimizer) -> None:
    arguments = inspect.signature(type(optimizer).__init__).parameters
    known = {*ENGINE_KEYS, *_OTHER_KEYS, *default_options(optimizer), *arguments}
    for key in given:
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        if close:
            raise RateError(
                f"group {group!r} has the key {key!r}, which nothing reads: "
                f"did you mean {close[0]!r}?"
            )
        warn(
            f"group {group!r} has the key {key!r}, which neither {type(optimizer).__name__} nor "
            "ofengine reads: it has no effect.",
        )


def _check_clipping(group: str, given: Dict[str, Any]) -> None:
    keys = [key for key in _CLIPPING_KEYS if key in given]
    if len(keys) == 1:
        both = " and ".join(repr(key) for key in _CLIPPING_KEYS)
        raise RateError(
            f"group {group!r} has {keys[0]!r} alone, with which OneFlow clips nothing: "
            f"write both {both} (2.0 for the usual norm)."
        )
    if keys:
        _number(group, "clip_grad_max_norm", given["clip_grad_max_norm"])
        norm_type = given["clip_grad_norm_type"]
        is_number = isinstance(norm_type, numbers.Real) and not isinstance(norm_type, bool)
        if not is_number or not norm_type or math.isnan(norm_type):
            raise RateError(
                f"group {group!r} has clip_grad_norm_type={norm_type!r}: write 2.0 for the usual "
                "norm, or another p of a p-norm, float('inf') for the largest entry."
            )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise RateError(
                f"{names.count(name)} parameter groups are called {name!r}: give each its own name."
            )


def _check_membership(
    task: nn.Module, names: Dict[int, str], members: Sequence[Tuple[str, List[Any]]]
) -> None:
    owner: Dict[int, str] = {}
    for group, parameters in members:
        if not parameters:
            warn(
                f"group {group!r} is empty: no parameter has its rate. Was the right module meant? "
                "(Pooling and activation layers have no parameters.)",
            )
        frozen = [names.get(id(p), "?") for p in parameters if not p.requires_grad]
        if frozen:
            warn(
                f"group {group!r} holds {len(frozen)} frozen parameter(s) (requires_grad=False), "
                f"which will not train: {_some(frozen)}.",
            )
        for parameter in parameters:
            if id(parameter) not in names:
                raise RateError(
                    f"group {group!r} holds a parameter of shape {tuple(parameter.shape)} that is "
                    f"not part of {type(task).__name__}: assign its module to an attribute of the "
                    "task, or take it out of param_groups()."
                )
            if parameter.requires_grad and not parameter.is_contiguous():
                name = names[id(parameter)]
                raise RateError(
                    f"parameter {name!r} is not contiguous in memory, and OneFlow's optimizers "
                    "never change such a parameter: make it with .contiguous(), as in "
                    f"nn.Parameter({name.rpartition('.')[2]}.contiguous())."
                )
            other = owner.get(id(parameter))
            owner[id(parameter)] = group
            if other is not None:
                both = f"groups {other!r} and {group!r}" if other != group else f"group {group!r}"
                raise RateError(
                    f"parameter {names[id(parameter)]!r} is twice in {both}: it would be stepped "
                    "twice (and graph mode would abort the process); name it once."
                )
    orphans = [
        name
        for name, parameter in task.named_parameters()
        if parameter.requires_grad and id(parameter) not in owner
    ]
    if orphans:
        raise RateError(
            f"{len(orphans)} trainable parameter(s) are in no group and would never train: "
            f"{_some(orphans)}.{_twin_hint(task, orphans)} Add them to a group in param_groups(), "
            "or freeze them with requires_grad_(False). (A net that a hook trains, with an "
            "optimizer of its own, stays out of the task's modules: self.nets = (net,).)"
        )


def _twin_hint(task: nn.Module, orphans: Iterable[str]) -> str:
    """A hint where an orphan's module is called almost like another one (`classifer`)."""
    modules = [name for name, _ in task.named_modules() if name]
    seen: Set[str] = set()
    for orphan in orphans:
        parts = orphan.split(".")
        for depth in range(1, len(parts)):
            seen.add(".".join(parts[:depth]))
    for name in sorted(seen):
        parent, _, leaf = name.rpartition(".")
        siblings = [m for m in modules if m.rpartition(".")[0] == parent and m != name]
        leaves = [sibling.rpartition(".")[2] for sibling in siblings]
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.85)
        if close and leaf.rstrip("0123456789") != close[0].rstrip("0123456789"):
            twin = f"{parent}.{close[0]}" if parent else close[0]
            return f" The module {name!r} stands beside {twin!r}: is one of them a misspelling?"
    return ""


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
