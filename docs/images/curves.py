"""Rates as small pictures: an SVG of a few kilobytes that is the same wherever it is drawn."""

from __future__ import annotations

import html
import math
from typing import Dict, List, Sequence, Tuple

LEFT, TOP, WIDTH, HEIGHT, BOTTOM = 46, 8, 270, 96, 20
LINE, LETTER = 15, 6.3  # of the names beside the curves
INK = "#808080"  # to be read on white and on a dark page
COLORS = (
    "#4c78c8",
    "#e07b39",
    "#3a9a5b",
    "#c44e52",
    "#8a6bbf",
    "#8f6a52",
    "#c76ab0",
    "#8a8a33",
    "#2f9fb0",
    "#b08a2e",
)
DECADES = 1.5
"""Where the groups' largest rates are further apart, the axis is logarithmic."""


def svg(curves: Dict[str, Sequence[float]], epochs: Sequence[int]) -> str:
    """Stairs of the rate by step, with the groups' names beside them.

    Args:
        curves: the rate at each optimizer step, by group. Groups of the same rates share a curve.
        epochs: the first step of each epoch.
    """
    shared: Dict[Tuple[float, ...], List[str]] = {}
    for name, rates in curves.items():
        shared.setdefault(tuple(rates), []).append(name)
    steps = len(next(iter(shared)))
    peaks = [max(rates) for rates in shared if max(rates) > 0]
    high = max(peaks, default=1.0)
    is_log = math.log10(high / min(peaks, default=high)) > DECADES
    low = min(peaks) / 10 if is_log else 0.0

    def x(step: int) -> str:
        return _number(LEFT + WIDTH * step / steps)

    def y(rate: float) -> str:
        share = rate / high
        if is_log:
            share = math.log(max(rate, low) / low) / math.log(high / low)
        return _number(TOP + HEIGHT * (1 - share))

    # By their height, as one looks for them.
    drawn = sorted(shared.items(), key=lambda each: -sum(each[0]))
    names = [", ".join(each) for _, each in drawn]
    width = round(LEFT + WIDTH + 14 + LETTER * max(map(len, names)))
    height = max(TOP + HEIGHT + BOTTOM, TOP + LINE * len(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="{INK}">',
        *(
            f'<path d="M{x(epoch)} {TOP}v{HEIGHT}" stroke="{INK}" stroke-opacity=".35"/>'
            for epoch in epochs[1:]
        ),
        f'<path d="M{LEFT} {TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="{INK}"/>',
        f'<text x="{LEFT - 4}" y="{TOP + 9}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{LEFT - 4}" y="{TOP + HEIGHT}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{LEFT}" y="{TOP + HEIGHT + 14}">0</text>',
        f'<text x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 14}" text-anchor="end">{steps}</text>',
    ]
    for index, (rates, _) in enumerate(drawn):
        color = COLORS[index % len(COLORS)]
        path = f"M{x(0)} {y(rates[0])}"
        for step in range(1, steps):
            if y(rates[step]) != y(rates[step - 1]):
                path += f"H{x(step)}V{y(rates[step])}"
        path += f"H{x(steps)}"
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        place = f'x="{LEFT + WIDTH + 10}" y="{TOP + 9 + LINE * index}"'
        parts.append(f'<text {place} fill="{color}">{html.escape(names[index])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
