"""The rows of a metrics.csv, and how a resumed run knows that they are its own."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

import attrs

from ofengine.disk import open_regular
from ofengine.errors import CheckpointError
from ofengine.loggers._folder import plain_name

KEYS = ("epoch", "step")


@attrs.define
class Row:
    """A row that is not in the file yet."""

    epoch: int
    step: int
    values: Dict[str, float]

    def cells(self, columns: Iterable[str]) -> List[str]:
        """What the file is to hold: texts that give the same numbers when they are read."""
        values = [repr(self.values[name]) if name in self.values else "" for name in columns]
        return [str(self.epoch), str(self.step), *values]


class Digest:
    """Of all rows so far, one after the other: the same whatever columns are added later."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, cells: List[str]) -> None:
        """Count one more row in."""
        filled = max((place for place, cell in enumerate(cells, 1) if cell), default=0)
        self._hash.update("\x1f".join([*cells[:filled], "\n"]).encode("utf-8", "surrogatepass"))

    @property
    def text(self) -> str:
        """As a checkpoint keeps it."""
        return self._hash.hexdigest()


@attrs.frozen
class Kept:
    """What a checkpoint keeps of a log, checked.

    Attributes:
        folder: the name of the folder of the run, without the way to it.
        columns: the metrics, in their order.
        written_rows: so many rows were in the file.
        digest: of these; None in checkpoints of earlier versions.
        rows: those that were in no file yet.
        next_flush: the step at which they were to be written.
    """

    folder: str
    columns: List[str]
    written_rows: int
    digest: Optional[str]
    rows: List[Row]
    next_flush: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Kept:
        """Raises :class:`CheckpointError` where ``state`` is not that of a CSVLogger.

        What a subclass keeps besides is the subclass's to check.
        """
        try:
            folder, columns, rows = state["folder"], state["columns"], state["rows"]
            written, next_flush = state["written_rows"], state["next_flush"]
            digest = state.get("digest")
            good = all(isinstance(each, str) for each in (folder, digest or "", *columns))
            good = good and isinstance(columns, list) and len({*columns}) == len(columns)
            good = good and _is_count(written) and _is_count(next_flush)
            made = [Row(epoch, step, {**values}) for epoch, step, values in rows]
            good = good and all(_is_row(row, columns) for row in made)
        except (KeyError, TypeError, ValueError, AttributeError):
            good = False
        if not good:
            raise CheckpointError("the checkpoint's state of a CSVLogger is not one.")
        return cls(plain_name(folder), columns, written, digest, made, next_flush)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_row(row: Row, columns: List[str]) -> bool:
    return (
        _is_count(row.epoch)
        and _is_count(row.step)
        and set(row.values) <= set(columns)
        and all(type(value) is float for value in row.values.values())
    )


def digest_if_own(path: Path, kept: Kept, is_beside: bool) -> Optional[Digest]:
    """The digest of the rows in the file ``path`` that a checkpoint was saved after.

    None where they are another run's. They are known by the digest that the checkpoint keeps, and
    what follows them by what the checkpoint has still to write. A checkpoint of earlier versions
    has no digest: it is believed where it lies beside the file (``is_beside``).
    """
    digest, rows_seen, pending_seen = Digest(), 0, 0
    try:
        with open_regular(path) as file:
            rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
            header, columns = [*KEYS, *kept.columns], next(rows, [])
            # Either may have got more columns than the other: the file in a run that went on
            # from an earlier checkpoint, or the checkpoint in one that ended before it wrote.
            if columns[: len(KEYS)] != [*KEYS] or not _agree(header, columns):
                return None
            most = kept.written_rows + len(kept.rows) + 1
            for rows_seen, cells in enumerate(itertools.islice(rows, most), 1):
                place = rows_seen - 1 - kept.written_rows
                if place < 0:
                    digest.add(cells)
                elif place < len(kept.rows):
                    # What a run does not compute again to the bit has other numbers there.
                    branched = is_beside and kept.written_rows > 0
                    if not branched and not _may_be(kept.rows[place], cells, kept.columns):
                        return None
                    pending_seen += 1
    except (OSError, ValueError, csv.Error):
        return None
    if rows_seen < kept.written_rows or kept.digest not in (None, digest.text):
        return None
    is_known = pending_seen > 0 or rows_seen == 0
    is_known |= is_beside if kept.digest is None else kept.written_rows > 0
    return digest if is_known else None


def _may_be(row: Row, cells: List[str], columns: List[str]) -> bool:
    """True where ``cells`` are those of ``row``, of which either may lack values of the other."""
    pairs = zip(row.cells(columns), cells)
    return all(value == cell or not value or not cell for value, cell in pairs)


def _agree(header: List[str], columns: List[str]) -> bool:
    return all(one == other for one, other in zip(header, columns))


def padded(file: Iterable[str], columns: int) -> Iterator[List[str]]:
    """The rows below the header of ``file``, filled up with empty cells to ``columns``."""
    rows = iter(csv.reader(file))
    next(rows, None)
    return ([*row, *[""] * (columns - len(row))][:columns] for row in rows)
