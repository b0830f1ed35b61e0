"""Tables: as text in columns, and as a notebook shows them."""

from __future__ import annotations

import html
from typing import List, Sequence


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a table: the first column to the left, the others, mostly numbers, to the right.

    A rule is below the header.
    """
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def as_html(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    """The same table in HTML, and a ``note`` below it."""
    lines = [f"<table><caption>{html.escape(caption)}</caption>", _row("th", header)]
    lines += [_row("td", row) for row in rows]
    lines.append("</table>")
    if note:
        lines.append(f"<p>{html.escape(note)}</p>")
    return "\n".join(lines)


def _row(tag: str, cells: Sequence[str]) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    inside = "".join(
        f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells)
    )
    return f"<tr>{inside}</tr>"
