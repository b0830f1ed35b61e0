"""How a run goes on from a checkpoint, as if it had never stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union

import attrs
import numpy as np
import oneflow as flow

from ofengine import connect, course
from ofengine.checkpoint import (
    EXTENSION,
    Checkpoint,
    check_weights,
    copy_weights,
    read,
)
from ofengine.course import Point
from ofengine.data import Batches, Resumption
from ofengine.errors import CheckpointError, warn
from ofengine.generators import set_global_states, set_states_in
from ofengine.rates.resume import check_groups_fit, resume_plan
from ofengine.snapshot import State, plain_options

if TYPE_CHECKING:
    from ofengine.state import RunState
    from ofengine.trainer import Trainer

log = logging.getLogger("ofengine")

# ---------------------------------------------------------------------- finding


def find_checkpoint(
    trainer: Trainer, ckpt_path: Union[str, Path], since: float = 0.0
) -> Optional[Checkpoint]:
    """Read the file ``ckpt_path``; for "last" the newest whole one, None where there is none.

    "last" looks only at files written after ``since`` (seconds since 1970).
    """
    if str(ckpt_path) != "last":
        return read(ckpt_path)
    folders = checkpoint_folders(trainer)
    found = [path for folder in folders for path in folder.glob(f"*{EXTENSION}")]
    found = [path for path in found if _written_at(path) >= since]
    for path in sorted(found, key=_written_at, reverse=True):
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            warn(f"ckpt_path='last' passes over a checkpoint: {error}")
            continue
        if checkpoint.state is not None:
            return checkpoint
    return None


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def checkpoint_folders(trainer: Trainer) -> List[Path]:
    """Where "last" looks: the callbacks' own folders, else those below ``default_root_dir``."""
    own = [getattr(callback, "dirpath", None) for callback in trainer.callbacks]
    folders = [Path(folder) for folder in own if folder is not None]
    if not folders or len(folders) < len([c for c in trainer.callbacks if hasattr(c, "dirpath")]):
        roots = [Path(trainer.default_root_dir)]
        roots += [root for each in trainer.loggers for root in each.run_dirs()]
        folders += [root / "checkpoints" for root in roots]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


# ---------------------------------------------------------------------- resuming


@attrs.define
class Entry:
    """How a resumed run enters the epoch that it was stopped in."""

    data: Optional[Resumption]
    state: State

    def restore_step_state(self, trainer: Trainer) -> None:
        """What the loop has in its hands in the middle of an epoch."""
        loop = self.state["loop"]
        trainer.batch_idx = loop["batches_done"] - 1
        trainer.fit_runner.load_gradients(_tensors(trainer, self.state["gradients"]))


class Resumed:
    """A checkpoint of a run, and how it is put into a trainer, step by step.

    Args:
        trainer: the trainer of the run that goes on.
        checkpoint: a verified file.

    Raises:
        CheckpointError: the file holds weights only.
    """

    def __init__(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        if checkpoint.state is None:
            raise CheckpointError(
                f"{checkpoint.path} holds weights and no run that could be resumed: to start from "
                "them, call ofengine.load_weights(task, path) and fit without ckpt_path."
            )
        self.checkpoint = checkpoint
        self.state = checkpoint.state
        self._point = Point(self.state["loop"]["point"])

    def moments(self) -> State:
        """What :func:`state_of_run` would save now: this place is not left yet."""
        keys = ("loop", "metrics", "random", "random_at_pass", "gradients")
        later = {"random_at_validation": self.state.get("random_at_validation", [])}
        return {**{key: self.state[key] for key in keys}, **later}

    def tell_loggers(self, trainer: Trainer, continue_files: bool) -> None:
        """Let the loggers know of the run before; nothing is written yet."""
        for each, kept in zip(trainer.loggers, self.state["loggers"]):
            if kept:
                each.load_state_dict(kept, continue_files=continue_files)

    def is_within_epoch(self, trainer: RunState) -> bool:
        """True where the run goes on in the middle of an epoch."""
        if self._point in (Point.EPOCH_END, Point.OVER):
            return self._is_unfinished(trainer)
        return self._point is not Point.BEGIN

    # -------------------------------------------------- before on_fit_start

    def check(self, trainer: Trainer, policy: str) -> None:
        """Raise an :class:`OFEngineError` where anything does not fit; change nothing."""
        task, state, path = trainer.task, self.state, self.checkpoint.path
        check_weights(task, self.checkpoint.weights, str(path))
        kept, own = state["optimizer"]["class"], type(trainer.optimizer).__qualname__
        if kept != own:
            raise CheckpointError(
                f"{path} was trained with {kept}, and configure_optimizers() returns {own}, whose "
                f"state is another: use {kept}, or start anew from the weights with "
                "ofengine.load_weights(task, path)."
            )
        check_groups_fit(trainer.rates, state["rates"])
        resume_plan(connect.plan_anew(trainer), trainer.made, state["rates"], policy)
        parameters = dict(task.named_parameters())
        for name, kept_states in state["optimizer"]["states"].items():
            for key, array in kept_states.items():
                if name not in parameters or tuple(parameters[name].shape) != array.shape:
                    raise CheckpointError(
                        f"{path} is of another run: its optimizer keeps {key!r} of {name!r} in the "
                        f"shape {array.shape}, which no parameter of {type(task).__name__} has."
                    )
        accumulate = state["run"]["accumulate_grad_batches"]
        if accumulate != trainer.accumulate_grad_batches:
            text = (
                f"accumulate_grad_batches was {accumulate} in {path} and is "
                f"{trainer.accumulate_grad_batches} now"
            )
            if state["gradients"]:
                raise CheckpointError(
                    f"{text}, and the checkpoint lies within a window: resume with {accumulate}."
                )
            warn(f"{text}: steps and epochs are counted with the new one from the start.")

    def restore_run(self, trainer: Trainer) -> None:
        """Weights, optimizer, counters and callbacks; everything was checked before."""
        state, run, loop = self.state, self.state["run"], self.state["loop"]
        copy_weights(trainer.task, self.checkpoint.weights)
        optimizer = state["optimizer"]
        states = {name: _tensors(trainer, kept) for name, kept in optimizer["states"].items()}
        trainer.fit_runner.load_optimizer_state(optimizer["steps"], states)
        trainer.run_id, trainer.run_seed = run["id"], run["run_seed"]
        trainer.seconds_before = run["seconds"]
        trainer.steps_done, trainer.batches_seen = loop["global_step"], loop["batches_seen"]
        trainer.current_epoch = loop["epoch"] + (self._point is Point.OVER)
        trainer.should_stop = loop["should_stop"]
        trainer.cut_short = loop["cut_short"]
        self._tell_differences(trainer)
        self._restore_callbacks(trainer)
        trainer.task.on_load_checkpoint(state["task"])
        log.info(
            "resuming from %s: epoch %d, step %d.",
            self.checkpoint.path, trainer.current_epoch, trainer.global_step,
        )  # fmt: skip

    def _restore_callbacks(self, trainer: Trainer) -> None:
        waiting = list(self.state["callbacks"])
        for callback in trainer.callbacks:
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

    def _tell_differences(self, trainer: Trainer) -> None:
        if trainer.seed is not None and trainer.seed != self.state["run"]["seed"]:
            warn(
                f"the run was begun with seed={self.state['run']['seed']} and goes on with "
                f"seed={trainer.seed}: epochs from the next on are shuffled by the new one."
            )
        elif trainer.seed is None:
            trainer.seed = self.state["run"]["seed"]
        for group, kept, own in zip(
            trainer.rates.names, self.state["optimizer"]["options"], plain_options(trainer)
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

    def restore_rates(self, trainer: Trainer, policy: str) -> None:
        """Let the plan go on; say where checkpoint and code disagree."""
        for line in resume_plan(trainer.rates, trainer.made, self.state["rates"], policy):
            log.info("resume: %s", line)

    # -------------------------------------------------- in the loop

    def restore_training(self, trainer: Trainer) -> None:
        """Metrics and place, before ``on_train_start``."""
        trainer.metrics.load_state(self.state["metrics"])
        trainer.point = self._point
        trainer.batch_idx = self.state["loop"]["batches_done"] - 1

    def enter(self, trainer: Trainer, train: Batches) -> Optional[Entry]:
        """Generators and layers; how the epoch goes on, None where it was over."""
        trainer.resumed = None
        loop, random = self.state["loop"], self.state["random"]
        train.pass_seed = (trainer.run_seed, loop["epoch"])
        train.hold(self.state["random_at_pass"])
        for each, states in zip(
            trainer.validation_batches, self.state.get("random_at_validation", [])
        ):
            each.hold(states)
        self._set_states(trainer, train, random)
        self._restore_layers(trainer)
        point, entry = self._point, None
        if point in (Point.EPOCH_END, Point.OVER):
            if self._is_unfinished(trainer):
                entry = self._mid_epoch(trainer, train, Point.READY)
                trainer.current_epoch = loop["epoch"]
                trainer.metrics.load_state(loop["cut_short"])
                trainer.point = Point.READY
        elif point is Point.EPOCH_START:
            entry = Entry(None, self.state)
        elif point is not Point.BEGIN:
            entry = self._mid_epoch(trainer, train, point)
        if entry is not None:
            trainer.cut_short = None
            if entry.data is None and course.is_done(trainer) and not trainer.should_stop:
                return None
        return entry

    def _is_unfinished(self, trainer: RunState) -> bool:
        """True where the epoch was cut short by a limit that is no limit any more."""
        loop = self.state["loop"]
        if loop["cut_short"] is None:
            return False
        epochs_left = trainer.max_epochs == -1 or loop["epoch"] < trainer.max_epochs
        return (
            epochs_left and not trainer.should_stop and not course.is_out_of_time_or_steps(trainer)
        )

    def _mid_epoch(self, trainer: Trainer, train: Batches, point: Point) -> Entry:
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
            again=done > 0 and (point is not Point.READY or course.is_done(trainer)),
            begin=lambda: train.set_states(self.state["random_at_pass"]),
            reached=lambda: self._set_states(trainer, train, self.state["random"]),
        )
        return Entry(data, self.state)

    def _restore_layers(self, trainer: Trainer) -> None:
        """What hooks have frozen, or put into eval mode, since the epoch began or before."""
        loop = self.state["loop"]
        frozen, in_eval_mode = set(loop["frozen"]), set(loop["in_eval_mode"])
        others = [
            (name, parameter)
            for name, parameter in trainer.task.named_parameters()
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
        for name, module in trainer.task.named_modules():
            module.training = name not in in_eval_mode

    def _set_states(self, trainer: Trainer, train: Batches, random: State) -> None:
        set_global_states(random["global"])
        set_states_in(None, train.source, random["data"])
        missing = set_states_in(trainer.task, None, random["task"])
        for loader, states in zip(trainer.validation_batches, random.get("validation", [])):
            set_states_in(None, loader.source, states)
        if missing:
            warn(f"the checkpoint has the state of a random generator that is gone: {missing[0]}.")


def _tensors(trainer: Trainer, arrays: Dict[str, np.ndarray]) -> Dict[str, Any]:
    return {name: flow.tensor(array).to(trainer.device) for name, array in arrays.items()}
