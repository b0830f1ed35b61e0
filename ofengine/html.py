"""Tables as a notebook shows them."""

from __future__ import annotations

import html
from typing import Sequence


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    """A table in HTML: the first column to the left, the others, mostly numbers, to the right."""
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
