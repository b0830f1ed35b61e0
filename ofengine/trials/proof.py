"""What a proof found, as rows and as a table."""

from __future__ import annotations

import textwrap
from typing import Dict, List, Optional, Sequence

import attrs

from ofengine.trials.recording import QUANTITIES

_WIDTH = 80


@attrs.frozen
class Difference:
    """Where a run is another than the one that it is compared with, for the first time."""

    step: int
    """The optimizer step, from 1."""
    parameter: Optional[str]
    """The parameter or buffer with the largest difference after it; None where none differs."""
    distance: float
    """That difference, absolute; ``inf`` where one of the two is not finite."""
    origin: str
    """Where it comes from, as far as that can be told."""

    def __str__(self) -> str:
        """One or two sentences."""
        worst = f" {self.parameter} is off by up to {self.distance:.3g}." if self.parameter else ""
        return f"not the same from step {self.step} on.{worst} {self.origin}"


@attrs.frozen
class Row:
    """A run, and the run that it has to equal."""

    name: str
    against: str
    steps: int
    """How many optimizer steps were compared."""
    first: Dict[str, Optional[int]]
    """Of each quantity the first step, from 1, in which it is another; None for equal."""
    difference: Optional[Difference] = None
    error: str = ""
    """Why the run could not be made."""

    @property
    def equal(self) -> bool:
        """True where every bit is the same."""
        return not self.error and self.steps > 0 and not any(self.first.values())


@attrs.frozen
class Report:
    """What :meth:`ofengine.Trainer.prove` found. As a text it is a table of 80 columns."""

    task: str
    steps: int
    """The optimizer steps of a whole run."""
    rows: List[Row]
    left_out: Sequence[str] = ()
    """The callbacks that took no part."""

    @property
    def equal(self) -> bool:
        """True where all runs are equal to the bit."""
        return all(row.equal for row in self.rows)

    def __str__(self) -> str:
        """The table, then a paragraph for each row that is not equal."""
        columns = ("run", "against", "steps", *QUANTITIES)
        table = [columns, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
        lines = [f"{self.task}, {self.steps} steps, compared to the bit", ""]
        for cells in table:
            joined = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths))
            lines.append(joined.rstrip())
        for row in self.rows:
            if not row.equal:
                told = row.error or str(row.difference or "nothing was compared.")
                lines += ["", *textwrap.wrap(f"{row.name}: {told}", _WIDTH)]
        if self.left_out:
            took_no_part = f"Callbacks that took no part: {', '.join(self.left_out)}."
            lines += ["", *textwrap.wrap(took_no_part, _WIDTH)]
        every = "Every bit is the same." if self.equal else "Not all of it is the same."
        return "\n".join([*lines, "", every])


def _cells(row: Row) -> Sequence[str]:
    if row.error:
        return (row.name, row.against, "-", *("-" for _ in QUANTITIES))
    found = [row.first.get(quantity) for quantity in QUANTITIES]
    told = ("equal" if step is None else f"step {step}" for step in found)
    return (row.name, row.against, str(row.steps), *told)
