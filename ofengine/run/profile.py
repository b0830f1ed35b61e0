"""Profile: where the time of a run goes, by name; a table, and a trace for Chrome.

Whatever is to be timed is wrapped before a run begins. Where nothing profiles, nothing is wrapped,
and a step makes no further call.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import attrs

from ofengine import tables
from ofengine.disk import give_name, temporary_file

_LEAST_SHARE = 0.0005
"""What takes less of a run has no row of its own in the table."""
_MOST_EVENTS = 200_000
"""A trace has so many events at most, the first ones."""


@attrs.define
class Row:
    """What was timed under one name."""

    calls: int = 0
    seconds: float = 0.0
    """Without what was timed within."""
    longest: float = 0.0
    """The longest call, what was timed within included."""


class Profile:
    """Times calls by name, those within others apart: the seconds of all rows add up."""

    def __init__(self) -> None:
        self.rows: Dict[str, Row] = {}
        self.events: List[Tuple[str, float, float]] = []
        """(name, beginning and length in seconds), the newest last."""
        self._open: List[List[float]] = []
        """For each call going on: when it began, and the seconds timed within."""
        self._began = time.perf_counter()
        self.seconds = 0.0
        """From beginning to end."""

    def begin(self) -> None:
        """A call begins."""
        self._open.append([time.perf_counter(), 0.0])

    def end(self, name: str) -> None:
        """The call that began last ends."""
        now = time.perf_counter()
        began, within = self._open.pop()
        length = now - began
        if self._open:
            self._open[-1][1] += length
        row = self.rows.get(name)
        if row is None:
            row = self.rows[name] = Row()
        row.calls += 1
        row.seconds += length - within
        row.longest = max(row.longest, length)
        if len(self.events) < _MOST_EVENTS:
            self.events.append((name, began - self._began, length))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed under ``name``."""

        @functools.wraps(function, updated=())
        def timed(*arguments: Any, **options: Any) -> Any:
            self.begin()
            try:
                return function(*arguments, **options)
            finally:
                self.end(name)

        return timed

    def iterate(self, name: str, iterator: Iterator[Any]) -> Iterator[Any]:
        """What ``iterator`` gives; how long each takes to come, under ``name``."""
        while True:
            self.begin()
            try:
                each = next(iterator)
            except StopIteration:
                return
            finally:
                self.end(name)
            yield each

    def finish(self) -> None:
        """The run is over."""
        self.seconds = time.perf_counter() - self._began

    def text(self, title: str) -> str:
        """A table, the longest first; the shortest are one row, and what is in none the last."""
        known = sum(row.seconds for row in self.rows.values())
        others = Row(1, max(0.0, self.seconds - known), max(0.0, self.seconds - known))
        every = sorted(self.rows.items(), key=lambda item: -item[1].seconds)
        rows = [item for item in every if item[1].seconds >= _LEAST_SHARE * self.seconds]
        short = [row for _, row in every[len(rows) :]]
        if short:
            calls, seconds, longest = zip(*map(attrs.astuple, short))
            rows.append((f"{len(short)} others", Row(sum(calls), sum(seconds), max(longest))))
        header = ("what", "calls", "seconds", "share", "mean ms", "longest ms")
        cells = []
        for name, row in [*rows, ("everything else", others)]:
            share = row.seconds / self.seconds if self.seconds else 0.0
            mean = row.seconds / row.calls * 1e3
            numbers = (f"{row.seconds:.3f}", f"{share:.1%}", f"{mean:.3f}")
            cells.append((name, f"{row.calls:,}", *numbers, f"{row.longest * 1e3:.3f}"))
        lines = tables.as_text(header, cells)
        return "\n".join(["", f"{title}: {self.seconds:.3f} seconds", "", *lines, ""])

    def write(self, folder: Path, name: str) -> Path:
        """Write a trace that chrome://tracing and Perfetto open; a file of its own each time."""
        events = [
            {
                "name": each, "ph": "X", "ts": round(began * 1e6, 3), "dur": round(length * 1e6, 3),
                "pid": os.getpid(), "tid": 0, "cat": each.partition(" ")[0],
            }
            for each, began, length in self.events
        ]  # fmt: skip
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        with temporary_file(folder) as (file, temporary):
            file.write(text.encode())
            file.flush()
            number = 0
            while True:
                path = folder / (
                    f"{name}-trace.json" if not number else f"{name}-trace-{number}.json"
                )
                try:
                    give_name(temporary, path)
                except FileExistsError:
                    number += 1
                else:
                    return path
