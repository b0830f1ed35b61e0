"""What a running run is asked from outside: files in its folder, each of which appears whole.

A run writes who it is, and holds the lock of that file for as long as it lives. A command writes
one request, to that run alone, and waits for the answer. So nothing that was asked of a run that is
over is ever done by one that came after it; and where two machines share a folder, a command on
one reaches a run on the other.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import logging
import math
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence

import attrs

from ofengine.disk import give_name, open_regular, temporary_file
from ofengine.errors import RateError, quoted

log = logging.getLogger("ofengine")

RUN, REQUEST, _TAKEN = (f".ofengine-{what}.json" for what in ("run", "request", "taken"))
ANSWER = ".ofengine-answer-{}.json"
_PAUSE, _PAUSE_OF_COMMAND = 0.5, 0.05
"""Seconds between two looks of the run, and of a command that looks whether it lives."""
_LARGEST = 2**20
_ID = re.compile(r"[0-9a-f]{16}")


@attrs.frozen
class Request:
    """The base rates that groups are to have, by their names."""

    to: str
    id: str
    rates: Dict[str, float]
    wants_answer: bool


def check_rates(rates: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise :class:`RateError` where a group is none of ``names``, or a rate is none."""
    for name, lr in rates.items():
        if name not in names:
            ends = [each for each in names if each.rpartition("/")[2] == name]
            close = ends or difflib.get_close_matches(name, names, n=3)
            mean = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
            raise RateError(
                f"there is no group {name!r}; the groups are {quoted(names, most=20)}{mean}"
            )
        if not math.isfinite(lr) or lr < 0:
            raise RateError(f"{name}={lr!r}: a rate is finite and not negative.")


# ---------------------------------------------------------------------- the run


class Listener:
    """A run's end: a thread looks for requests, and whoever made this takes them.

    Args:
        folder: the run's; it is made where it is not there.
        groups: the names of its parameter groups.
        tell: called in the thread when a request has come, which :meth:`take` then gives.

    Raises:
        OSError: the folder cannot be written to.
        BlockingIOError: another run that lives is reached by this folder.
    """

    def __init__(self, folder: Path, groups: Sequence[str], tell: Callable[[], None]) -> None:
        self._folder, self._tell = folder, tell
        self._token = secrets.token_hex(16)
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._is_waiting = False
        self._over = threading.Event()
        self._file = _lock_own(folder / RUN)
        try:
            said = {"token": self._token, "groups": list(groups), "process": os.getpid()}
            os.write(self._file, json.dumps(said).encode())
            self._look()
        except OSError:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._watch, name="ofengine set-lr", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE):
            with contextlib.suppress(OSError):  # the folder is gone, or cannot be read now
                self._look()

    def _look(self) -> None:
        path = self._folder / REQUEST
        try:
            if self._is_waiting or not os.lstat(path).st_size:  # an empty one is being written
                return
        except FileNotFoundError:
            return
        request = read_request(path)
        if request is not None and request.to == self._token:
            self._is_waiting = True
            self._tell()
        else:
            self._leave_out()

    def _leave_out(self) -> None:
        """A request to a run that is over, or none at all: taken away, and told."""
        request = self._claim()
        if request is not None and request.to == self._token:  # it has come this moment
            self.answer(request, ["the run could not read it: give the command again."], False)
            return
        what = "what is no request" if request is None else in_words(request.rates)
        log.warning(
            "ofengine set-lr had asked a run that is over, in %s, for %s: this run leaves it out.",
            self._folder, what,
        )  # fmt: skip

    def _claim(self) -> Optional[Request]:
        taken = self._folder / _TAKEN
        os.rename(self._folder / REQUEST, taken)
        try:
            return read_request(taken)
        finally:
            taken.unlink()

    def take(self) -> Optional[Request]:
        """The request that has come, which is this run's from now on; None where it was withdrawn.

        Called by the thread that trains.
        """
        try:
            request = self._claim()
        except OSError:
            return None
        finally:
            self._is_waiting = False
        return request if request is not None and request.to == self._token else None

    def answer(self, request: Request, lines: Sequence[str], done: bool) -> None:
        """Say what was done, or, in one line, why not."""
        if not request.wants_answer:
            return
        with contextlib.suppress(OSError):  # nobody hears of it; the log has it
            said = {"done": done, "lines": list(lines)}
            write_whole(self._folder / ANSWER.format(request.id), said)

    def close(self) -> None:
        """The run is over: answer what still waits, and leave nothing in the folder."""
        self._over.set()
        self._thread.join()
        request = self.take()
        if request is not None:
            self.answer(
                request, ["the run ended before its next step; nothing was changed."], False
            )
        with contextlib.suppress(OSError):
            (self._folder / RUN).unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)  # workers that were forked may have it too
        os.close(self._file)
        if self._made:
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def _lock_own(path: Path) -> int:
    """The file ``path``, empty and locked for this process. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    for last in (False, False, False, True):
        file = os.open(path, flags, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            if last:
                raise
            time.sleep(_PAUSE_OF_COMMAND)  # a command may be looking whether a run lives
            continue
        except OSError:
            pass  # there are no locks here: a command that asks waits until its time is over
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.lstat(path)):
                os.ftruncate(file, 0)
                return file
        os.close(file)  # the run before has just taken it away
    raise FileNotFoundError(path)


# ---------------------------------------------------------------------- the files


def in_words(rates: Mapping[str, float]) -> str:
    """As on the command line."""
    return " ".join(f"{name}={lr!r}" for name, lr in rates.items())


def write_whole(path: Path, said: Mapping[str, Any]) -> None:
    """Let ``path`` appear with ``said`` in it. Raises FileExistsError where it is there already."""
    with temporary_file(path.parent) as (file, temporary):
        file.write(json.dumps(said).encode())
        file.flush()
        give_name(temporary, path)


def read_whole(path: Path) -> Optional[Dict[str, Any]]:
    """What is in ``path``; None where that is nothing of ours."""
    try:
        with open_regular(path) as file:
            said = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def read_request(path: Path) -> Optional[Request]:
    said = read_whole(path) or {}
    rates = rates_in(said.get("rates"))
    to, own, answer = said.get("to"), said.get("id"), said.get("answer")
    if rates is None or not isinstance(to, str) or not isinstance(answer, bool):
        return None
    if not isinstance(own, str) or not _ID.fullmatch(own):
        return None
    return Request(to, own, rates, answer)


def rates_in(said: Any) -> Optional[Dict[str, float]]:
    """``said``, where it is a rate for each of some names; else None."""
    if not isinstance(said, dict) or not said:
        return None
    if not all(isinstance(each, float) for each in said.values()):
        return None
    return said


def lines_in(path: Path) -> Iterator[Dict[str, Any]]:
    """The records in a file of one a line; what is none is passed over, and told."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            yield said
        else:
            log.warning("line %d of %s is passed over: it is no record.", number, path)
