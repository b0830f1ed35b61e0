"""Several optimizers: a run is divided into parts, each of which has one."""

from __future__ import annotations

import inspect

import attrs

from ofengine.errors import ConfigurationError, quoted
from ofengine.modes.own_graphs import has_own_graph
from ofengine.modes.several import SeveralMode
from ofengine.modes.steps import step_arity
from ofengine.rates.joint import JointPlan
from ofengine.run.hooks import HookRunner
from ofengine.run.progress import Progress
from ofengine.run.state import Run
from ofengine.run.weighing import Weighing


def divide(run: Run, hooks: HookRunner) -> None:
    """Give ``run``, whose plan was just made, its parts and their mode, where it has several.

    Raises :class:`ConfigurationError` where its task cannot be trained with several optimizers.
    """
    plan = run.plan
    if not isinstance(plan, JointPlan):
        return
    _check(run, plan)
    owned = {
        part.name: [p for g in part.named.made.optimizer.param_groups for p in g.parameters]
        for part in plan.parts
    }
    run.parts = {
        part.name: attrs.evolve(
            run,
            settings=attrs.evolve(run.settings, **part.named.clipping),
            optimization=part.named.made,
            plan=part.plan,
            name=part.name,
            planned=part.settings,
            every_n_batches=part.named.every_n_batches,
            others=[p for name, each in owned.items() if name != part.name for p in each],
            progress=Progress(),
            weighing=Weighing(),
        )
        for part in plan.parts
    }
    run.mode = SeveralMode(run, run.training_mode, hooks.calls)


def _check(run: Run, plan: JointPlan) -> None:
    task, names = run.task, [part.name for part in plan.parts]
    kind = type(task).__name__
    if run.settings.mode == "graph" and has_own_graph(task):
        raise ConfigurationError(
            f"{kind}.build_graph() makes one graph, and there are the optimizers "
            f"{quoted(names, most=8)}: leave build_graph() as it is."
        )
    if step_arity(task, "training_step", 3) < 3:
        own = inspect.signature(task.training_step)
        raise ConfigurationError(
            f"{kind}.configure_optimizers() returned optimizers by name, {quoted(names, most=8)}, "
            f"and training_step{own} is not told which is to step: write `def training_step(self, "
            "batch, batch_idx, optimizer_name)`, or return one optimizer as it is, or under "
            "'optimizer'."
        )
