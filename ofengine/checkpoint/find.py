"""Which file ``ckpt_path`` means."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Union

from ofengine.checkpoint.file import EXTENSION, Checkpoint, read
from ofengine.checkpoint.header import BadHeader, parse, read_header, shown
from ofengine.disk import open_regular
from ofengine.errors import CheckpointError, ConfigurationError, warn
from ofengine.launch import heartbeat
from ofengine.processes import supervisor
from ofengine.run.progress import Point
from ofengine.run.state import Run

log = logging.getLogger("ofengine")

CheckpointPath = Union[str, Path, None]
"""A file, "last", "best", or None for a run that begins anew."""

_MOST_SITTINGS = 999_999_999
_POINTS = [point.value for point in Point]
"""In the order in which a run comes to them."""


class Moment(NamedTuple):
    """When a checkpoint was saved, as the file says: those of one run compare as they came."""

    sitting: int
    """How often the run had been resumed."""
    batches_seen: int
    epoch: int
    point: int
    """How far it was within the batch or epoch, as a number."""


class Found(NamedTuple):
    """A file of a run."""

    path: Path
    run: str
    saved_at: float
    """By the clock, in seconds since 1970."""
    moment: Moment
    supervised_by: str


# ---------------------------------------------------------------------- one file


def check_path(ckpt_path: Any) -> None:
    """Raise :class:`ConfigurationError` where it can be no file, nor "last", "best" or None."""
    if ckpt_path is None:
        return
    if not isinstance(ckpt_path, (str, os.PathLike)) or not str(ckpt_path):
        raise ConfigurationError(
            f'ckpt_path={ckpt_path!r}: give the path of a checkpoint, "last" or "best", or None.'
        )


def find_checkpoint(
    run: Run, ckpt_path: Union[str, Path], supervised_by: str = ""
) -> Optional[Checkpoint]:
    """Read the file ``ckpt_path``; for "last" the furthest whole one, None where there is none.

    One with weights that are not finite is "last" only where all are so.

    "last" looks only at files of the processes of ``supervised_by``, where that is given. The file
    "best" is that of the first callback that has one.

    Raises :class:`CheckpointError` where the file cannot be read, :class:`ConfigurationError`
    where there is no "best".
    """
    if ckpt_path != "last":
        checkpoint = read(_best_file(run) if ckpt_path == "best" else ckpt_path)
        broken = run.broken(checkpoint.weights)
        if broken is not None:
            warn(f"{checkpoint.path} is loaded as it is: {broken}.")
        return checkpoint
    furthest: Optional[Checkpoint] = None
    for found in _newest_first(_files_of_runs(run, supervised_by)):
        try:
            checkpoint = read(found.path)
        except CheckpointError as error:
            warn(f"ckpt_path='last' passes over a checkpoint: {error}")
            continue
        broken = run.broken(checkpoint.weights)
        if broken is None:
            return checkpoint
        warn(f"ckpt_path='last' takes {found.path} only where there is no better: {broken}.")
        furthest = furthest or checkpoint
    return furthest


def weights_file(run: Run, ckpt_path: Union[str, Path]) -> Path:
    """The file that ``validate``, ``test`` and ``predict`` load by ``ckpt_path``.

    Raises :class:`ConfigurationError` where there is no "last" or "best".
    """
    check_path(ckpt_path)
    if ckpt_path not in ("best", "last"):
        return Path(ckpt_path)
    found = find_checkpoint(run, ckpt_path)
    if found is None:
        looked = ", ".join(sorted({str(each) for each in _folders(run)}))
        where = f" in {looked}" if looked else ""
        if run.settings.fast_dev_run:
            raise _none_of_fast_dev_run("last", f" and none is there{where}")
        raise ConfigurationError(
            f"ckpt_path='last': there is no checkpoint yet{where}. Fit "
            "first, or give the path of a file."
        )
    return found.path


def _none_of_fast_dev_run(which: str, and_none: str) -> ConfigurationError:
    return ConfigurationError(
        f"ckpt_path={which!r}: with fast_dev_run no checkpoint is saved{and_none}: leave ckpt_path "
        "out, or give the path of a file."
    )


def _best_file(run: Run) -> Path:
    keeping = [each for each in run.callbacks if hasattr(each, "best_model_path")]
    if not keeping and run.settings.fast_dev_run:
        raise _none_of_fast_dev_run("best", "")
    if not keeping:
        raise ConfigurationError(
            "ckpt_path='best' is the best_model_path of a ModelCheckpoint, and none is listed: "
            "list one, or give the path of a file."
        )
    best = next((each.best_model_path for each in keeping if each.best_model_path), "")
    if not best:
        raise ConfigurationError(
            f"ckpt_path='best': {type(keeping[0]).__name__} has no best_model_path, because no fit "
            "of this Trainer has saved a best file: fit first, or give 'last' or the path of a "
            "file."
        )
    log.info("ckpt_path='best' is %s.", best)
    return Path(best)


# ---------------------------------------------------------------------- all files


def _folders(run: Run) -> Dict[Path, List[str]]:
    """Where "last" looks, and for which names, as glob patterns.

    In the callbacks' own folders, where they have none in those below ``default_root_dir``.
    """
    keeping: List[Any] = [each for each in run.callbacks if hasattr(each, "dirpath")]
    roots = [Path(run.settings.default_root_dir)]
    roots += [root for each in run.loggers for root in each.run_dirs()]
    folders: Dict[Path, List[str]] = {}
    for callback in keeping or [None]:
        own = getattr(callback, "dirpath", None)
        for folder in [root / "checkpoints" for root in roots] if own is None else [Path(own)]:
            patterns = getattr(callback, "file_patterns", [f"*{EXTENSION}"])
            folders.setdefault(folder, []).extend(patterns)
    return folders


def _files_of_runs(run: Run, supervised_by: str = "") -> Iterator[Found]:
    """The files that "last" can mean; says which it passes over."""
    paths = {
        path: None
        for folder, patterns in _folders(run).items()
        for pattern in dict.fromkeys(patterns)
        for path in folder.glob(pattern)
    }
    for path in paths:
        try:
            found = _look_into(path)
        except FileNotFoundError:  # removed since
            continue
        except (OSError, BadHeader) as error:
            reason = getattr(error, "strerror", None) or shown(str(error))
            warn(f"ckpt_path='last' passes over a checkpoint: {path} cannot be read: {reason}.")
            continue
        if found is not None and supervised_by in ("", found.supervised_by):
            yield found


def _look_into(path: Path) -> Optional[Found]:
    """What a file says of its run, not verified; None where it holds weights only."""
    with open_regular(path) as file:
        metadata = read_header(file).metadata
    text = metadata.get("state")
    if not isinstance(text, str):
        return None
    return _said_by(path, metadata, parse(text.encode("utf-8", "surrogatepass")))


def _said_by(path: Path, metadata: Mapping[str, Any], state: Any) -> Found:
    sitting = str(metadata.get("sitting", 0))
    try:
        loop, begun = state["loop"], state["run"]
        numbers = (loop["batches_seen"], loop["epoch"])
        point, saved_at, run = _POINTS.index(loop["point"]), begun["saved_at"], begun["id"]
    except (KeyError, TypeError, ValueError):
        raise BadHeader("its state is of no run") from None
    good = all(type(number) is int for number in numbers) and isinstance(run, str)
    good = good and type(saved_at) in (int, float) and math.isfinite(saved_at)
    if not good or not re.fullmatch(r"[0-9]{1,9}", sitting):
        raise BadHeader("its state is of no run")
    supervised_by = str(metadata.get("supervised_by", ""))
    return Found(path, run, saved_at, Moment(int(sitting), *numbers, point), supervised_by)


def _newest_first(files: Iterable[Found]) -> List[Found]:
    """The furthest of the run that saved last, then the others of that run, then other runs."""
    listed = list(files)
    newest: Dict[str, float] = {}
    for each in listed:
        newest[each.run] = max(each.saved_at, newest.get(each.run, each.saved_at))

    def place(each: Found) -> Any:
        return newest[each.run], each.run, each.moment, each.saved_at

    return sorted(listed, key=place, reverse=True)


def newest_first(paths: Iterable[Union[str, Path]]) -> List[str]:
    """Checkpoints of runs by what they say, as "last" would take them; others are left out."""
    found = []
    for path in map(Path, paths):
        try:
            said = _look_into(path)
        except (OSError, BadHeader):
            continue
        found += [said] if said is not None else []
    return [str(each.path) for each in _newest_first(found)]


# ---------------------------------------------------------------------- what goes on


def note_resumption(run: Run, checkpoint: Checkpoint) -> None:
    """Note that ``run`` goes on from ``checkpoint``, in the run and its loggers.

    Its sitting is one more than that of any file of the same run that is found, so that what it
    saves counts as later than those, wherever in the run it goes on.

    Raises :class:`CheckpointError` where it is no checkpoint of a run.
    """
    run.resumed_from = checkpoint.path.absolute()
    for each in run.loggers:
        each.resumed_from = run.resumed_from
    try:
        own = _said_by(checkpoint.path, checkpoint.metadata, checkpoint.state)
    except BadHeader as error:
        raise CheckpointError(f"{checkpoint.path} cannot be resumed from: {error}.") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "last" has told of those it passes over
        others = list(_files_of_runs(run))
    same = [each.moment.sitting for each in (own, *others) if each.run == own.run]
    run.sitting = min(1 + max(same), _MOST_SITTINGS)


def supervised(run: Run, ckpt_path: CheckpointPath) -> CheckpointPath:
    """Run the script again as a child; in the child, what ``fit`` resumes from."""
    if supervisor.is_trial():
        return ckpt_path
    if not any(callback.fires_last for callback in run.callbacks):
        raise ConfigurationError(
            "restart_on_crash needs checkpoints to go on from: list a ModelCheckpoint, or "
            "leave enable_checkpointing on."
        )
    if supervisor.tries() is None:
        supervisor.supervise(run.settings.restart_on_crash)
    if run.plan is not None:
        raise ConfigurationError(
            "restart_on_crash starts the whole script again, so it works for one fit() only: "
            "put the second one into a script of its own."
        )
    heartbeat.ask_for_restarts(run.settings.restart_on_crash)
    if supervisor.tries() == 1:
        return ckpt_path
    found = find_checkpoint(run, "last", supervisor.supervised_by())
    return ckpt_path if found is None else found.path
