"""BackboneFinetuning: the head trains first, the backbone joins later at a rate that grows."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Optional, Set

from oneflow import nn

from ofengine.callbacks.gradual_unfreezing import GradualUnfreezing
from ofengine.errors import ConfigurationError, RateError
from ofengine.run.arguments import check_count, check_flag
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def multiplicative(epoch: int) -> float:
    """Lightning's default: the backbone's rate doubles with each epoch."""
    return 2.0


class BackboneFinetuning(GradualUnfreezing):
    """Trains all but ``task.backbone`` first; it joins at an epoch, with a rate that grows.

    ::

        class Classifier(TaskModule):
            def __init__(self):
                super().__init__()
                self.backbone, self.head = Trunk(), nn.Linear(512, 10)

            def param_groups(self):
                return [
                    {"name": "head", "params": self.head.parameters(), "lr": 0.1},
                    {"name": "backbone", "params": self.backbone.parameters(), "lr": 0.1},
                ]

        Trainer(callbacks=BackboneFinetuning(unfreeze_backbone_at_epoch=3))

    The names and the recipe are Lightning's. Freezing is as in :class:`GradualUnfreezing`, in both
    modes. The base rate of the backbone's groups is ``backbone_initial_ratio_lr`` times that of the
    first other group (the head) up to the epoch in which they join; in each epoch behind it,
    ``lambda_func(epoch + 1)`` times what it was, but with ``should_align`` no more than the head's.
    A schedule goes on over it, and ``lr_scale`` multiplies it. In graph mode the graph is compiled
    anew in the epochs in which it changes. In Lightning the backbone is in no group and joins the
    optimizer later; here it has a group, or several, from the start, and other parameters none of
    these.

    Args:
        unfreeze_backbone_at_epoch: the epoch, from 0, from which on the backbone trains.
        lambda_func: the factor of the backbone's rate by epoch. Default: 2, which doubles it.
        backbone_initial_ratio_lr: the backbone's first rate as a share of the head's.
        backbone_initial_lr: that rate itself, in the place of the share.
        should_align: the backbone's rate does not exceed the head's.
        train_bn: the weights and biases of the backbone's batch norms train from the start.
            Running statistics change either way.
        backbone: where the backbone is in the task, such as "model.features".

    Raises:
        ConfigurationError: at once for a wrong argument.
        RateError: at ``fit``, where the task has no such module, no group of its own for it, or no
            other group; in training, where ``lambda_func`` gives no factor.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: Optional[float] = None,
        should_align: bool = True,
        train_bn: bool = True,
        backbone: str = "backbone",
    ) -> None:
        super().__init__()
        own = "BackboneFinetuning: "
        self.unfreeze_backbone_at_epoch = check_count(
            own + "unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, 0, "an epoch, from 0"
        )
        if not callable(lambda_func):
            raise ConfigurationError(
                f"{own}lambda_func={lambda_func!r}: give a function of the epoch, such as "
                "lambda epoch: 1.5."
            )
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = _positive(
            own + "backbone_initial_ratio_lr", backbone_initial_ratio_lr
        )
        self.backbone_initial_lr = (
            None
            if backbone_initial_lr is None
            else _positive(own + "backbone_initial_lr", backbone_initial_lr)
        )
        self.should_align = check_flag(own + "should_align", should_align)
        self.train_bn = check_flag(own + "train_bn", train_bn)
        self.backbone = backbone
        self._own_groups: List[str] = []
        self._head = ""

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Find the backbone's groups, and freeze them."""
        backbone = self._module(task)
        inside = {id(parameter) for parameter in backbone.parameters()}
        others: List[str] = []
        self._own_groups = []
        for name, group in zip(trainer.rates.names, trainer.param_groups):
            of_it = [id(parameter) in inside for parameter in group.parameters]
            if any(of_it) and not all(of_it):
                raise RateError(
                    f"group {name!r} holds parameters of {self.backbone!r} and others, and "
                    "BackboneFinetuning gives the two other rates: return a group of each from "
                    f'param_groups(), such as {{"name": "backbone", "params": '
                    f"self.{self.backbone}.parameters()}}."
                )
            (self._own_groups if any(of_it) else others).append(name)
        if not self._own_groups or not others:
            raise RateError(
                f"BackboneFinetuning needs a group with the parameters of {self.backbone!r} and "
                f"one with others, and {'none holds' if others else 'all hold'} the former: see "
                "param_groups()."
            )
        self._head = others[0]
        at = self.unfreeze_backbone_at_epoch
        self._schedule = {**dict.fromkeys(others, 0), **dict.fromkeys(self._own_groups, at)}
        super().on_fit_start(trainer, task)

    def _module(self, task: TaskModule) -> nn.Module:
        found: Any = task
        for name in str(self.backbone).split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.Module):
            raise RateError(
                f"{type(task).__name__} has no module {self.backbone!r}: give the name of the part "
                'that is to join later, as in BackboneFinetuning(backbone="model.features").'
            )
        return found

    def _to_freeze(self, trainer: RunView, task: TaskModule) -> Dict[str, List[Any]]:
        members = super()._to_freeze(trainer, task)
        spared: Set[int] = set()
        if self.train_bn:
            norms = (m for m in self._module(task).modules() if isinstance(m, _BATCH_NORMS))
            spared = {id(parameter) for norm in norms for parameter in norm.parameters()}
        return {name: [p for p in each if id(p) not in spared] for name, each in members.items()}

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Give the backbone its rate, and let it train where its epoch has come."""
        lr = self._rate(trainer)
        for name in self._own_groups:
            if trainer.rates.groups[trainer.rates.index(name)].lr != lr:
                trainer.set_lr(name, lr)
        super().on_train_epoch_start(trainer, task)

    def _rate(self, trainer: RunView) -> float:
        """The base rate of the backbone's groups in this epoch: a function of the epoch alone."""
        place = trainer.rates.index(self._head)
        head, first = trainer.rates.groups[place].lr, trainer.rates.initial_groups[place].lr
        lr = self.backbone_initial_lr
        lr = first * self.backbone_initial_ratio_lr if lr is None else lr
        for epoch in range(self.unfreeze_backbone_at_epoch + 1, trainer.current_epoch + 1):
            factor = self.lambda_func(epoch + 1)
            if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
                raise RateError(
                    f"BackboneFinetuning: lambda_func({epoch + 1}) gave {factor!r}: return the "
                    "factor of the rate, a number that is not negative."
                )
            lr *= factor
            if self.should_align:
                lr = min(lr, head)
        return lr


def _positive(name: str, value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value < math.inf:
        raise ConfigurationError(f"{name}={value!r}: give a number above 0.")
    return float(value)
