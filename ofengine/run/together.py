"""What the ranks of a run do and decide together, besides the gradients and the metrics.

Where one process is alone, each of these does nothing, or what it would do alone.
"""

from __future__ import annotations

import hashlib
from typing import Any, Callable, Dict, List, Optional, Sequence

import attrs
import numpy as np
import oneflow as flow

from ofengine.checkpoint.file import as_read
from ofengine.checkpoint.resume import Resumed
from ofengine.data.batches import Batches
from ofengine.data.generators import (
    global_states,
    set_global_states,
    set_states_in,
    states_in,
)
from ofengine.errors import RankError
from ofengine.loggers.silent import SilentLogger
from ofengine.ranks.meetings import Meetings, RestLeftOut, Wishes, same_everywhere
from ofengine.ranks.messages import pack, unpack
from ofengine.ranks.shares import ABSENT
from ofengine.run.progress import Point
from ofengine.run.state import Run

_OF_EACH_RANK = ("device", "world", "default_root_dir")
"""Settings that may differ from rank to rank."""


def begin(run: Run, verb: str) -> None:
    """All ranks carry out ``verb`` with the same settings.

    Raises :class:`RankError` where they do not.
    """
    ranks = run.ranks
    if ranks is None:
        return
    ranks.wishes = lambda: Wishes(
        run.should_stop, run.interrupts.received or 0, run.is_out_of_time(), run.orders.wanted
    )
    ranks.told = lambda agreed: _take(run, agreed)
    settings = attrs.asdict(run.settings, recurse=False)
    told = {name: repr(value) for name, value in settings.items() if name not in _OF_EACH_RANK}
    said = ranks.talk({"verb": verb, "settings": told})
    for key in ("verb", *told):
        values = [each["settings"].get(key, each["verb"]) for each in said]
        if not same_everywhere(values):
            raise RankError(
                f"the ranks of this run differ in {key}: {', '.join(values)}. All ranks run the "
                "same script with the same arguments."
            )


def share_folders(run: Run) -> None:
    """The loggers of all ranks have rank 0's folders, each of which is made where it is not."""
    folders = of_rank_zero(run, lambda: [each.log_dir for each in run.loggers])
    for logger, folder in zip(run.loggers, folders):
        if isinstance(logger, SilentLogger):
            logger.folder = folder


def _take(run: Run, agreed: Wishes) -> None:
    run.should_stop = run.should_stop or agreed.stop
    if agreed.order:
        run.orders.came()


def end(run: Run) -> None:
    """Wait for all ranks: files are written, callbacks of rank 0 alone have told what they know."""
    ranks = run.ranks
    if ranks is None or ranks.over:
        return
    run.metrics.settle()
    own: Any = {}
    if ranks.rank == 0:
        states = [each.state_dict() if each.rank_zero_only else {} for each in run.callbacks]
        own = as_read({"callbacks": states})
    said = ranks.talk(own)
    if ranks.rank:
        for callback, state in zip(run.callbacks, said[0]["callbacks"]):
            if callback.rank_zero_only and state:
                callback.load_state_dict(state)


def of_rank_zero(run: Run, find: Callable[[], Any]) -> Any:
    """What ``find`` gives on rank 0, a plain value, on all ranks."""
    if run.ranks is None:
        return find()
    return run.ranks.talk(find() if run.ranks.rank == 0 else None)[0]


def once_a_machine(run: Run, calls: Sequence[Callable[[], Any]]) -> None:
    """Call each on the first rank of each machine; all go on when it is done everywhere."""
    world = run.settings.world
    if world is None or world.local_rank == 0:
        for call in calls:
            call()
    if run.ranks is not None:
        run.ranks.talk(None)


_AT_ONCE = 64
"""So many batches' predictions a rank tells in one message."""


def all_predictions(run: Run, own: List[Any]) -> List[Any]:
    """What ``predict_step`` returned on all ranks, in the order of one process, on each of them."""
    ranks = run.ranks
    if ranks is None:
        return own
    joined: List[Any] = []
    for start in range(0, max(ranks.talk(len(own))), _AT_ONCE):
        said = ranks.talk([pack(each) for each in own[start : start + _AT_ONCE]])
        for number in range(len(said[0])):
            joined.extend(each[number] for each in said if number < len(each))
    return [unpack(each, run.settings.device) for each in joined]


# ---------------------------------------------------------------------- the beginning of a fit


def share_start(
    run: Run, train: Batches, validation: List[Batches], resumed: Optional[Resumed]
) -> None:
    """Begin with rank 0's weights, buffers, seed and generators; with the same data on all.

    Without a seed, ranks take one: what one of them draws must not depend on the others. A run
    that is resumed goes on with the one that it has.

    Raises :class:`RankError` where the ranks have other models or other amounts of data.
    """
    ranks = run.ranks
    if ranks is None:
        return
    tensors = _tensors(run)
    shapes = [[name, list(each.shape), str(each.dtype)] for name, each in tensors.items()]
    lengths = [train.count, *(each.count for each in validation)]
    random = {
        "global": global_states(),
        "data": [_plain_states(each) for each in (train, *validation)],
    }
    said = ranks.talk(
        {"shapes": shapes, "lengths": lengths, "seed": run.data_seed, "random": random}
        if ranks.rank == 0
        else {"shapes": shapes, "lengths": lengths}
    )
    for what, key in (("models", "shapes"), ("numbers of batches", "lengths")):
        if not same_everywhere([each[key] for each in said]):
            at = next(i for i, each in enumerate(said) if each[key] != said[0][key])
            raise RankError(
                f"rank {at} and rank 0 have other {what}: {_first_difference(said, at, key)}. All "
                "ranks make the same task and the same dataloaders."
            )
    run.data_seed = said[0]["seed"]
    if run.seed is None and (resumed is None or resumed.state["run"]["seed"] is None):
        run.seed = run.data_seed % 2**63
    set_global_states(said[0]["random"]["global"])
    for each, states in zip((train, *validation), said[0]["random"]["data"]):
        set_states_in(None, each.source, states)
    share_weights(run)


def _first_difference(said: List[Dict[str, Any]], rank: int, key: str) -> str:
    pairs = zip([*said[rank][key], None], [*said[0][key], None])
    own, first = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{own} and {first}"


def _plain_states(batches: Batches) -> Dict[str, Any]:
    states = states_in(None, batches.source)
    return {place: state for place, state in states.items() if "state" not in state}


def _tensors(run: Run) -> Dict[str, Any]:
    return {**dict(run.task.named_parameters()), **dict(run.task.named_buffers())}


def share_weights(run: Run) -> None:
    """Give all ranks rank 0's parameters and buffers; check that they have them."""
    ranks = run.ranks
    if ranks is not None:
        _share(ranks, _tensors(run))
        check_equal(run, "at the start")


def _share(ranks: Meetings, tensors: Dict[str, Any]) -> None:
    """Fill ``tensors`` with what rank 0 has in them."""
    own = b""
    if ranks.rank == 0:
        own = b"".join(np.ascontiguousarray(each.numpy()).tobytes() for each in tensors.values())
    data, start = ranks.broadcast(own), 0
    with flow.no_grad():
        for tensor in tensors.values():
            array = tensor.numpy()
            stop = start + array.nbytes
            given = np.frombuffer(data[start:stop], array.dtype).reshape(array.shape)
            if ranks.rank and array.nbytes:
                tensor.copy_(flow.tensor(given, device=tensor.device))
            start = stop


def share_buffers(run: Run) -> None:
    """Let an evaluation of all ranks use rank 0's buffers, which are what a checkpoint holds.

    Running statistics of batch norms are equal anyway; what a step writes elsewhere may not be.
    """
    if run.ranks is not None and not run.ranks.over:
        _share(run.ranks, dict(run.task.named_buffers()))


def share_order(run: Run, loaders: List[Batches]) -> None:
    """Let all ranks shuffle what is evaluated as rank 0 does, or samples would be repeated."""
    if run.ranks is None or run.ranks.over:
        return
    found = of_rank_zero(
        run,
        lambda: {"global": global_states(), "data": [_plain_states(each) for each in loaders]},
    )
    set_global_states(found["global"])
    for each, states in zip(loaders, found["data"]):
        set_states_in(None, each.source, states)


def check_equal(run: Run, when: str) -> None:
    """Raise :class:`RankError` where the ranks' parameters are not equal, bit for bit."""
    if run.ranks is None or run.ranks.over:
        return
    digest = hashlib.blake2b(digest_size=16)
    for parameter in run.task.parameters():
        digest.update(np.ascontiguousarray(parameter.numpy()).tobytes())
    said = run.ranks.talk(digest.hexdigest())
    if not same_everywhere(said):
        raise RankError(
            f"the ranks' weights are not equal {when}: something in the task or in a callback "
            "changes them in another way on each rank."
        )


# ---------------------------------------------------------------------- in the loops


def take_part(
    run: Run,
    ranks: Meetings,
    batch_idx: int,
    window: int,
    closes: bool,
    after_update: Sequence[Callable[[], Any]],
) -> bool:
    """A round in which this rank has no batch; False where the others leave theirs out."""
    progress = run.progress
    progress.point = Point.STEP
    ranks.absent = True
    try:
        run.training_mode.train_step(ABSENT, batch_idx, window, closes)
    except RestLeftOut:
        return False
    finally:
        ranks.absent = False
    progress.global_step += closes
    if closes:
        for call in after_update:
            call()
    run.metrics.commit(ABSENT)
    if run.train is not None:
        progress.batches_done += run.train.in_round
        progress.batches_seen += run.train.in_round
    progress.point = Point.STEPPED
    return True


def check_interrupts(run: Run) -> None:
    """Raise where a signal came; of several ranks, where all know of it."""
    if run.ranks is not None:
        run.interrupts.received = run.ranks.agreed.signal or None
    run.interrupts.check()


def stop(run: Run, ranks: Meetings, closes: bool, is_last: bool) -> bool:
    """True where all ranks end training after this batch."""
    if ranks.agreed.signal:
        check_interrupts(run)
    if closes and run.is_out_of_time_or_steps():
        return True
    if not run.stops():
        return False
    return is_last or ranks.all_stop()  # at the end of the epoch all learn of it anyway
