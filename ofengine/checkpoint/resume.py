"""How a run goes on from a checkpoint, as if it had never stopped."""

from __future__ import annotations

import logging
from typing import Any, Dict, Optional

import attrs
import numpy as np
import oneflow as flow

from ofengine.checkpoint.file import Checkpoint
from ofengine.checkpoint.snapshot import plain_options
from ofengine.checkpoint.weights import check_weights, copy_weights
from ofengine.data.batches import Batches, Resumption
from ofengine.data.generators import set_global_states, set_states_in
from ofengine.errors import CheckpointError, warn
from ofengine.rates.planning import new_plan
from ofengine.rates.resume import check_groups_fit, resume_plan
from ofengine.run.progress import Point
from ofengine.run.state import Run, State

log = logging.getLogger("ofengine")


@attrs.define
class Entry:
    """How a resumed run enters the epoch that it was stopped in."""

    data: Optional[Resumption]
    state: State

    def restore_step_state(self, run: Run) -> None:
        """What the loop has in its hands in the middle of an epoch."""
        run.training_mode.load_gradients(_tensors(run, self.state["gradients"]))


class Resumed:
    """A checkpoint of a run, and how it is put into another run, step by step.

    Args:
        checkpoint: a verified file.

    Raises:
        CheckpointError: the file holds weights only.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state is None:
            raise CheckpointError(
                f"{checkpoint.path} holds weights and no run that could be resumed: to start from "
                "them, call ofengine.load_weights(task, path) and fit without ckpt_path."
            )
        self.checkpoint = checkpoint
        self.state = checkpoint.state
        self._point = Point(self.state["loop"]["point"])

    def moments(self) -> State:
        """What a checkpoint would hold now: this place is not left yet."""
        keys = ("loop", "metrics", "random", "random_at_pass", "gradients")
        later = {"random_at_validation": self.state.get("random_at_validation", [])}
        return {**{key: self.state[key] for key in keys}, **later}

    def tell_loggers(self, run: Run, continue_files: bool) -> None:
        """Let the loggers know of the run before; nothing is written yet."""
        for each, kept in zip(run.loggers, self.state["loggers"]):
            if kept:
                each.load_state_dict(kept, continue_files=continue_files)

    # -------------------------------------------------- before on_fit_start

    def check(self, run: Run, policy: str) -> None:
        """Raise an :class:`OFEngineError` where anything does not fit; change nothing."""
        task, state, path = run.task, self.state, self.checkpoint.path
        check_weights(task, self.checkpoint.weights, str(path))
        kept, own = state["optimizer"]["class"], type(run.made.optimizer).__qualname__
        if kept != own:
            raise CheckpointError(
                f"{path} was trained with {kept}, and configure_optimizers() returns {own}, whose "
                f"state is another: use {kept}, or start anew from the weights with "
                "ofengine.load_weights(task, path)."
            )
        check_groups_fit(run.rates, state["rates"])
        anew = new_plan(run.settings, run.made, run.rates.groups, run.batches_per_epoch)
        resume_plan(anew, run.made, state["rates"], policy)
        parameters = dict(task.named_parameters())
        for name, kept_states in state["optimizer"]["states"].items():
            for key, array in kept_states.items():
                if name not in parameters or tuple(parameters[name].shape) != array.shape:
                    raise CheckpointError(
                        f"{path} is of another run: its optimizer keeps {key!r} of {name!r} in the "
                        f"shape {array.shape}, which no parameter of {type(task).__name__} has."
                    )
        accumulate = state["run"]["accumulate_grad_batches"]
        if accumulate != run.settings.accumulate_grad_batches:
            text = (
                f"accumulate_grad_batches was {accumulate} in {path} and is "
                f"{run.settings.accumulate_grad_batches} now"
            )
            if state["gradients"]:
                raise CheckpointError(
                    f"{text}, and the checkpoint lies within a window: resume with {accumulate}."
                )
            warn(f"{text}: steps and epochs are counted with the new one from the start.")

    def restore_run(self, run: Run) -> None:
        """Weights, optimizer, counters and callbacks; everything was checked before."""
        state, begun, loop = self.state, self.state["run"], self.state["loop"]
        copy_weights(run.task, self.checkpoint.weights)
        optimizer = state["optimizer"]
        states = {name: _tensors(run, kept) for name, kept in optimizer["states"].items()}
        run.training_mode.load_optimizer_state(optimizer["steps"], states)
        run.id, run.data_seed = begun["id"], begun["run_seed"]
        run.seconds_before = begun["seconds"]
        run.progress.load(loop)
        run.should_stop = loop["should_stop"]
        run.cut_short = loop["cut_short"]
        self._tell_differences(run)
        self._restore_callbacks(run)
        run.task.on_load_checkpoint(state["task"])
        log.info(
            "resuming from %s: epoch %d, step %d.",
            self.checkpoint.path, run.progress.epoch, run.progress.global_step,
        )  # fmt: skip

    def _restore_callbacks(self, run: Run) -> None:
        waiting = list(self.state["callbacks"])
        for callback in run.callbacks:
            name = type(callback).__qualname__
            kept = next((each for each in waiting if each["class"] == name), None)
            if kept is not None:
                waiting.remove(kept)
                if kept["state"]:
                    callback.load_state_dict(kept["state"])
        for each in waiting:
            if each["state"]:
                warn(
                    f"the checkpoint has a state of {each['class']}, and no such callback is "
                    "listed now: its state is lost."
                )

    def _tell_differences(self, run: Run) -> None:
        if run.seed is not None and run.seed != self.state["run"]["seed"]:
            warn(
                f"the run was begun with seed={self.state['run']['seed']} and goes on with "
                f"seed={run.seed}: epochs from the next on are shuffled by the new one."
            )
        elif run.seed is None:
            run.seed = self.state["run"]["seed"]
        for group, kept, own in zip(
            run.rates.names, self.state["optimizer"]["options"], plain_options(run)
        ):
            for key in sorted(set(kept) & set(own)):
                before = kept[key]
                now = list(own[key]) if isinstance(own[key], tuple) else own[key]
                if before != now and key not in ("lr_scale", "lr_decay_scale", "name"):
                    log.info(
                        "resume: %s of group %r was %r in the checkpoint and is %r by the code, "
                        "which counts.", key, group, before, now,
                    )  # fmt: skip

    # -------------------------------------------------- after on_fit_start

    def restore_rates(self, run: Run, policy: str) -> None:
        """Let the plan go on; say where checkpoint and code disagree."""
        for line in resume_plan(run.rates, run.made, self.state["rates"], policy):
            log.info("resume: %s", line)

    # -------------------------------------------------- in the loop

    def restore_training(self, run: Run) -> None:
        """Metrics, before ``on_train_start``."""
        run.metrics.load_state(self.state["metrics"])

    def enter(self, run: Run, train: Batches) -> Optional[Entry]:
        """Generators and layers; how the epoch goes on, None where it was over."""
        run.moments_resumed = None
        loop, random = self.state["loop"], self.state["random"]
        train.pass_seed = (run.data_seed, loop["epoch"])
        train.hold(self.state["random_at_pass"])
        for each, states in zip(run.validation, self.state.get("random_at_validation", [])):
            each.hold(states)
        self._set_states(run, train, random)
        self._restore_layers(run)
        point, entry = self._point, None
        if point in (Point.EPOCH_END, Point.OVER):
            if run.can_go_on_within(loop):
                entry = self._mid_epoch(run, train, Point.READY)
                run.progress.epoch = loop["epoch"]
                run.metrics.load_state(loop["cut_short"])
                run.progress.point = Point.READY
        elif point is Point.EPOCH_START:
            entry = Entry(None, self.state)
        elif point is not Point.BEGIN:
            entry = self._mid_epoch(run, train, point)
        if entry is not None:
            run.cut_short = None
            if entry.data is None and run.is_done() and not run.should_stop:
                return None
        return entry

    def _mid_epoch(self, run: Run, train: Batches, point: Point) -> Entry:
        loop = self.state["loop"]
        done = loop["batches_done"]
        if train.count is not None and done > train.count:
            raise CheckpointError(
                f"{self.checkpoint.path} was saved after {done} batches of epoch {loop['epoch']}, "
                f"and {train.what} has {train.count} now: resume with the data it was begun with."
            )
        if train.count != loop["epoch_length"]:
            warn(
                f"{train.what} has {train.count} batches, and had {loop['epoch_length']} in the "
                "checkpoint: the run cannot go on exactly."
            )
        data = Resumption(
            done=done,
            again=done > 0 and (point is not Point.READY or run.is_done()),
            begin=lambda: train.set_states(self.state["random_at_pass"]),
            reached=lambda: self._set_states(run, train, self.state["random"]),
        )
        return Entry(data, self.state)

    def _restore_layers(self, run: Run) -> None:
        """What hooks have frozen, or put into eval mode, since the epoch began or before."""
        loop = self.state["loop"]
        frozen, in_eval_mode = set(loop["frozen"]), set(loop["in_eval_mode"])
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
        for name, module in run.task.named_modules():
            module.training = name not in in_eval_mode

    def _set_states(self, run: Run, train: Batches, random: State) -> None:
        set_global_states(random["global"])
        set_states_in(None, train.source, random["data"])
        missing = set_states_in(run.task, None, random["task"])
        for loader, states in zip(run.validation, random.get("validation", [])):
            set_states_in(None, loader.source, states)
        if missing:
            warn(f"the checkpoint has the state of a random generator that is gone: {missing[0]}.")


def _tensors(run: Run, arrays: Dict[str, np.ndarray]) -> Dict[str, Any]:
    return {name: flow.tensor(array).to(run.settings.device) for name, array in arrays.items()}
