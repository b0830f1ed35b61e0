"""`ofengine checkpoint FILE`: what is in a checkpoint, in a screenful."""

from __future__ import annotations

import argparse
import datetime
import sys
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Tuple

import numpy as np

from ofengine.checkpoint import Checkpoint, read
from ofengine.checkpoint.header import shown
from ofengine.checkpoint.hparams import described
from ofengine.checkpoint.schema import of_each
from ofengine.errors import CheckpointError

_LONGEST_LINE = 2_000
_ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, OSError)
"""What comes of a state that a stranger has made."""


def checkpoint(arguments: argparse.Namespace) -> int:
    """Print what the file holds; exit status 1 where it cannot be used."""
    try:
        found = read(arguments.file)
        lines = list(describe(found, all_tensors=arguments.tensors))
    except CheckpointError as error:
        print(shown(str(error), _LONGEST_LINE), file=sys.stderr)
        return 1
    for line in lines:
        print(shown(line, _LONGEST_LINE))
    return 0


def describe(found: Checkpoint, all_tensors: bool = False) -> Iterator[str]:
    """The lines of the description; with ``all_tensors`` one for each weight.

    Raises :class:`CheckpointError` where the state is not that of a run.
    """
    size = found.path.stat().st_size
    kind = f"format {found.metadata.get('format_version', '?')}, whole"
    if "blake2b" not in found.metadata:
        kind = "weights only, no checksum"
    yield f"{found.path} ({_bytes(size)}, {kind})"
    if found.state is not None:
        try:
            yield from list(_describe_run(found.state))
        except _ODD as error:
            raise CheckpointError(
                f"{found.path} is whole, and holds no state of a run: {type(error).__name__}, "
                f"{shown(str(error))}."
            ) from None
    yield _row("weights", _sum_up(found.weights.values()))
    not_finite = [n for n, a in found.weights.items() if a.dtype.kind == "f" and not _finite(a)]
    if not_finite:
        yield _row("not finite", f"{len(not_finite)} tensors, first {not_finite[0]!r}")
    if all_tensors:
        for name, array in found.weights.items():
            yield f"    {name}  {tuple(array.shape)}  {array.dtype}"


def _describe_run(state: Mapping[str, Any]) -> Iterator[str]:
    run, loop = state["run"], state["loop"]
    saved = datetime.datetime.fromtimestamp(run["saved_at"]).strftime("%Y-%m-%d %H:%M:%S")
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    yield _row("saved", f"{saved}, by {versions}")
    where = f"epoch {loop['epoch']}, {loop['batches_done']} batches of it done"
    yield _row("place", f"{where}, step {loop['global_step']} ({loop['point'].replace('_', ' ')})")
    yield _row("run", f"{run['id'][:8]}, {run['mode']} mode, seed {run['seed']}, "
               f"{run['seconds']:.0f} s trained")  # fmt: skip
    for name, each in of_each(state).items():
        yield from _describe_optimizer(name, each["optimizer"], each["rates"])
    metrics = state["metrics"]["known"]
    if metrics:
        yield _row("metrics", ", ".join(f"{k}={v:.6g}" for k, v in metrics.items()))
    named = [each["class"] for each in state["callbacks"] if each["state"]]
    yield _row("callbacks", ", ".join(named) if named else "none with a state")
    if state["hparams"]:
        kept = state["hparams"].items()
        yield _row("hparams", ", ".join(f"{name}={described(value)}" for name, value in kept))
    if state["task"]:
        yield _row("task", ", ".join(_pairs(state["task"])))


def _describe_optimizer(
    name: str, optimizer: Mapping[str, Any], rates: Mapping[str, Any]
) -> Iterator[str]:
    """A single optimizer, or one of several by its ``name``."""
    kept = [array for states in optimizer["states"].values() for array in states.values()]
    text = f"{name}: {optimizer['class']}" if name else optimizer["class"]
    text += f", {optimizer['steps']} steps"
    yield _row("optimizer", text + (f", {_sum_up(kept)}" if kept else ", without a state"))
    schedule = rates["schedule"]
    yield _row("schedule", "none" if schedule is None else
               f"{schedule['class']}, by {rates['interval']}")  # fmt: skip
    now: List[Any] = rates["rates"].get("0") or [None] * len(rates["groups"])
    for group, rate in zip(rates["groups"], now):
        shown = "" if rate is None else f", next rate {rate:.6g}"
        yield _row("group", f"{group['name']}: {group['numbers']:,} numbers{shown}")


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{key}=array{value.shape}" if isinstance(value, np.ndarray) else f"{key}={value!r}"


def _row(title: str, text: str) -> str:
    return f"  {title:<10} {text}"


def _sum_up(arrays: Iterable[np.ndarray]) -> str:
    totals: Dict[str, Tuple[int, int]] = {}
    for array in arrays:
        tensors, numbers = totals.get(str(array.dtype), (0, 0))
        totals[str(array.dtype)] = (tensors + 1, numbers + array.size)
    return "; ".join(f"{t} tensors, {n:,} numbers ({dtype})" for dtype, (t, n) in totals.items())


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
