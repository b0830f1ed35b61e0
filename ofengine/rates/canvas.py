"""Curves as text, for a terminal without colour, and as files.

Braille characters give 2 x 4 dots a character; a letter on the curve tells whose it is. Of the
libraries that draw in terminals, plotext (the best kept one) tells braille curves apart by colour
alone and has no place for a name beside a curve, so it would not earn its place here.
"""

from __future__ import annotations

import contextlib
import io
import math
import string
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ofengine.errors import ConfigurationError

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
"""The curves' letters, in order; they start over after the last."""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_PLAIN = ("'", "-", "-", ".")
"""What stands for a character's topmost dot where braille cannot be printed."""

Curve = Sequence[Tuple[float, float]]


class Axis:
    """A number range laid over ``dots`` places.

    Args:
        low: the number at place 0.
        high: the number at place ``dots - 1``.
        dots: how many places.
        log: whether the places are even in the logarithm; ``low`` is above 0 then.
    """

    def __init__(self, low: float, high: float, dots: int, log: bool = False) -> None:
        self.log = log
        self._low = math.log(low) if log else low
        self._span = ((math.log(high) if log else high) - self._low) or 1.0
        self._last = dots - 1

    def place(self, value: float) -> float:
        """Where ``value`` lies, from 0 to ``dots - 1``; values outside are put at the ends."""
        if self.log:
            value = math.log(value) if value > 0 else self._low
        return min(max((value - self._low) / self._span, 0.0), 1.0) * self._last

    def value(self, place: float) -> float:
        """The number at ``place``."""
        value = self._low + self._span * place / (self._last or 1)
        return math.exp(value) if self.log else value


class Canvas:
    """A field of characters that curves are drawn into.

    Args:
        columns: its width in characters.
        rows: its height in characters.
        x: the range of x as (low, high).
        y: the range of y as (low, high).
        log_x: draw x by its logarithm.
        log_y: draw y by its logarithm.
        plain: use ASCII only.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        x: Tuple[float, float],
        y: Tuple[float, float],
        log_x: bool = False,
        log_y: bool = False,
        plain: bool = False,
    ) -> None:
        self.columns, self.rows, self._plain = columns, rows, plain
        self.x = Axis(x[0], x[1], 2 * columns, log_x)
        self.y = Axis(y[0], y[1], 4 * rows, log_y)
        self._cells: Dict[Tuple[int, int], int] = {}
        self._tags: Dict[Tuple[int, int], str] = {}

    def draw(self, curve: Curve) -> List[Tuple[int, int]]:
        """Draw ``curve``, points with rising x; return the (row, column) of its characters."""
        places: List[Tuple[int, int]] = []
        for x, y in curve:
            place = (round(self.x.place(x)), round(self.y.place(y)))
            if not places or place != places[-1]:  # many points of a long run share a dot
                places.append(place)
        touched: Dict[Tuple[int, int], None] = {}
        for (x0, y0), (x1, y1) in zip(places, places[1:] or places):
            steps = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
            for i in range(steps + 1):
                dot_x = round(x0 + (x1 - x0) * i / steps)
                dot_y = 4 * self.rows - 1 - round(y0 + (y1 - y0) * i / steps)
                cell = (dot_y // 4, dot_x // 2)
                self._cells[cell] = self._cells.get(cell, 0) | _DOTS[dot_y % 4][dot_x % 2]
                touched[cell] = None
        return list(touched)

    def tag(self, cells: Sequence[Tuple[int, int]], letter: str, index: int, count: int) -> None:
        """Write ``letter`` on a curve at a few of its characters.

        ``index`` of ``count`` curves moves the letters along, so that they do not meet.
        """
        every = 24
        first = round((index + 0.5) * every / max(count, 1))
        for column in range(first, self.columns, every):
            for row, _ in [cell for cell in cells if cell[1] == column][:1]:
                self._tags.setdefault((row, column), letter)

    def lines(self) -> List[str]:
        """The rows of the field, from the top."""
        return [
            "".join(self._character(row, column) for column in range(self.columns))
            for row in range(self.rows)
        ]

    def _character(self, row: int, column: int) -> str:
        if (row, column) in self._tags:
            return self._tags[row, column]
        dots = self._cells.get((row, column), 0)
        if not dots:
            return " "
        if not self._plain:
            return chr(0x2800 + dots)
        return next(c for c, line in zip(_PLAIN, _DOTS) if dots & (line[0] | line[1]))

    def framed(
        self, beside: Optional[Dict[int, str]] = None, x_ticks: Sequence[Tuple[float, str]] = ()
    ) -> List[str]:
        """The rows with both axes.

        Args:
            beside: texts to the right of rows, by row.
            x_ticks: (x, label) below the field; a label that would touch the one before is
                left out.
        """
        ticks = self._y_ticks()
        margin = max(len(label) for label in ticks.values())
        bar, tick, corner, dash, mark = "|++-+" if self._plain else "│┤└─┬"
        lines = []
        for row, line in enumerate(self.lines()):
            edge = tick if row in ticks else bar
            text = f"{ticks.get(row, ''):>{margin}} {edge}{line}{(beside or {}).get(row, '')}"
            lines.append(text.rstrip())
        axis, labels = [dash] * self.columns, [" "] * (self.columns + margin + 2)
        end = 0
        for x, label in x_ticks:
            column = round(self.x.place(x)) // 2
            at = min(margin + 2 + column - len(label) // 2, len(labels) - len(label))
            if at >= end:
                axis[column] = mark
                labels[at : at + len(label)] = label
                end = at + len(label) + 2
        lines.append(" " * (margin + 1) + corner + "".join(axis))
        lines.append("".join(labels).rstrip())
        return lines

    def _y_ticks(self) -> Dict[int, str]:
        """Labels by row: round numbers, at most one in two rows."""
        low, high = self.y.value(0), self.y.value(4 * self.rows - 1)
        values = round_numbers(low, high, max(2, self.rows // 3), self.y.log)
        rows = {}
        for value in values:
            row = (4 * self.rows - 1 - round(self.y.place(value))) // 4
            if row not in rows and row - 1 not in rows and row + 1 not in rows:
                rows[row] = f"{value:.4g}"
        return rows or {0: f"{high:.4g}", self.rows - 1: f"{low:.4g}"}


def round_numbers(low: float, high: float, most: int, log: bool = False) -> List[float]:
    """At most about ``most`` round numbers in [low, high]."""
    slack = (high - low) * 1e-9
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [float(f"{digit}e{d}") for d in decades for digit in digits]
            values = [value for value in values if low - slack <= value <= high + slack]
            if len(values) <= most:
                break
        values = values[:: math.ceil(len(values) / most)] if values else []
        if len(values) > 1:
            return values
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * m for m in (1, 2, 5) if size * m >= raw), size * 10)
    first = math.ceil((low - slack) / step)
    last = math.floor((high + slack) / step)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


@contextlib.contextmanager
def figure(
    path: Union[str, Path, IO[bytes]], width: float, height: float
) -> Iterator[Tuple[Any, Any]]:
    """Axes of a picture, and colors(index, count).

    It is written to ``path`` at the end, into a stream as .svg.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            f"{path} needs matplotlib: install it with `pip install matplotlib`, or use draw()."
        ) from error
    picture = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["right"]].set_visible(False)

    def color(index: int, count: int) -> Any:
        if count <= 10:
            return colormaps["tab10"](index)
        return colormaps["turbo"]((index + 0.5) / count)  # in order, as depth is

    yield axes, color
    if not isinstance(path, (str, Path)):
        picture.savefig(path, format="svg")
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} could not be written: {error}.") from error


def as_svg(plot: Callable[[IO[bytes]], Any]) -> str:
    """The picture that ``plot`` writes into a stream; "" where matplotlib is not installed."""
    picture = io.BytesIO()
    try:
        plot(picture)
    except ConfigurationError:
        return ""
    return picture.getvalue().decode("utf-8")


def spread(rows: Sequence[int], texts: Sequence[str], height: int) -> Dict[int, str]:
    """``texts`` by row: each as near to its own of ``rows`` as the others leave room for."""
    placed: Dict[int, str] = {}
    for row, text in sorted(zip(rows, texts), key=lambda pair: pair[0]):
        free = [each for each in range(height) if each not in placed]
        placed[min(free, key=lambda each: (abs(each - row), each < row))] = " " + text
    in_order = [text for _, text in sorted(zip(rows, texts), key=lambda pair: pair[0])]
    return {row: " " + text for row, text in zip(sorted(placed), in_order)}


def in_columns(texts: Sequence[str], width: int) -> List[str]:
    """``texts`` in columns, read downwards, each cut to ``width``."""
    cell = min(max(map(len, texts)) + 2, width)
    rows = math.ceil(len(texts) / max(1, width // cell))
    lines = ["".join(text[: cell - 1].ljust(cell) for text in texts[i::rows]) for i in range(rows)]
    return [line.rstrip() for line in lines]
