"""What `ofengine set-lr` asks of a run, done between two steps, and done again after a resumption.

A change is written into the run's folder before it is made. A run that is resumed from a moment
before it makes it again behind the same batch, so that it computes what it did.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import attrs

from ofengine.checkpoint.resume import Resumed
from ofengine.disk import append_whole
from ofengine.errors import OFEngineError
from ofengine.processes.requests import Listener, check_rates, in_words, lines_in
from ofengine.run.orders import Change
from ofengine.run.progress import Point
from ofengine.run.state import Run
from ofengine.run.together import of_rank_zero

log = logging.getLogger("ofengine")

FILE = "set_lr.jsonl"
"""What was changed, one change a line."""
_VOID = "void_from"
"""In a line: what was changed from so many batches on is not done again."""
_BEFORE_IT = (Point.STEP, Point.STEPPED, Point.VALIDATING, Point.VALIDATED)
"""Where a run is, behind a batch, before it does what it was asked for."""


@contextlib.contextmanager
def listening(run: Run, resumed: Optional[Resumed], policy: str) -> Iterator[None]:
    """In the block, `ofengine set-lr` reaches ``run``; what it did to the run before is repeated.

    ``policy`` is ``rates_on_resume``: with "config", what was changed is forgotten.
    """
    orders = run.orders
    is_first = run.ranks is None or run.ranks.rank == 0
    folder = _folder(run) if is_first else None
    if resumed is not None:
        found = of_rank_zero(run, lambda: [attrs.asdict(e) for e in _recorded(run, folder)])
        done = resumed.state["loop"]
        changes = [Change(**each) for each in found]
        orders.repeats = [each for each in changes if _is_to_come(done, each)]
        if policy == "config":
            _forget(run, folder)
        for each in orders.repeats:
            log.info(
                "resume: at step %d come the rates %s again, which ofengine set-lr set there.",
                each.step, in_words(each.rates),
            )  # fmt: skip
        orders.wait()
    if folder is not None:
        try:
            orders.listener = Listener(folder, run.rates.names, lambda: _hear(run))
        except BlockingIOError:
            log.info("ofengine set-lr does not reach this run: another one runs in %s.", folder)
        except OSError as error:
            why = error.strerror or error
            log.info("ofengine set-lr does not reach this run: %s: %s.", folder, why)
    try:
        yield
    finally:
        if orders.listener is not None:
            orders.listener.close()
            orders.listener = None


def _hear(run: Run) -> None:
    """In the thread: a request has come."""
    run.orders.wanted = True
    if run.ranks is None:  # else all ranks hear of it at their next meeting
        run.orders.came()


def _folder(run: Run) -> Optional[Path]:
    """Where the run is reached: its logger's folder, or that of its checkpoints."""
    for logger in run.loggers:
        if logger.log_dir and Path(logger.log_dir).is_dir():
            return Path(logger.log_dir).absolute()
    for callback in run.callbacks:
        if hasattr(callback, "dirpath"):
            root = Path(run.settings.default_root_dir)
            return Path(callback.dirpath or root / "checkpoints").absolute()
    return None


# ---------------------------------------------------------------------- between two steps


def carry_out(run: Run) -> None:
    """Do what is due behind this batch: what the run before did here, then what was asked for."""
    orders, seen = run.orders, run.progress.batches_seen
    while orders.repeats and orders.repeats[0].batches_seen <= seen:
        change = orders.repeats.pop(0)
        lines = _change(run, change.rates)
        log.info("step %d, again: %s.", run.progress.global_step, "; ".join(lines))
        if run.progress.global_step != change.step:
            log.warning(
                "that was changed at step %d before the run was resumed: it does not go on "
                "exactly.", change.step,
            )  # fmt: skip
    is_asked = orders.agreed
    orders.wait()
    if not is_asked:
        return
    taken: List[Any] = []
    rates = of_rank_zero(run, lambda: _take(run, taken))
    if rates is not None:
        lines = _change(run, rates)
        step = run.progress.global_step
        log.info("step %d: %s, by ofengine set-lr.", step, "; ".join(lines))
        if taken and run.orders.listener is not None:
            told = [f"{line}, from step {step} on" for line in lines]
            run.orders.listener.answer(taken[0], told, True)


def _take(run: Run, taken: List[Any]) -> Optional[Dict[str, float]]:
    """The rates that are asked for, on the record; None where nothing is to be changed."""
    listener = run.orders.listener
    request = None if listener is None else listener.take()
    if listener is None or request is None:
        return None
    taken.append(request)
    try:
        check_rates(request.rates, run.rates.names)
        why = _why_not(run) or _record(run, request.rates)
    except OFEngineError as error:
        why = str(error)
    if why is None:
        return request.rates
    log.warning("ofengine set-lr %s: %s", in_words(request.rates), why)
    listener.answer(request, [why], False)
    return None


def _why_not(run: Run) -> Optional[str]:
    total, step = run.total_steps, run.progress.global_step
    if (total is not None and step >= total) or run.stops():
        return f"the run has made its last step, {step} in all; nothing was changed."
    return None


def _record(run: Run, rates: Dict[str, float]) -> Optional[str]:
    """Write a change down; why that is not possible, as a sentence."""
    folder, at = _folder(run), run.progress
    change = Change(run.id, at.global_step, at.batches_seen, run.sitting, rates)
    try:
        _append(folder or Path(), [attrs.asdict(change)])
    except OSError as error:
        why = error.strerror or error
        return f"it cannot be recorded in {folder} ({why}), so nothing was changed."
    return None


def _append(folder: Path, changes: List[Dict[str, Any]]) -> None:
    said = [{**each, "at": time.strftime("%Y-%m-%d %H:%M:%S")} for each in changes]
    path = folder / FILE
    append_whole(path, "".join(json.dumps(e) + "\n" for e in said).encode(), os.O_CREAT)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _change(run: Run, rates: Dict[str, float]) -> List[str]:
    """Give groups other base rates from the next step on; what that changes, a line for each."""
    plan, step = run.rates, run.progress.global_step
    before = {group.name: group.lr for group in plan.groups}, plan.rates(step)
    for name, lr in rates.items():
        plan.set_lr(name, lr, step)
    run.training_mode.rebuild(f"ofengine set-lr {in_words(rates)}")
    now = plan.rates(step)
    lines = []
    for name, lr in rates.items():
        line, at = f"{name}: {before[0][name]:.9g} -> {lr:.9g}", plan.index(name)
        effective = f"{before[1][at]:.6g} -> {now[at]:.6g}"
        if effective != f"{before[0][name]:.6g} -> {lr:.6g}":
            line += f" (with schedule, scale and decay {effective})"
        lines.append(line)
    return lines


# ---------------------------------------------------------------------- after a resumption


@attrs.define
class _Kept:
    """What a file has of a run."""

    changes: List[Change]
    sitting: int = -1
    """How often the run had been resumed at its newest line."""


def _recorded(run: Run, folder: Optional[Path]) -> List[Change]:
    """What was changed in ``run`` before it was resumed, in order; on the record here, too.

    Looked for in the run's folder, beside the checkpoint, and in the folders of earlier runs.
    """
    beside = [] if run.resumed_from is None else list(run.resumed_from.parents)[:4]
    for each in [*([] if folder is None else [folder]), *beside]:
        kept = _kept_in(run, each)
        if kept is not None:
            break
    else:
        dirs = [each for logger in run.loggers for each in sorted(logger.run_dirs())]
        found = [kept for kept in (_kept_in(run, each) for each in dirs) if kept is not None]
        each, kept = Path(), max(found, key=lambda kept: kept.sitting, default=_Kept([]))
    if kept.changes and folder is not None and each != folder:
        with contextlib.suppress(OSError):  # the record of before is there as long as it is
            _append(folder, [attrs.asdict(change) for change in kept.changes])
    return sorted(kept.changes, key=lambda change: change.batches_seen)


def _kept_in(run: Run, folder: Path) -> Optional[_Kept]:
    """What the file in ``folder`` has of ``run``; None where it has no line of it."""
    kept: Optional[_Kept] = None
    for said in lines_in(folder / FILE):
        if said.get("run") != run.id:
            continue
        kept = kept or _Kept([])
        change, void, sitting = Change.of(said), said.get(_VOID), said.get("sitting")
        if type(sitting) is int:
            kept.sitting = max(kept.sitting, sitting)
        if type(void) is int:
            kept.changes = [each for each in kept.changes if each.batches_seen < void]
        if change is None:
            continue
        try:
            check_rates(change.rates, run.rates.names)
        except OFEngineError as error:
            log.warning("a change in %s is passed over: %s", folder / FILE, error)
            continue
        kept.changes.append(change)
    return kept


def _is_to_come(loop: Dict[str, Any], change: Change) -> bool:
    """True where a checkpoint's ``loop`` is before ``change`` was made."""
    done = loop["batches_seen"]
    return change.batches_seen > done or (
        change.batches_seen == done and Point(loop["point"]) in _BEFORE_IT
    )


def _forget(run: Run, folder: Optional[Path]) -> None:
    """Leave out what was to come again, from now on: a run that goes on from this one, too."""
    repeats, run.orders.repeats = run.orders.repeats, []
    if not repeats:
        return
    log.info("resume: %d changes by ofengine set-lr are forgotten.", len(repeats))
    if folder is not None:
        void = {"run": run.id, "sitting": run.sitting, _VOID: repeats[0].batches_seen}
        try:
            _append(folder, [void])
        except OSError as error:
            why = error.strerror or error
            log.warning("that is not on record (%s): a run that goes on has them.", why)
