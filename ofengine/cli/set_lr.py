"""`ofengine set-lr RUN NAME=RATE`: another base rate for a group of a run that is training."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ofengine.disk import open_regular
from ofengine.errors import ConfigurationError, OFEngineError
from ofengine.processes.requests import (
    ANSWER,
    REQUEST,
    RUN,
    Request,
    check_rates,
    read_request,
    read_whole,
    write_whole,
)

_PAUSE = 0.05
"""Seconds between two looks for the answer."""
_IN_HAND = 10.0
"""Seconds that a run which has taken a request may need to answer."""


def set_lr(arguments: argparse.Namespace) -> int:
    """Print what the run has changed; exit status 1 where it has changed nothing."""
    seconds = None if arguments.no_wait else arguments.wait
    try:
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ConfigurationError(f"--wait {seconds:g}: give a number of seconds.")
        lines = change_rates(Path(arguments.folder), pairs_of(arguments.rates), seconds)
    except OFEngineError as error:
        print(f"ofengine set-lr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for line in lines:
        print(line if line.isprintable() else ascii(line))
    return 0


def pairs_of(words: Sequence[str]) -> Dict[str, float]:
    """``NAME=RATE`` words as rates by name.

    Raises :class:`ConfigurationError` where a word is none, or names a group again.
    """
    rates: Dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        if not equals or not name:
            raise ConfigurationError(f"{word!r}: write NAME=RATE, as in head=1e-4.")
        if name in rates:
            raise ConfigurationError(f"{word}: group {name!r} was given a rate already.")
        try:
            rates[name] = float(text)
        except ValueError:
            raise ConfigurationError(f"{word}: {text!r} is no number.") from None
    return rates


def change_rates(path: Path, wanted: Mapping[str, float], seconds: Optional[float]) -> List[str]:
    """Have the run that runs in the folder ``path`` change base rates; what it answers, in lines.

    Args:
        path: the run's folder, or the folder of its checkpoints.
        wanted: a rate for each group; the name "all" means those that are not named.
        seconds: how long to wait for the answer; None for not at all, which gives no line.

    Raises:
        ConfigurationError: there is no such run, it is not running, or it did not change them.
        RateError: there is no such group, or a rate is none.
    """
    folder, said = _find(path)
    names: List[str] = said["groups"]
    rates = dict(wanted)
    if "all" in rates and "all" not in names:
        of_all = rates.pop("all")
        check_rates(rates, names)
        rates = {name: rates.get(name, of_all) for name in names}
    check_rates(rates, names)
    request = Request(said["token"], secrets.token_hex(8), rates, seconds is not None)
    until = time.monotonic() + (_IN_HAND if seconds is None else seconds)
    _put(folder, request, until)
    return [] if seconds is None else _wait(folder, request, seconds, until)


def _wait(folder: Path, request: Request, seconds: float, until: float) -> List[str]:
    answer = folder / ANSWER.format(request.id)
    is_taken = False
    while not answer.exists():
        lives = _lives(folder)
        if not lives or time.monotonic() >= until:
            if is_taken and not answer.exists():
                raise ConfigurationError(
                    "the run took the request and gave no answer: see in its log what it did."
                )
            if not is_taken and _withdraw(folder, request):
                why = f"came to no step within {seconds:g} s" if lives else "has ended"
                mend = ": give it a longer --wait, or --no-wait." if lives else "."
                raise ConfigurationError(
                    f"the run {why}; nothing was changed, and the request is taken back{mend}"
                )
            is_taken, until = True, time.monotonic() + _IN_HAND
        time.sleep(_PAUSE)
    found = read_whole(answer)
    while found is None and time.monotonic() < until:  # without hard links it is empty at first
        time.sleep(_PAUSE)
        found = read_whole(answer)
    with contextlib.suppress(OSError):
        answer.unlink()
    lines = [str(each) for each in (found or {}).get("lines", [])]
    if found is None or found.get("done") is not True:
        raise ConfigurationError(" ".join(lines) or "the run's answer cannot be read.")
    return lines


def _find(path: Path) -> Tuple[Path, Dict[str, Any]]:
    """The folder of the run that is meant and that runs, and what it says of itself."""
    if not path.is_dir():
        raise ConfigurationError(f"there is no run {path}: no such folder.{_running_near(path)}")
    beside = [path.parent] if path.resolve().name == "checkpoints" else []
    for folder in (path, path / "checkpoints", *beside):
        said = read_whole(folder / RUN)
        if said is not None and _lives(folder) and _is_said_by_a_run(said):
            return folder, said
    raise ConfigurationError(
        f"no run is training in {path}, and set-lr changes one while it trains."
        f"{_running_near(path)}"
    )


def _running_near(path: Path) -> str:
    """Runs below ``path``, or beside it, as a sentence."""
    for root in (path, path.parent):
        found = [each for depth in ("*", "*/*", "*/*/*") for each in root.glob(f"{depth}/{RUN}")]
        live = sorted(str(each.parent) for each in found if _lives(each.parent))
        if live:
            return f" There is one in {' and in '.join(live[:3])}."
    return ""


def _is_said_by_a_run(said: Mapping[str, Any]) -> bool:
    groups = said.get("groups")
    return isinstance(said.get("token"), str) and isinstance(groups, list) and bool(groups)


def _lives(folder: Path) -> bool:
    """True where a process holds the lock of the run's file in ``folder``, or may do so."""
    try:
        with open_regular(folder / RUN) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:  # it is locked, or there are no locks here
        return True


def _put(folder: Path, request: Request, until: float) -> None:
    """Lay ``request`` before the run, once no other one lies there."""
    path = folder / REQUEST
    said = {
        "to": request.to, "id": request.id, "rates": request.rates, "answer": request.wants_answer,
    }  # fmt: skip
    while True:
        try:
            write_whole(path, said)
            return
        except FileExistsError:
            other = read_request(path)
            if other is not None and other.to != request.to:
                with contextlib.suppress(OSError):
                    path.unlink()  # it was to a run that is over
                continue
            if time.monotonic() >= until:
                raise ConfigurationError(
                    "another request lies before the run, which has come to no step since: try "
                    "again later."
                ) from None
            time.sleep(_PAUSE)
        except OSError as error:
            raise ConfigurationError(
                f"the request cannot be written into {folder}: {error.strerror or error}."
            ) from None


def _withdraw(folder: Path, request: Request) -> bool:
    """Take ``request`` back; False where the run has taken it."""
    lies = read_request(folder / REQUEST)
    if lies is None or lies.id != request.id:
        return False
    try:
        (folder / REQUEST).unlink()
    except OSError:
        return False
    return True
