"""LRFinder: what a sweep of rising rates found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from ofengine import tables
from ofengine.errors import ConfigurationError, RateError
from ofengine.rates.canvas import Canvas, as_svg, figure, round_numbers

SMOOTHING = 0.98
"""The weight of the past in the smoothed loss, as in fastai and Lightning."""


class LRFinder:
    """What ``Trainer.lr_find`` found: the loss at each rate that was tried.

    Args:
        rates: see below.
        losses: see below.
        base: the ``lr`` of each group, by name.
        group: see below.
        reference: the rate of ``group`` (``lr`` times ``lr_scale``) before the sweep.
        mode: "exponential" or "linear", how the rates rose.
        stopped_early: see below.

    Attributes:
        rates: at each step the rate of the group whose rate is largest.
        losses: the training loss of each step (the mean over its batches under accumulation).
        smoothed: the losses' exponential moving average (0.98, corrected for its start), which
            early stopping and :meth:`suggestion` look at.
        group: the name of the group that ``rates`` are of.
        stopped_early: True where the loss grew too large, or was not finite, before the end.
    """

    def __init__(
        self,
        rates: Sequence[float],
        losses: Sequence[float],
        base: Dict[str, float],
        group: str,
        reference: float,
        mode: str = "exponential",
        stopped_early: bool = False,
    ) -> None:
        self.rates = list(rates)
        self.losses = list(losses)
        self.smoothed = smooth(losses)
        self.group = group
        self.mode = mode
        self.stopped_early = stopped_early
        self._base = base
        self._reference = reference

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> Optional[float]:
        """The rate at which the smoothed loss falls most steeply; None where it never falls.

        The slope is that of the loss over the logarithm of the rate (over the rate in a linear
        sweep), by central differences, as in fastai.

        Args:
            skip_begin: so many of the first steps are left out.
            skip_end: so many of the last.
        """
        stop = len(self.rates) - skip_end
        kept = [i for i in range(skip_begin, stop) if math.isfinite(self.smoothed[i])]
        if len(kept) < 2:
            return None
        rates = np.array([self.rates[i] for i in kept])
        places = rates if self.mode == "linear" else np.log(rates)
        slopes = np.gradient(np.array([self.smoothed[i] for i in kept]), places)
        steepest = int(slopes.argmin())
        return float(rates[steepest]) if slopes[steepest] < 0 else None

    def lrs(self, rate: Optional[float] = None) -> Dict[str, float]:
        """What to write as ``lr`` of each group so that ``group`` has ``rate``, ratios kept.

        Args:
            rate: default :meth:`suggestion`.

        Raises:
            RateError: there is no suggestion.
        """
        rate = self.suggestion() if rate is None else rate
        if rate is None:
            raise RateError("the loss never fell in this sweep: give lrs() a rate.")
        return {name: lr * rate / self._reference for name, lr in self._base.items()}

    def __str__(self) -> str:
        found = self.suggestion()
        text = f"lr_find: {len(self.rates)} steps"
        if self.rates:
            text += f" from {self.rates[0]:.3g} to {self.rates[-1]:.3g} (group {self.group!r})"
        if self.stopped_early:
            text += ", stopped early"
        return text + (", no suggestion" if found is None else f", suggestion {found:.3g}")

    def _repr_html_(self) -> str:
        """The rates to write and the curve in a notebook; the curve where there is matplotlib."""
        rates = {} if self.suggestion() is None else self.lrs()
        rows = [[name, f"{self._base[name]:.4g}", f"{rate:.4g}"] for name, rate in rates.items()]
        table = tables.as_html(str(self), ["group", "lr", "suggested lr"], rows)
        return table + as_svg(self._plot)

    def draw(self, width: int = 80, height: int = 16, plain: bool = False) -> str:
        """The smoothed loss over the rate as text; the suggestion is marked below.

        Args:
            width: columns in all, at least 40.
            height: rows of the field, at least 4.
            plain: draw with ASCII characters instead of braille.
        """
        if width < 40 or height < 4:
            raise ConfigurationError(
                f"draw(width={width}, height={height}): give at least 40 columns and 4 rows."
            )
        points = self._points()
        if len(points) < 2:
            return f"{self}: nothing to draw."
        losses, x = [loss for _, loss in points], (points[0][0], points[-1][0])
        canvas = Canvas(
            width - 11, height, x, (min(losses), max(losses)), log_x=self._log, plain=plain
        )
        canvas.draw(points)
        found = self.suggestion()
        ticks = round_numbers(x[0], x[1], canvas.columns // 10, self._log)
        lines = ["smoothed loss by learning rate" + (" (log scale)" if self._log else "")]
        lines += canvas.framed(x_ticks=[(rate, f"{rate:.3g}") for rate in ticks])
        if found is not None:
            margin = len(lines[-2]) - canvas.columns
            column = margin + round(canvas.x.place(found)) // 2
            mark = f"^ suggestion {found:.3g}"
            at = column if column + len(mark) <= width else column - len(mark) + 1
            lines.append(" " * at + (mark if at == column else f"suggestion {found:.3g} ^"))
        return "\n".join(lines)

    def plot(self, path: Union[str, Path], width: float = 7.0, height: float = 4.0) -> Path:
        """Write losses, smoothed losses and suggestion to ``path`` (.png, .svg, .pdf); its path.

        Raises :class:`ConfigurationError` where matplotlib is missing or the file cannot be
        written. ``width`` and ``height`` are in inches.
        """
        self._plot(path, width, height)
        return Path(path)

    def _plot(
        self, path: Union[str, Path, IO[bytes]], width: float = 7.0, height: float = 4.0
    ) -> None:
        with figure(path, width, height) as (axes, colors):
            axes.plot(self.rates, self.losses, color="0.8", linewidth=1, label="loss")
            axes.plot(self.rates, self.smoothed, color=colors(0, 1), label="smoothed loss")
            found = self.suggestion()
            if found is not None:
                loss = self.smoothed[self.rates.index(found)]
                axes.plot([found], [loss], "o", color=colors(3, 4), label=f"suggestion {found:.3g}")
            shown = [loss for _, loss in self._points()]
            if shown:  # single steps' losses may lie far outside
                low, high = np.percentile([*shown, *self.losses[: len(shown)]], (5, 95))
                low, high = min(low, *shown), max(high, *shown)
                room = (high - low) * 0.1 or 1.0
                axes.set_ylim(low - room, high + room)
            if self._log:
                axes.set_xscale("log")
            axes.set(xlabel=f"learning rate of {self.group}", ylabel="training loss")
            axes.legend(frameon=False)

    @property
    def _log(self) -> bool:
        return self.mode == "exponential"

    def _points(self) -> List[Tuple[float, float]]:
        """The smoothed curve; what rises far above its start at the end is left out."""
        points = [(r, s) for r, s in zip(self.rates, self.smoothed) if math.isfinite(s)]
        if not points:
            return []
        low = min(loss for _, loss in points)
        most = points[0][1] + 1.0 * max(points[0][1] - low, abs(points[0][1]) * 0.1)
        while len(points) > 2 and points[-1][1] > most:
            points.pop()
        return points


def smooth(losses: Sequence[float]) -> List[float]:
    """The exponential moving average of ``losses``, corrected for its start at 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed
