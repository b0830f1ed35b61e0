"""GradualUnfreezing: the head trains first, the layers below it join epoch by epoch."""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from ofengine.callback import Callback
from ofengine.errors import RateError, warn
from ofengine.rates.regroup import whole
from ofengine.run.view import RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")


class GradualUnfreezing(Callback):
    """Freezes all parameter groups but the first ones, and unfreezes the others by epoch.

    ::

        GradualUnfreezing({0: ["head"], 1: ["layer_2"], 2: ["layer_1", "stem"]})
        GradualUnfreezing(every_n_epochs=1)  # from the last group to the first

    A frozen group's weights do not change, by weight decay and momentum neither; its schedule
    goes on, so that it joins at the rate of that epoch. Running statistics of batch norm
    change in frozen layers too. In graph mode the graph is compiled anew at each unfreezing,
    with the optimizer's state carried over; the weights are those of eager mode.

    A name stands for the group of that name, and for the two halves that
    :func:`ofengine.rates.no_weight_decay` made of it. Parameters that were frozen before
    ``fit`` stay frozen. After ``fit`` all parameters that were trainable before it are
    trainable again, so that a second ``fit`` finds the groups as this one did.

    Args:
        schedule: the names of the groups that join at the start of an epoch, by epoch (from
            0). Every group is named once, and epoch 0 has at least one.
        every_n_epochs: the last group trains from epoch 0 on, and every so many epochs the
            group before joins. Default, where there is no ``schedule``: 1.

    Raises:
        RateError: the schedule is none, or, at ``fit``, it names a group that is not there or
            leaves one out.

    Source: Howard and Ruder, ULMFiT, section 3.3 (https://arxiv.org/abs/1801.06146).
    """

    def __init__(
        self,
        schedule: Optional[Mapping[int, Union[str, Sequence[str]]]] = None,
        *,
        every_n_epochs: Optional[int] = None,
    ) -> None:
        if schedule is not None and every_n_epochs is not None:
            raise RateError("GradualUnfreezing takes a schedule or every_n_epochs, not both.")
        self._schedule = None if schedule is None else _read(schedule)
        self._every = 1 if every_n_epochs is None else every_n_epochs
        if not _is_count(self._every) or self._every < 1:
            raise RateError(
                f"GradualUnfreezing(every_n_epochs={every_n_epochs!r}): give a whole number from "
                "1 on."
            )
        self._members: Dict[str, List[Any]] = {}
        self._epochs: Dict[str, int] = {}
        self._trained: Optional[List[str]] = None

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Check the names; freeze all groups that are not to train in the first epoch."""
        self._trained = None
        names = trainer.rates.names
        self._epochs = self._epochs_of(names)
        last = max(self._epochs.values())
        if 0 <= trainer.max_epochs <= last and not trainer.fast_dev_run:
            late = [name for name in names if self._epochs[name] >= trainer.max_epochs]
            warn(
                f"{type(self).__name__} unfreezes {', '.join(map(repr, late))} in epoch "
                f"{min(self._epochs[name] for name in late)} or later, but max_epochs="
                f"{trainer.max_epochs}: that will never train."
            )
        self._members = self._to_freeze(trainer, task)
        self._freeze_all_but(self._due(trainer.current_epoch))

    def _to_freeze(self, trainer: RunView, task: TaskModule) -> Dict[str, List[Any]]:
        """The parameters of each group that are frozen until it joins."""
        groups = zip(trainer.rates.names, trainer.param_groups)
        return {name: [p for p in each.parameters if p.requires_grad] for name, each in groups}

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Let the groups train whose epoch has come."""
        due = self._due(trainer.current_epoch)
        if due == self._trained:
            return
        self._freeze_all_but(due)
        frozen = [name for name in self._members if name not in due]
        joined = [name for name in due if name not in (self._trained or [])]
        self._trained = due
        log.info(
            "%s: epoch %d: %s %s training%s.",
            type(self).__name__,
            trainer.current_epoch,
            ", ".join(joined),
            "begins" if len(joined) == 1 else "begin",
            f"; frozen: {', '.join(frozen)}" if frozen else ", nothing is frozen",
        )

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Make trainable again what was so before ``fit``."""
        self._freeze_all_but(list(self._members))
        self._members = {}

    def _due(self, epoch: int) -> List[str]:
        return [name for name, first in self._epochs.items() if first <= epoch]

    def _freeze_all_but(self, names: Sequence[str]) -> None:
        for name, parameters in self._members.items():
            for parameter in parameters:
                parameter.requires_grad_(name in names)

    def _epochs_of(self, names: Sequence[str]) -> Dict[str, int]:
        """The epoch from which on each group trains."""
        wholes = list(dict.fromkeys(whole(name) for name in names))
        if self._schedule is None:
            rank = {name: self._every * i for i, name in enumerate(reversed(wholes))}
            return {name: rank[whole(name)] for name in names}
        unknown = [name for name in self._schedule if name not in names and name not in wholes]
        if unknown:
            raise RateError(
                f"GradualUnfreezing names the group {unknown[0]!r}, which is not there: the groups "
                f"are {', '.join(map(repr, names))}."
            )
        missing = [
            name
            for name in names
            if name not in self._schedule and whole(name) not in self._schedule
        ]
        if missing:
            raise RateError(
                f"GradualUnfreezing never unfreezes {', '.join(map(repr, missing))}: name it at "
                "an epoch, or freeze it with ofengine.rates.freeze and keep it out of "
                "param_groups()."
            )
        return {
            name: self._schedule[name if name in self._schedule else whole(name)] for name in names
        }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(schedule: Mapping[int, Union[str, Sequence[str]]]) -> Dict[str, int]:
    """The epoch of each name."""
    epochs: Dict[str, int] = {}
    if not isinstance(schedule, Mapping) or not schedule:
        raise RateError(
            f"GradualUnfreezing({schedule!r}): give the groups by epoch, such as "
            '{0: ["head"], 1: ["body"]}.'
        )
    for epoch, names in schedule.items():
        if not _is_count(epoch) or epoch < 0:
            raise RateError(f"GradualUnfreezing: {epoch!r} is no epoch: they count from 0.")
        for name in [names] if isinstance(names, str) else names:
            if name in epochs:
                raise RateError(f"GradualUnfreezing names the group {name!r} twice.")
            epochs[name] = epoch
    if 0 not in epochs.values():
        raise RateError(
            "GradualUnfreezing names no group for epoch 0, in which nothing would train: write "
            '{0: ["head"], ...}.'
        )
    return epochs
