"""The rate plan of a run: from settings, a task and the length of an epoch."""

from __future__ import annotations

import logging
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple

from ofengine._oneflow.optimizer_state import is_of_empty_list
from ofengine.data.combined import length_of, together
from ofengine.data.sources import count_batches
from ofengine.errors import ConfigurationError, RateError
from ofengine.rates.calendar import Calendar
from ofengine.rates.groups import Group, check_groups, check_groups_of
from ofengine.rates.joint import JointPlan, NamedPlan, named_in_errors, settings_for
from ofengine.rates.optimizers import (
    Optimization,
    make_schedule,
    read_optimizers,
)
from ofengine.rates.options import ScheduledOptions
from ofengine.rates.plan import DecayEvents, RatePlan
from ofengine.rates.several import is_by_name, read_named
from ofengine.run.arguments import check_takes
from ofengine.run.settings import Settings

log = logging.getLogger("ofengine")

Decays = Iterable[Tuple[str, DecayEvents]]
"""When decay happens, and who says so."""


def plan_run(
    settings: Settings, task: Any, batches: Optional[int], decays: Decays = ()
) -> Tuple[Optional[Optimization], RatePlan]:
    """The checked optimizer and plan of a ``fit`` of ``task``.

    Of several optimizers None, and a :class:`JointPlan` that has them.

    Args:
        settings: the Trainer's.
        task: a ``TaskModule``; its ``configure_optimizers`` is called.
        batches: batches in an epoch, or None where that is not known.
        decays: the decay events, by the name of who declares them.

    Raises:
        RateError: the groups, the schedule or two declarations of decay do not fit together.
        ConfigurationError: several optimizers cannot be trained with these settings.
    """
    name = type(task).__name__
    returned = _configure_optimizers(task)
    if is_by_name(returned):
        joint = _plan_several(settings, task, returned, batches)
        for owner, decay in decays:
            joint.set_decay(decay, owner)
        return None, joint
    made = read_optimizers(returned, name)
    if made.listed:
        log.info(
            "%s.configure_optimizers() returned [optimizer], [scheduler], as for Lightning: the "
            'scheduler moves on by epoch. Return {"optimizer": ..., "lr_scheduler": ...} for one '
            "that moves on by step.", name,
        )  # fmt: skip
    groups = check_groups(task, made.optimizer, scheduled=made.scheduler is not None)
    if not any(group.tensors for group in groups):
        raise RateError(f"{name} has no trainable parameter in any group.")
    plan = new_plan(settings, made, groups, batches)
    for owner, decay in decays:
        plan.set_decay(decay, owner)
    return made, plan


def _plan_several(
    settings: Settings, task: Any, returned: Dict[Any, Any], batches: Optional[int]
) -> JointPlan:
    name = type(task).__name__
    named = read_named(returned, name)
    some = f"{name}.configure_optimizers() returned {len(named)} optimizers by name"
    if settings.world_size > 1:
        raise ConfigurationError(
            f"{some}, which are trained in one process, and there are {settings.world_size} ranks: "
            "use Trainer(devices=1)."
        )
    if settings.windows.most > 1:
        raise ConfigurationError(
            f"{some}, and accumulate_grad_batches={settings.accumulate_grad_batches} averages for "
            "one: leave it out, and give larger batches."
        )
    groups = check_groups_of(
        task, {e.name: (e.made.optimizer, e.made.scheduler is not None) for e in named}
    )
    parts = []
    for each in named:
        if not any(group.tensors for group in groups[each.name]):
            raise RateError(f"optimizer {each.name!r} of {name} has no parameter in any group.")
        own = settings_for(each, settings, batches)
        with named_in_errors(each.name):
            parts.append(NamedPlan(each, new_plan(own, each.made, groups[each.name], batches), own))
    return JointPlan(parts, batches, settings.total_steps(batches))


def new_plan(
    settings: Settings, made: Optimization, groups: Sequence[Group], batches: Optional[int]
) -> RatePlan:
    """A plan at the beginning of a run; its decay is to be set."""
    schedule = make_schedule(made, [group.name for group in groups], [group.lr for group in groups])
    calendar = Calendar(batches, settings.windows)
    plan = RatePlan(groups, calendar, schedule, made.interval, made.frequency)
    plan.stop = settings.total_steps(batches)
    if made.options:
        plan.options = ScheduledOptions(made.options, plan.names, made.optimizer, calendar)
    return plan


def _configure_optimizers(task: Any) -> Any:
    check_takes(task, "configure_optimizers")
    try:
        return task.configure_optimizers()
    except ValueError as error:
        if "different warmup configs" in str(error):
            raise RateError(
                "OneFlow's linear warm-up takes groups of equal lr only: use "
                "ofengine.rates.WarmupLR, which takes any, or scale the groups by lr_scale."
            ) from error
        raise
    except IndexError as error:
        if is_of_empty_list(error):
            raise RateError(
                f"{type(task).__name__}.configure_optimizers() gave an optimizer an empty list: "
                "return a group or more from param_groups(), as in "
                "[{'params': self.parameters(), 'lr': 0.1}]."
            ) from None
        raise


def epoch_length(
    settings: Settings, task: Any, train_dataloaders: Any, steps_per_epoch: Optional[int]
) -> Optional[int]:
    """Batches in an epoch of ``fit(task, train_dataloaders)``, or None where that is not known.

    Args:
        settings: whose ``limit_train_batches``, ``overfit_batches`` and
            ``accumulate_grad_batches`` count.
        task: its ``train_dataloader`` is called where no data is given.
        train_dataloaders: as in ``fit``; only its length is asked for.
        steps_per_epoch: optimizer steps in an epoch, instead of that length.
    """
    if steps_per_epoch is not None:
        whole = isinstance(steps_per_epoch, int) and not isinstance(steps_per_epoch, bool)
        if not whole or steps_per_epoch < 1:
            raise ConfigurationError(
                f"steps_per_epoch={steps_per_epoch!r}: give a whole number from 1 on."
            )
        return steps_per_epoch * settings.windows.at(0)
    source = train_dataloaders if train_dataloaders is not None else task.train_dataloader()
    total = None if source is None else length_of(together(source))
    limit, name = settings.limit_train_batches, "limit_train_batches"
    if settings.overfit_batches is not None:
        limit, name = settings.overfit_batches, "overfit_batches"
    if isinstance(limit, int):  # of each rank
        limit *= settings.world_size
    return count_batches(total, limit, "train_dataloader", name)
