"""What a progress bar is drawn with: counts, and where they are shown."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import textwrap
from time import monotonic
from typing import Any, Dict, Iterator, List, Optional, Sequence

from tqdm.auto import tqdm

_REDRAW = 0.1
"""Seconds between two redraws of a bar; more often, nobody could read it."""
_LOOK = 1.0
"""Seconds between two looks at whether a log file should get a line."""
_LINE_AFTER = 10.0
"""A log file gets a line each tenth of an epoch, but at most every so many seconds ..."""
_LINE_AT_LATEST = 60.0
"""... and at least every so many."""
_LEAST_CELLS = 6
"""A bar shorter than this says less than the numbers in its place would."""
_LOSS = ("loss", "loss_step", "loss_epoch")
_LEAST_COLUMNS = 20
"""Lines are not made shorter than this; some terminals say that they have no columns at all."""
_COMPACT = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}{postfix}"
"""What a terminal shows that is too narrow for a bar and the metrics."""

IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class Count:
    """How far one pass over batches is, and since when."""

    def __init__(self, label: str, total: Optional[int], nested: bool = False) -> None:
        self.label = label
        self.total = total
        self.nested = nested
        self.done = 0
        self._skipped = 0
        self._began = monotonic()
        self._paused: Optional[float] = None
        self._compilations = 0
        self._compile_seconds = 0.0

    @property
    def seconds(self) -> float:
        """How long the pass has taken, pauses aside."""
        return (monotonic() if self._paused is None else self._paused) - self._began

    def skip(self, batches: int) -> None:
        """So many batches were done before the clock was started."""
        self.done = self._skipped = batches

    def pause(self) -> None:
        """Stop the clock."""
        if self._paused is None:
            self._paused = monotonic()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused is not None:
            self._began += monotonic() - self._paused
            self._paused = None

    def compiled(self) -> None:
        """The pause was a compilation, together with the step that it was for."""
        if self._paused is not None:
            self._compilations += 1
            self._compile_seconds += monotonic() - self._paused

    @property
    def speed(self) -> str:
        """Batches in a second (or seconds for a batch); "" before one was measured."""
        batches, seconds = self.done - self._skipped - self._compilations, self.seconds
        if batches <= 0 or seconds <= 0:
            return ""
        if batches >= seconds:
            return f"{batches / seconds:.1f}it/s"
        return f"{seconds / batches:.2f}s/it"

    def line(self, metrics: Dict[str, float]) -> str:
        """The pass in one line; a mean over the epoch stands for the value of its last step too."""
        of = "" if self.total in (None, self.done) else f"/{self.total}"
        unit = "batch" if self.done == 1 and not of else "batches"
        time = f"{self.done}{of} {unit} in {duration(self.seconds)}"
        if self._compilations:
            time += f" + {duration(self._compile_seconds)} compiling"
        facts = [time, self.speed, *words(_of_epoch(metrics))]
        return f"{self.label}: " + ", ".join(filter(None, facts))


class Display:
    """Where counts are shown. This one shows nothing."""

    interval = float("inf")
    """Seconds between two calls of ``draw``."""

    def begin(self, count: Count) -> None:
        """Show a count that begins."""

    def draw(self, count: Count, words: Sequence[str]) -> None:
        """Show how far a count is, and ``words``."""

    def resume(self, count: Count, words: Sequence[str]) -> None:
        """Go on with a count that was paused."""

    def end(self, count: Count) -> None:
        """Take away what shows a count."""

    def write(self, line: str) -> None:
        """Write a line that stays."""

    def close(self) -> None:
        """Take everything away."""


@contextlib.contextmanager
def _terminal_may_be_closed() -> Iterator[None]:
    """A run that goes on when its terminal is closed, as under nohup, must not fail for its bar."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class Lines(Display):
    """Plain lines, few of them."""

    interval = _LOOK

    def __init__(self) -> None:
        self._written = 0.0
        self._share = 0.0

    def begin(self, count: Count) -> None:
        if not count.nested:
            self._written, self._share = monotonic(), 0.0

    def draw(self, count: Count, words: Sequence[str]) -> None:
        ago = monotonic() - self._written
        share = count.done / count.total if count.total and not count.nested else 0.0
        if ago >= _LINE_AT_LATEST or (ago >= _LINE_AFTER and share >= self._share + 0.1):
            self._share = share
            done = f"{count.done}/{count.total or '?'} batches"
            self.write(f"{count.label}: " + ", ".join(filter(None, [done, count.speed, *words])))

    def write(self, line: str) -> None:
        with _terminal_may_be_closed():
            print(line, flush=True)
        self._written = monotonic()


class Bars(Display):
    """A bar for what runs, and one below it for a validation in between."""

    interval = _REDRAW

    def __init__(self) -> None:
        self._bars: List[Optional[_Bar]] = [None, None]

    def begin(self, count: Count) -> None:
        label = f"  {count.label}" if count.nested else count.label
        bar = self._bars[count.nested]
        if bar is None:
            self._bars[count.nested] = _Bar(
                desc=label,
                total=count.total,
                file=sys.stdout,
                leave=False,
                dynamic_ncols=not IN_NOTEBOOK,
                mininterval=0.0,
                miniters=1,
                smoothing=0.1,
            )
        else:
            bar.set_description_str(label, refresh=False)
            bar.words, bar.initial = (), 0
            bar.reset(total=count.total)

    def draw(self, count: Count, words: Sequence[str]) -> None:
        bar = self._bars[count.nested]
        if bar is None:
            return
        bar.words = words
        if count.done > bar.n:
            bar.update(count.done - bar.n)
        else:
            bar.refresh()

    def resume(self, count: Count, words: Sequence[str]) -> None:
        bar = self._bars[count.nested]
        if bar is None:
            return
        if bar.n == 0:
            bar.initial = count.done  # the step that was compiled for says nothing of the speed
        bar.words = words
        bar.n = bar.last_print_n = count.done
        bar.unpause()  # the time since the last redraw is not the batches'
        bar.refresh()

    def end(self, count: Count) -> None:
        if IN_NOTEBOOK:  # each new bar would take another piece of the cell: keep this one
            self.draw(count, [])
            return
        bar, self._bars[count.nested] = self._bars[count.nested], None
        if bar is not None:
            bar.close()

    def write(self, line: str) -> None:
        with _terminal_may_be_closed():
            _Bar.write(line if IN_NOTEBOOK else _wrapped(line), file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        for bar in self._bars:
            if bar is not None:
                bar.close()
        self._bars = [None, None]


class _Bar(tqdm):
    """tqdm's bar, that leaves out what a narrow terminal has no room for."""

    monitor_interval = 0  # no thread that watches the bar
    words: Sequence[str] = ()

    @property
    def format_dict(self) -> Dict[str, Any]:
        """What the bar shows; tqdm asks for it at every redraw."""
        facts: Dict[str, Any] = super().format_dict
        words, columns = list(self.words), facts["ncols"]
        facts["postfix"] = ", ".join(words)
        if IN_NOTEBOOK or not columns:
            return facts
        numbers = self.format_meter(**{**facts, "ncols": 0})
        if len(numbers) + _LEAST_CELLS < columns:
            return facts
        facts["bar_format"] = _COMPACT
        while words and len(self.format_meter(**facts)) >= columns:
            words.pop()
            facts["postfix"] = ", ".join(words)
        return facts


def words(metrics: Dict[str, float]) -> List[str]:
    names = sorted(metrics, key=lambda name: name not in _LOSS)  # first, where room is short
    return [f"{name}={short(metrics[name])}" for name in names]


def _of_epoch(metrics: Dict[str, float]) -> Dict[str, float]:
    """``metrics`` without ``x_step`` where there is ``x_epoch``."""
    doubles = {f"{name[:-6]}_step" for name in metrics if name.endswith("_epoch")}
    return {name: value for name, value in metrics.items() if name not in doubles}


def _wrapped(line: str) -> str:
    """``line`` in as many lines as the terminal needs for it: no number is cut in two."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):  # it does not say how wide it is
        return line
    if columns < _LEAST_COLUMNS:
        return line
    return textwrap.fill(
        line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def short(value: float) -> str:
    """A number in about six characters, always as many, so that a bar does not jump."""
    size = abs(value)
    if 0 < size < 1e-3 or 1e5 <= size < float("inf"):
        return f"{value:.2e}"
    return f"{value:.{4 if size < 10 else 3 if size < 100 else 2 if size < 1000 else 1}f}"


def duration(seconds: float) -> str:
    """Seconds as "14ms", "14.2s", "3:05" or "1:03:05"."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
