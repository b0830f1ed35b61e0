"""How a run goes on from a checkpoint, as if it had never stopped."""

from __future__ import annotations

import contextlib
import itertools
import logging
from typing import Any, Iterator, List, Optional

from ofengine._oneflow.optimizer_state import own_options
from ofengine.checkpoint.beside import check_others, other_optimizers, put_others, put_tensors
from ofengine.checkpoint.check import check_run
from ofengine.checkpoint.cut_short import goes_on, noted_in
from ofengine.checkpoint.entry import Entry, tensors_of
from ofengine.checkpoint.file import Checkpoint
from ofengine.checkpoint.kernels import tell_kernels
from ofengine.checkpoint.of_task import hand_back
from ofengine.checkpoint.owners import Matches, describe_owner, in_words, match
from ofengine.checkpoint.schema import check_state, of_each
from ofengine.checkpoint.seen import (
    split_by_data,
    tell_of_other_batches,
    tell_of_readers,
    tell_of_what_is_missing,
)
from ofengine.checkpoint.snapshot import MOMENTS, plain_options
from ofengine.checkpoint.undo import Attributes, Undo
from ofengine.checkpoint.weights import copy_weights
from ofengine.data.batches import Batches
from ofengine.data.generators import (
    global_states,
    same_state,
    set_global_states,
    set_states_in,
)
from ofengine.data.steps import Resumption
from ofengine.errors import CheckpointError, said_by, warn
from ofengine.rates.joint import JointPlan
from ofengine.rates.resume import resume_plan
from ofengine.run.precision import FULL
from ofengine.run.progress import Point
from ofengine.run.state import Run, State

log = logging.getLogger("ofengine")


class Resumed:
    """A checkpoint of a run, and how it is put into another run, step by step.

    Args:
        checkpoint: a verified file.

    Raises:
        CheckpointError: the file holds weights only, or its state is none of a run.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state is None:
            raise CheckpointError(
                f"{checkpoint.path} holds weights and no run that could be resumed: to start from "
                "them, call ofengine.load_weights(task, path) and fit without ckpt_path."
            )
        self._where = f"{checkpoint.path} cannot be resumed"
        check_state(checkpoint.state, self._where)
        self.checkpoint = checkpoint
        self.state = checkpoint.state
        self._point = Point(self.state["loop"]["point"])
        self._random_before = global_states()
        self._loggers_before: Optional[Attributes] = None
        self._owners = Matches([], [])
        self._at_cut: Optional[State] = None
        """What the run goes on with within an epoch that was cut short."""

    def moments(self) -> State:
        """What a checkpoint would hold now: this place is not left yet."""
        return {key: self.state[key] for key in MOMENTS if key in self.state}

    def tell_loggers(self, run: Run, continue_files: bool) -> None:
        """Let the loggers know of the run before; nothing is written yet."""
        states = self.state["loggers"]
        own = [describe_owner(each) for each in run.loggers]
        owners = Matches(
            [i if i < len(states) else None for i in range(len(own))],
            list(range(len(own), len(states))),
        )  # as in files of earlier versions, which do not say whose they are
        if "logger_keys" in self.state:
            owners = match(self.state["logger_keys"], own)
        self._loggers_before = Attributes(run.loggers)
        for each, index in zip(run.loggers, owners.of_own):
            if index is not None and states[index]:
                with self._taken_whole(each, "load_state_dict"):
                    each.check_state_dict(states[index])
                    each.load_state_dict(states[index], continue_files=continue_files)
        for index in owners.lost:
            if states[index]:
                keys = self.state.get("logger_keys")
                what = "a logger" if keys is None else in_words(keys[index])
                warn(f"the checkpoint has a state of {what}, and there is none now: it is lost.")

    # -------------------------------------------------- before on_fit_start

    def check(self, run: Run, policy: str) -> None:
        """Raise an :class:`OFEngineError` where anything does not fit; change nothing.

        The loggers, and the global generators, are then as they were before ``fit``.
        """
        own = [describe_owner(each) for each in run.callbacks]
        try:
            self._owners = match(self.state["callbacks"], own)
            check_run(run, self.checkpoint, policy, self._owners)
        except BaseException:
            self._leave_as_before()
            raise

    def _leave_as_before(self) -> None:
        set_global_states(self._random_before)
        if self._loggers_before is not None:
            self._loggers_before.put_back()

    @contextlib.contextmanager
    def _taken_whole(self, owner: Any, method: str, undo: Optional[Undo] = None) -> Iterator[None]:
        """All of the checkpoint is taken up, or nothing: what ``owner`` raises undoes the rest."""
        try:
            yield
        except BaseException as error:
            if undo is not None:
                undo.put_back()
            self._leave_as_before()
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"{self._where}, and nothing was changed: {type(owner).__name__}.{method} raised "
                f"{said_by(error)}."
            ) from error

    def restore_run(self, run: Run) -> None:
        """Weights, optimizer, counters and callbacks; everything was checked before.

        Raises :class:`CheckpointError` where a callback or the task cannot take its state; all is
        then as it was before.
        """
        state, begun, loop = self.state, self.state["run"], self.state["loop"]
        others = other_optimizers(run)
        undo = Undo(run, others.values())
        with self._taken_whole(self, "restore_run", undo):
            copy_weights(run.task, self.checkpoint.weights)
            put_tensors(run.task, state.get("tensors", {}), run.settings.device)
            for owner, each in of_each(state).items():
                part, optimizer = run.each()[owner], each["optimizer"]
                states = {name: tensors_of(run, kept) for name, kept in optimizer["states"].items()}
                part.training_mode.load_optimizer_state(optimizer["steps"], states)
                part.progress.global_step = each["rates"]["step"]
            put_others(others, state.get("optimizers", {}), run.settings.device)
            run.id, run.data_seed = begun["id"], begun["run_seed"]
            run.seconds_before = begun["seconds"]
            run.changed_before = {*state.get("tensors", {}), *state.get("seen", {})}
            run.progress.load(loop, run.settings.world_size)
            run.should_stop = loop["should_stop"]
            run.cut_short = loop["cut_short"]
            run.at_cut = noted_in(state, run.callbacks, self._owners)
            self._at_cut = run.at_cut if goes_on(run, run.at_cut) else None
            if "history" in state:
                run.history.load(state["history"])
            self._tell_differences(run)
            self._restore_callbacks(run, undo)
            with self._taken_whole(run.task, "on_load_checkpoint", undo):
                hand_back(run.task, (self._at_cut or state)["task"])
        log.info(
            "resuming from %s: epoch %d, step %d.",
            self.checkpoint.path, run.progress.epoch, run.progress.global_step,
        )  # fmt: skip

    def _restore_callbacks(self, run: Run, undo: Undo) -> None:
        kept = self.state["callbacks"]
        noted = [None] * len(run.callbacks) if self._at_cut is None else self._at_cut["callbacks"]
        for callback, index, before in zip(run.callbacks, self._owners.of_own, noted):
            if index is None:
                continue
            state = kept[index]["state"] if before is None else before
            if state:
                with self._taken_whole(callback, "load_state_dict", undo):
                    callback.load_state_dict(state)
        random = self.state["random"].get("callbacks", [{}] * len(kept))
        for index in self._owners.lost:
            if kept[index]["state"] or random[index]:
                warn(
                    f"the checkpoint has a state of {in_words(kept[index])}, and no such callback "
                    "is listed now: its state is lost."
                )

    def _tell_differences(self, run: Run) -> None:
        if run.settings.device.type == "cpu":
            tell_kernels(self.state["versions"], run.settings.cpu_speedups)
        if run.seed is not None and run.seed != self.state["run"]["seed"]:
            warn(
                f"the run was begun with seed={self.state['run']['seed']} and goes on with "
                f"seed={run.seed}: epochs from the next on are shuffled by the new one."
            )
        elif run.seed is None:
            run.seed = self.state["run"]["seed"]
        precision = self.state["run"].get("precision", FULL)
        if precision != run.settings.precision:
            warn(
                f'the run was begun with precision="{precision}" and goes on with '
                f'precision="{run.settings.precision}": it does not go on exactly.'
            )
        for name, each in of_each(self.state).items():
            self._tell_options(run.each()[name], each["optimizer"]["options"])

    def _tell_options(self, run: Run, options: List[State]) -> None:
        # What the optimizer writes itself is in files of earlier versions.
        untold = {"lr_scale", "lr_decay_scale", "name", *own_options(run.made.optimizer)}
        for group, kept, own in zip(run.rates.names, options, plain_options(run)):
            for key in sorted({*kept, *own} - untold):
                if key in kept and key in own and kept[key] == own[key]:
                    continue
                before, now = (
                    repr(each[key]) if key in each else "not set" for each in (kept, own)
                )
                if before != now:  # a NaN is not equal to itself
                    log.info(
                        "resume: %s of group %r was %s in the checkpoint and is %s by the code, "
                        "which counts.", key, group, before, now,
                    )  # fmt: skip

    # -------------------------------------------------- after on_fit_start

    def restore_rates(self, run: Run, policy: str) -> None:
        """Let the plan go on; say where checkpoint and code disagree."""
        kept = {name: each["rates"] for name, each in of_each(self.state).items()}
        for name, part in run.each().items():
            of_whom = f"optimizer {name!r}: " if name else ""
            for line in resume_plan(part.rates, part.made, kept[name], policy):
                log.info("resume: %s%s", of_whom, line)
        if isinstance(run.rates, JointPlan):  # all of them have known the same epochs
            run.rates.resume(next(iter(kept.values()))["calendar"], run.progress.global_step)

    # -------------------------------------------------- in the loop

    def restore_training(self, run: Run) -> None:
        """Metrics, before ``on_train_start``."""
        run.metrics.load_state(self.state["metrics"])

    def enter(self, run: Run, train: Batches) -> Optional[Entry]:
        """Generators and layers; how the epoch goes on, None where it was over."""
        loop, random = self.state["loop"], self.state["random"]
        train.pass_seed = (run.data_seed, loop["epoch"])
        if self.state["run"]["seed"] is not None and self._point is not Point.BEGIN:
            train.reseed(0)  # its samplers share a generator, as in an epoch that is begun
        train.hold(self.state["random_at_pass"])
        for each, states in zip(run.validation, self.state.get("random_at_validation", [])):
            each.hold(states)
        self._set_states(run, train, random, tells=True)
        self._restore_layers(run)
        run.telling.owed = self._owners.at(loop.get("untold", []), run.callbacks, run.task)
        tensors = self.state.get("tensors", {})
        lost = put_tensors(run.task, tensors, run.settings.device)  # on_train_start may make some
        put_others(other_optimizers(run), self._other_states(run), run.settings.device)
        point, entry = self._point, None
        if point in (Point.EPOCH_END, Point.OVER):
            if run.can_go_on_within(loop):
                entry = self._mid_epoch(run, train, Point.READY)
                run.progress.epoch = loop["epoch"]
                run.metrics.load_state(loop["cut_short"])
                run.progress.point, run.telling.owed = Point.READY, []
        elif point is Point.EPOCH_START:
            entry = Entry(None, self.state)
        elif point is not Point.BEGIN:
            entry = self._mid_epoch(run, train, point)
        if entry is not None:
            run.cut_short = None
            if entry.data is None and run.is_done() and not run.should_stop:
                entry = None
        elif run.cut_short is not None:  # nothing is to be done, and the epoch stays open
            train.states_at_start = self.state["random_at_pass"]
            self._check_order(train)
            Entry(None, self.state).restore_step_state(run)
        seen, of_data = split_by_data(run, self.state.get("seen", {}))
        if entry is None or entry.data is None or not entry.data.done:  # else see _reached
            seen = {**seen, **of_data}
            run.moments_resumed = None
        path = str(self.checkpoint.path)
        tell_of_readers(run, path)
        tell_of_what_is_missing(run, seen, lost, path, within_epoch=entry is not None)
        return entry

    def _other_states(self, run: Run) -> State:
        """What other optimizers kept that fits those of now, which hooks may have made anew."""
        kept, others, fitting = self.state.get("optimizers", {}), other_optimizers(run), {}
        for place, state in kept.items():
            try:
                check_others(others, {place: state}, self._where)
            except CheckpointError as error:
                warn(f"{error} What it kept is lost.")
                continue
            fitting[place] = state
            if place not in others:
                warn(f"the checkpoint has a state of the optimizer {place}, which is gone.")
        return fitting

    def _mid_epoch(self, run: Run, train: Batches, point: Point) -> Entry:
        loop = self.state["loop"]
        done = loop["batches_done"]
        if train.count != loop["epoch_length"]:
            warn(
                f"{train.what} has {train.count} batches, and had {loop['epoch_length']} in the "
                "checkpoint: the run cannot go on exactly."
            )
        data = Resumption(
            done=done,
            again=done > 0 and (point is not Point.READY or run.is_done()),
            begin=lambda: train.set_states(self.state["random_at_pass"]),
            reached=lambda: self._reached(run, train),
            watch=(lambda batches: self._watched(train, batches))
            if loop.get("half_made")
            else None,
        )
        return Entry(data, self.state)

    def _reached(self, run: Run, train: Batches) -> None:
        """Behind the batches that were done: is it where the run before was?"""
        self._set_states(run, train, self.state["random"])
        run.moments_resumed = run.at_cut = None  # until here, generators stood somewhere on the way
        _, of_data = split_by_data(run, self.state.get("seen", {}))
        tell_of_what_is_missing(run, of_data, [], str(self.checkpoint.path), within_epoch=True)
        self._check_order(train)

    def _check_order(self, train: Batches) -> None:
        kept, last = self.state.get("order"), self.state["loop"]["batches_done"] - 1
        now = train.order.digest(last)
        if kept is not None and now is None:
            train.order.known[last] = kept  # for the next checkpoint
        elif kept not in (None, now):
            tell_of_other_batches(train.what)

    def _watched(self, train: Batches, batches: Iterator[Any]) -> Iterator[Any]:
        """The first batch, of which a part was made before the run was stopped.

        What its samples had drawn by then is not drawn again; told where they draw at all.
        """
        before = train.states()
        for batch in itertools.islice(batches, 1):
            if not same_state(before, train.states()):
                warn(
                    f"{self.checkpoint.path} was saved while a batch of {train.what} was being "
                    "made, and making one draws random numbers in the main process: those that "
                    "were drawn by then are not drawn again, so that the run does not go on "
                    "exactly. A DataLoader with num_workers=1 or more does."
                )
            yield batch

    def _restore_layers(self, run: Run) -> None:
        """What hooks have frozen, or put into eval mode, since the epoch began or before."""
        kept = self._at_cut or self.state["loop"]
        frozen, in_eval_mode = set(kept["frozen"]), set(kept["in_eval_mode"])
        others = [
            (name, parameter)
            for name, parameter in run.task.named_parameters()
            if parameter.requires_grad is (name in frozen)
        ]
        for name, parameter in others:
            parameter.requires_grad_(name not in frozen)
        if others:
            log.info(
                "resume: %d parameters are frozen or train again as in the checkpoint, and not as "
                "the code has them at the start: %s%s.",
                len(others), others[0][0], ", ..." if len(others) > 1 else "",
            )  # fmt: skip
        modules = dict(run.task.named_modules())
        gone = sorted(in_eval_mode - set(modules))
        if gone:
            warn(f"the checkpoint has a layer in eval mode that is gone: {gone[0]}.")
        for name, module in modules.items():
            module.training = name not in in_eval_mode

    def _set_states(self, run: Run, train: Batches, random: State, tells: bool = False) -> None:
        set_global_states(random["global"])
        missing = set_states_in(None, train.source, random["data"])
        missing += set_states_in(run.task, None, random["task"])
        for loader, states in zip(run.validation, random.get("validation", [])):
            missing += set_states_in(None, loader.source, states)
        for callback, index in zip(run.callbacks, self._owners.of_own):
            if index is not None and "callbacks" in random:
                missing += set_states_in(None, None, random["callbacks"][index], callback)
        extra = random.get("validation", [])[len(run.validation) :]
        missing += [place for states in extra for place in states]
        if missing and tells:
            some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
            warn(f"the checkpoint has the state of a random generator that is gone: {some}.")
