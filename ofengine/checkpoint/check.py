"""Does a checkpoint fit the run that is to go on from it? All is asked before anything changes."""

from __future__ import annotations

import warnings
from typing import Any, Mapping

from ofengine._oneflow.optimizer_copies import keys_kept
from ofengine.checkpoint.beside import check_others, check_tensors, other_optimizers
from ofengine.checkpoint.checks import Misfit, array, by_name, check_fits, misfit
from ofengine.checkpoint.cut_short import state_at_cut
from ofengine.checkpoint.file import Checkpoint
from ofengine.checkpoint.owners import Matches
from ofengine.checkpoint.schema import of_each
from ofengine.checkpoint.snapshot import plain_options
from ofengine.checkpoint.weights import check_weights
from ofengine.data.generators import check_global_states, check_state_anywhere, check_states_in
from ofengine.errors import CheckpointError, OFEngineError, quoted, said_by, warn
from ofengine.metrics.history import History
from ofengine.rates.calendar import Calendar
from ofengine.rates.checks import check_rates
from ofengine.rates.joint import named_in_errors
from ofengine.rates.planning import new_plan
from ofengine.rates.resume import check_groups_fit, resume_plan
from ofengine.rates.schedule import PlateauSchedule, describe_schedule, same_kind
from ofengine.run.progress import Point
from ofengine.run.state import Run, State


def check_run(run: Run, checkpoint: Checkpoint, policy: str, owners: Matches) -> None:
    """Raise an :class:`OFEngineError` where a part of ``checkpoint`` does not fit ``run``.

    Args:
        run: the run that is to go on, with its task, optimizer and data; nothing of it changes.
        checkpoint: a file whose state ``schema.check_state`` is content with.
        policy: ``rates_on_resume``.
        owners: whose the states of callbacks are.
    """
    state: Any = checkpoint.state
    where = f"{checkpoint.path} cannot be resumed"
    try:
        check_weights(run.task, checkpoint.weights, str(checkpoint.path))
        _check_names(run, checkpoint)
        for name, kept in of_each(state).items():
            of_whom = f"{where}, optimizer {name!r}" if name else where
            _check_one(run.each()[name], {**state, **kept}, str(checkpoint.path), policy, of_whom)
        _check_place(run, checkpoint)
        check_fits(state, lambda value, _: _check_layers(run, value), where)
        check_fits(state, lambda value, _: _check_counts(run, value), where)
        check_tensors(run.task, state.get("tensors", {}), where)
        check_others(other_optimizers(run), state.get("optimizers", {}), where)
        _check_random(run, state, owners, where)
        for callback, index in zip(run.callbacks, owners.of_own):
            if index is not None:
                now, before = state["callbacks"][index]["state"], state_at_cut(state, index)
                for kept in [now] if before is now else [now, before]:
                    if kept:
                        _check_callback(run, callback, kept, where)
    except OFEngineError:
        raise
    except Exception as error:
        # No part is of a wrong kind, so it is what the parts say together.
        raise CheckpointError(f"{where}: {said_by(error)}.") from error
    _check_accumulation(run, checkpoint)


def _check_counts(run: Run, state: State) -> None:
    """The sums of metrics, now and where an epoch was cut short, and the history."""
    held = run.metrics.held
    for metrics in filter(None, (state["metrics"], state["loop"]["cut_short"])):
        for place, kept in metrics.get("held", {}).items():
            if place not in held:
                continue
            own = type(held[place]).__qualname__
            if kept["class"] != own:
                raise Misfit(f"the metric {place} was a {kept['class']}, and is a {own} now")
            for side in ("training", "evaluation"):
                misfit_ = held[place].misfit(kept.get(side, {}))
                if misfit_ is not None:
                    raise Misfit(f"the checkpoint {misfit_} of the metric {place}, a {own}")
    wrong = History.misfit(state["history"]) if "history" in state else None
    if wrong is not None:
        raise Misfit(f"history: {wrong}")


# ---------------------------------------------------------------------- optimizer and rates


def _check_names(run: Run, checkpoint: Checkpoint) -> None:
    """One optimizer, or several of the same names that step as often."""
    state: Any = checkpoint.state
    kept, own = of_each(state), run.each()
    if set(kept) != set(own):
        before, now = (
            f"the optimizers {quoted(sorted(each), most=8)}" if "" not in each else "one optimizer"
            for each in (kept, own)
        )
        raise CheckpointError(
            f"{checkpoint.path} has {before}, and configure_optimizers() returns {now}: a run is "
            "resumed with the optimizers it was begun with."
        )
    for name, each in kept.items():
        every = each.get("every_n_batches", 1)
        if every != own[name].every_n_batches:
            raise CheckpointError(
                f"optimizer {name!r} has every_n_batches={own[name].every_n_batches}, and "
                f"{every} in {checkpoint.path}: a run is resumed with what it was begun with."
            )


def _check_one(run: Run, state: State, path: str, policy: str, where: str) -> None:
    """What is kept of the optimizer of ``run``, which may be a part of one."""
    with named_in_errors(run.name):
        _check_optimizer_class(run, state, path)
        check_groups_fit(run.rates, state["rates"])
        check_fits(state, lambda value, _: _check_optimizer(run, value), where)
        check_fits(state, lambda value, _: _check_steps(run, value), where)
        _check_plan(run, state["rates"], policy, where)
        check_fits(state, lambda value, _: _check_metric(run, value), where)


def _check_steps(run: Run, state: State) -> None:
    """Of several optimizers each has the steps that the batches done so far make."""
    if not run.name:
        return  # the schema has looked at it
    loop, rates = state["loop"], state["rates"]
    calendar = Calendar(None, run.every_n_batches)
    calendar.load_state(rates["calendar"], 0)
    steps = calendar.steps_before(max(0, loop["epoch"]), loop["batches_done"])
    if rates["step"] != steps:
        raise misfit("rates/step", rates["step"], f"{steps}")


def _check_optimizer_class(run: Run, state: State, path: str) -> None:
    kept, own = state["optimizer"]["class"], type(run.made.optimizer).__qualname__
    if kept != own:
        raise CheckpointError(
            f"{path} was trained with {kept}, and configure_optimizers() returns {own}, "
            f"whose state is another: use {kept}, or start anew from the weights with "
            "ofengine.load_weights(task, path)."
        )


def _check_optimizer(run: Run, state: State) -> None:
    """What is kept of each parameter, and the gradients of a window that is open."""
    optimizer, parameters = run.made.optimizer, dict(run.task.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    optimizer_state = state["optimizer"]
    of_parameter = {}
    for group, keys, before, now in zip(
        optimizer.param_groups, keys_kept(optimizer), optimizer_state["options"], plain_options(run)
    ):
        same = repr(sorted(before.items())) == repr(sorted(now.items()))
        for parameter in group.parameters:
            of_parameter[names.get(id(parameter), "")] = (keys, same)
    known = set().union(*(keys or () for keys, _ in of_parameter.values()), *_ALL_KEYS)
    by_name(by_name(array("f"), known), parameters)(optimizer_state["states"], "optimizer/states")
    for name, kept in optimizer_state["states"].items():
        parameter = parameters[name]
        fits = array("f", tuple(parameter.shape), parameter.numpy().dtype)
        by_name(fits)(kept, f"optimizer/states/{name}")
        keys, same = of_parameter.get(name, (None, False))
        lacking = sorted(set(keys or ()) - set(kept)) if same and kept else []
        if lacking:
            raise Misfit(f"optimizer/states/{name} lacks {lacking[0]!r}")
    loop = state["loop"]  # a parameter may have been frozen within the window
    by_name(array("f"), set(parameters) & set(of_parameter))(state["gradients"], "gradients")
    for name, gradient in state["gradients"].items():
        parameter = parameters[name]
        array("f", tuple(parameter.shape), parameter.numpy().dtype)(gradient, f"gradients/{name}")
    accumulate = state["run"]["accumulate_grad_batches"]
    if state["gradients"] and loop["batches_done"] % accumulate == 0:
        raise Misfit(
            f"there are gradients of an open window after {loop['batches_done']} batches, where "
            f"windows of {accumulate} are closed"
        )
    weights = state.get("weights")
    if weights is not None and weights["batches"] != loop["batches_done"] % accumulate:
        raise misfit("weights/batches", weights["batches"], "the batches of the open window")


_ALL_KEYS = (
    {"momentum_buf", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum"},
    {"square_avgs", "acc_deltas"},
)
"""What OneFlow's optimizers keep of a parameter, by whatever options."""


def _check_plan(run: Run, rates: State, policy: str, where: str) -> None:
    """Let another plan go on from the checkpoint, and ask it for the rates to come."""
    made, settings = run.made, run.settings if run.planned is None else run.planned
    if policy == "checkpoint":
        own = describe_schedule(made.scheduler, run.rates.names)
        if same_kind(rates["schedule"], own):
            check_fits(
                rates["schedule"], lambda kept, place: _check_schedule(kept, own, place), where
            )
    anew = new_plan(settings, made, run.rates.initial_groups, run.epoch_length)
    anew.set_decay(run.rates.decay, "the code")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when it is done in earnest
        if anew.schedule is not None and isinstance(anew.schedule, PlateauSchedule):
            memory = (rates["plateau"] or {}).get("memory", {})
            known = {"_last_lr": [0.0], **anew.schedule.state()["memory"]}  # set by the first step
            check_fits(memory, lambda kept, _: _check_values(kept, known, "rates/plateau"), where)
        resume_plan(anew, made, rates, policy)
        check_rates(anew, made, run.total_steps, run.settings.max_epochs, rates["step"])
        if anew.schedule is not None and isinstance(anew.schedule, PlateauSchedule):
            anew.observe(0.0)


def _check_metric(run: Run, state: State) -> None:
    """What ReduceLROnPlateau looks at first of all must be there."""
    monitor = run.made.monitor if run.made.strict else None
    loop = state["loop"]
    due = loop["point"] == Point.EPOCH_END.value and loop["cut_short"] is None
    if monitor is not None and due and monitor not in state["metrics"]["known"]:
        raise Misfit(f"metrics/known lacks {monitor!r}, which ReduceLROnPlateau monitors")


def _check_schedule(kept: Any, own: Any, place: str) -> None:
    """A schedule takes over values that it has, of their kind; inside it too."""
    if kept is None:
        return
    inside = [(kept.get("by_group", []), own.get("by_group", []))]
    inside += [(parts, own["parts"][name]) for name, parts in kept.get("parts", {}).items()]
    _check_values(kept.get("values", {}), own.get("values", {}), f"{place or 'rates/schedule'}")
    for parts, own_parts in inside:
        for part, own_part in zip(parts, own_parts):
            _check_schedule(part, own_part, f"{place or 'rates/schedule'}/{kept['class']}")


def _check_values(kept: Mapping[str, Any], own: Mapping[str, Any], place: str) -> None:
    for key, value in kept.items():
        if key not in own:
            raise Misfit(f"{place} has the key {key!r}, which is not known")
        if not _alike(value, own[key]):
            raise misfit(f"{place}/{key}", value, f"something like {own[key]!r}")


def _alike(kept: Any, own: Any) -> bool:
    """True where ``kept`` may stand for the plain value ``own``: a number for a number, ..."""
    if isinstance(own, (list, tuple)):
        return isinstance(kept, list)
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in (kept, own)]
    if own is None or kept is None:
        return not isinstance(kept, (list, dict))
    return all(numbers) or type(kept) is type(own)


# ---------------------------------------------------------------------- where the run is


def _check_place(run: Run, checkpoint: Checkpoint) -> None:
    """The batches that were done must be in the data of now."""
    state: Any = checkpoint.state
    loop, train = state["loop"], run.train
    point = Point(loop["point"])
    enters = point not in (Point.BEGIN, Point.EPOCH_START, Point.EPOCH_END, Point.OVER)
    most = run.settings.max_epochs
    goes_on = loop["cut_short"] is not None and (most == -1 or loop["epoch"] < most)
    done = loop["batches_done"]
    if train is None or train.count is None or done <= train.count or not (enters or goes_on):
        return
    raise CheckpointError(
        f"{checkpoint.path} was saved after {done} batches of epoch {loop['epoch']}, "
        f"and {train.what} has {train.count} now: resume with the data it was begun with."
    )


def _check_layers(run: Run, state: State) -> None:
    """Those that are frozen must be there, and those that are not must be able to train."""
    parameters = dict(run.task.named_parameters())
    groups = [g for each in run.each().values() for g in each.made.optimizer.param_groups]
    grouped = {id(p) for group in groups for p in group.parameters}
    for part in [each for each in ("loop", "at_cut") if each in state]:
        frozen = state[part]["frozen"]
        for name in frozen:
            if name not in parameters:
                raise misfit(f"{part}/frozen", name, "a parameter of the task")
        for name, parameter in parameters.items():
            if name not in frozen and not parameter.is_floating_point():
                raise Misfit(f"{part}/frozen lacks {name!r}, which holds whole numbers")
            if name not in frozen and id(parameter) not in grouped:
                raise Misfit(f"{part}/frozen lacks {name!r}, which is in no group of the optimizer")


def _check_accumulation(run: Run, checkpoint: Checkpoint) -> None:
    state: Any = checkpoint.state
    accumulate, now = state["run"]["accumulate_grad_batches"], run.settings
    kept = [tuple(each) for each in state["run"].get("windows", [(0, accumulate)])]
    if kept == list(now.windows.changes):
        return
    ranks = state["run"].get("ranks", 1)
    by_epoch = {epoch: batches // ranks for epoch, batches in kept}
    what, before = "accumulate_grad_batches", f"{by_epoch if kept[1:] else accumulate // ranks}"
    after = f"{now.accumulate_grad_batches}"
    if ranks > 1 or now.world_size > 1:
        what = "accumulate_grad_batches times the ranks"
        before, after = f"{before} times {ranks}", f"{after} times {now.world_size}"
    text = f"{what} was {before} in {checkpoint.path} and is {after} now"
    if state["gradients"] and accumulate != now.windows.at(max(0, state["loop"]["epoch"])):
        raise CheckpointError(
            f"{text}, and the checkpoint lies within a window: resume with {accumulate}."
        )
    warn(f"{text}: steps and epochs are counted with the new one from the start.")


# ---------------------------------------------------------------------- generators, callbacks


def _check_random(run: Run, state: State, owners: Matches, where: str) -> None:
    """Every state of a generator must be one of the generator that is at its place now."""
    random, train = state["random"], run.train
    seeded = state["run"]["seed"] is not None
    passes = [(train, state["random_at_pass"], seeded), (train, random, seeded)]
    passes += [(each, kept, False) for each, kept in
               zip(run.validation, state.get("random_at_validation", []))]  # fmt: skip
    try:
        for batches, states, reseeded in passes:
            if states is not None:
                check_global_states(states["global"])
                _check_source(batches, states["data"], reseeded)
        for batches, states in zip(run.validation, random.get("validation", [])):
            _check_source(batches, states, False)
        check_states_in(run.task, None, random["task"])
        for callback, index in zip(run.callbacks, owners.of_own):
            if index is not None and "callbacks" in random:
                check_states_in(None, None, random["callbacks"][index], callback)
        for states in (random["data"], random["task"], *random.get("validation", [])):
            for each in states.values():  # those too whose place is not there now
                check_state_anywhere(each)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_source(batches: Any, states: State, reseeded: bool) -> None:
    with batches.as_reseeded(reseeded):
        check_states_in(None, batches.source, states)


def _check_callback(run: Run, callback: Any, state: State, where: str) -> None:
    try:
        callback.check_state_dict(state, run.task)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: {type(callback).__name__}.check_state_dict raised {said_by(error)}."
        ) from error
