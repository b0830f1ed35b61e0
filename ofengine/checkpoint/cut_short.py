"""An epoch that ends because training does: what its end changes, and how that is taken back.

The hooks of its end are fired where it is cut short, and once more at its real end, in a run that
is resumed with other limits. So that run begins with what was noted before they were fired first.
"""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Sequence

import numpy as np
import oneflow as flow

from ofengine._oneflow.session import synchronize
from ofengine.checkpoint.file import array_of
from ofengine.checkpoint.of_task import kept_by
from ofengine.checkpoint.owners import Matches
from ofengine.data.structure import copied
from ofengine.run.state import Run, State
from ofengine.task import TaskModule


def frozen_in(task: TaskModule) -> List[str]:
    """The parameters that do not train, by name."""
    return [name for name, each in task.named_parameters() if not each.requires_grad]


def eval_layers_in(task: TaskModule) -> List[str]:
    """The layers that are in eval mode, by name."""
    return [name for name, each in task.named_modules() if not each.training]


def noted_at_cut(run: Run) -> State:
    """What the hooks that are fired at the end of an epoch may change, as it is now.

    Not of the callbacks that fire last: what they say of the files that they write then is true.
    """
    run.training_mode.settle()
    synchronize()
    states = [None if each.fires_last else each.state_dict() for each in run.callbacks]
    return {
        "should_stop": run.should_stop,
        "callbacks": copied(states),
        "task": copied(kept_by(run.task)),
        "frozen": frozen_in(run.task),
        "in_eval_mode": eval_layers_in(run.task),
    }


def part_at_cut(noted: Optional[State], state: State) -> State:
    """The part of a checkpoint's ``state`` with what was ``noted``; what is the same is None."""
    if noted is None or state["loop"]["cut_short"] is None:
        return {}
    now = [each["state"] for each in state["callbacks"]]
    callbacks = [_unless_same(*each) for each in zip(noted["callbacks"], now)]
    task = _unless_same(noted["task"], state["task"])
    return {"at_cut": copied({**noted, "callbacks": callbacks, "task": task})}


def noted_in(state: Mapping[str, Any], callbacks: Sequence[Any], owners: Matches) -> Any:
    """What was noted by the run of a checkpoint, for the ``callbacks`` of now; None if nothing.

    A callback that fires last, or that has no state in the file, has None there.
    """
    part = state.get("at_cut")
    if part is None:
        return None
    states = [
        None if index is None or callback.fires_last else state_at_cut(state, index)
        for callback, index in zip(callbacks, owners.of_own)
    ]
    task = state["task"] if part["task"] is None else part["task"]
    return {**part, "callbacks": states, "task": task}


def state_at_cut(state: Mapping[str, Any], index: int) -> Any:
    """What a checkpoint has of the callback at ``index``, where its run was cut short."""
    before = state["at_cut"]["callbacks"][index] if "at_cut" in state else None
    return state["callbacks"][index]["state"] if before is None else before


def goes_on(run: Run, noted: Optional[State]) -> bool:
    """True where the run will go on within the epoch: it then stops as it did before the cut.

    Its counters are those of the checkpoint by now; its clock does not run yet.
    """
    if noted is None:
        return False
    most, after = run.settings.max_time, run.should_stop
    run.should_stop = noted["should_stop"]
    if run.resumes_within_epoch and (most is None or run.seconds_before < most):
        return True
    run.should_stop = after
    return False


def _unless_same(before: Any, now: Any) -> Any:
    return None if before is None or _same(before, now) else before


def _same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit, nested, as a file has it: a tensor is an array, a tuple a list."""
    ours, theirs = (
        array_of(each) if isinstance(each, flow.Tensor) else each for each in (ours, theirs)
    )
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return set(ours) == set(theirs) and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return same and ours.dtype != object and ours.tobytes() == theirs.tobytes()
    return type(ours) is type(theirs) and repr(ours) == repr(theirs)
