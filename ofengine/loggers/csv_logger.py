"""CSVLogger: the metrics of a run as one table in a file."""

from __future__ import annotations

import csv
import io
import itertools
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from ofengine.disk import (
    append_whole,
    give_name,
    open_regular,
    remove_leftovers,
    temporary_file,
)
from ofengine.errors import warn
from ofengine.loggers._folder import FolderLogger, number_of, size_of
from ofengine.loggers._rows import KEYS, Digest, Kept, Row, digest_if_own, padded


class CSVLogger(FolderLogger):
    """Writes ``<save_dir>/<name>/version_<n>/metrics.csv``.

    The columns are ``epoch`` (from 0), ``step`` (optimizer steps done), then the metrics in the
    order in which they first appear. Metrics of the same epoch and step share a row, as long as
    it was not written yet and none of them is in it already. A cell is empty where a metric had
    no value; a number is written so that reading it gives the same number again (``nan`` and
    ``inf`` too). A metric that first appears later gets its column in the rows before, too.

    The folder is made when ``log_dir`` is asked for or the first metric comes, whichever is
    first: a run claims a version by making its folder, so that no two runs share one.

    Where the file cannot be written during a run, the logger warns once, keeps the rows in
    memory and tries again at the next flush.

    A resumed run goes on in the file that it wrote, wherever its folder is now: beside the
    checkpoint, or in ``save_dir``. It knows the file by what is in it; any other file stays as it
    is, and the run begins one in a folder of its own, with a copy of its rows where they are found.

    Args:
        save_dir: the folder of all logs.
        name: a folder in it; "" or None for none.
        version: a number for ``version_<number>``, or the folder's own name. Default: the
            number after the highest there is.
        flush_logs_every_n_steps: how often rows are written, in optimizer steps. All are
            written at ``save()`` and at the end of the run.

    Raises:
        ConfigurationError: an argument is wrong, or ``version`` is another run's; when
            ``log_dir`` is asked for, where the folder cannot be made.
    """

    file_name = "metrics.csv"

    def __init__(
        self,
        save_dir: Union[str, Path],
        name: Optional[str] = "ofengine_logs",
        version: Union[int, str, None] = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, flush_logs_every_n_steps)
        self._columns: List[str] = []
        self._written_columns = 0
        self._rows: List[Row] = []
        self._written_rows = 0
        self._digest = Digest()
        self._history: Optional[Tuple[Path, int]] = None
        self._untouched = False

    def state_dict(self) -> Dict[str, Any]:
        """Where the rows are, how many of them, and those that are in no file yet."""
        if not self._columns:
            return {}
        return {
            "folder": self._claim().name,
            "columns": list(self._columns),
            "written_rows": self._written_rows if self._history is None else self._history[1],
            "digest": self._digest.text,
            # A copy: the last row may still grow.
            "rows": [[row.epoch, row.step, dict(row.values)] for row in self._rows],
            "next_flush": self._next_flush,
        }

    def check_state_dict(self, state: Dict[str, Any]) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of a CSVLogger."""
        Kept.of(state)

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        """Go on behind these rows; the file is touched when the first new row is written.

        With ``continue_files`` in the same file, from which later rows are taken out, as they
        will come again; else in a new one, which begins with a copy of these rows.
        """
        kept = Kept.of(state)
        source, digest = self._find(kept)
        if continue_files:
            self._go_on_in(source, kept.folder)
        if source is None and kept.written_rows:
            warn(
                f"the {kept.written_rows:,} rows that the run had logged before are in no "
                "metrics.csv beside the checkpoint or in the folders of this CSVLogger: its log "
                "begins with what comes now."
            )
        self._columns = list(kept.columns)
        self._rows = list(kept.rows)
        self._untouched = True
        self._next_flush = kept.next_flush
        self._digest = digest
        found = source is not None
        self._history = (
            (source or Path()) / "metrics.csv", kept.written_rows if found else 0
        )  # fmt: skip

    # ------------------------------------------------------------------ the run before

    def _find(self, kept: Kept) -> Tuple[Optional[Path], Digest]:
        """The folder with the rows of the run, and their digest; None where there is none."""
        for folder, is_beside in self._places(kept.folder):
            digest = digest_if_own(folder / "metrics.csv", kept, is_beside)
            if digest is not None:
                return folder, digest
        return None, Digest()

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Add ``metrics`` to the row of (``epoch``, ``step``)."""
        if not metrics:
            return
        values = {name: number_of(name, value) for name, value in metrics.items()}
        self._untouched = False
        known = set(self._columns)
        self._columns.extend(name for name in values if name not in known)
        last = self._rows[-1] if self._rows else None
        if last is not None and (last.epoch, last.step) == (epoch, step):
            if last.values.keys().isdisjoint(values):
                last.values.update(values)
                return
        elif step >= self._next_flush or (last is not None and step < last.step):
            # Written before the new row is there, because that one may still grow. Steps that
            # go back are another fit's.
            self._write()
            self._next_flush = step + self._every
        self._rows.append(Row(epoch, step, values))

    def save_due(self, step: int) -> None:
        """Write the rows of earlier steps, where they have waited long enough."""
        if self._untouched:
            return
        if step >= self._next_flush and self._rows and self._rows[-1].step < step:
            self._write()
            self._next_flush = step + self._every

    def save(self) -> None:
        """Write all rows that are not in the file yet."""
        self._write()

    def finalize(self, status: str) -> None:
        """Write what is left; take the folder away again where nothing ever came into it."""
        self._write()
        if not self._columns:
            self._give_back()

    # ------------------------------------------------------------------ the file

    def _write(self) -> None:
        if not self._rows:
            return
        if self._history is not None and self._untouched:
            return  # nothing came since the run was resumed
        try:
            path = self._claim() / "metrics.csv"
            if self._history is not None:
                self._begin_with(path, *self._history)
                self._history = None
            if size_of(path) is None:  # at first, or somebody took it away
                path.parent.mkdir(parents=True, exist_ok=True)
                self._written_columns = 0
            if len(self._columns) > self._written_columns:
                self._add_columns(path)
            self._append(path)
        except OSError as error:
            self._tell_unwritable(error, "the rows are")

    def _begin_with(self, path: Path, source: Path, most: int) -> None:
        """Let ``path`` hold the first ``most`` rows of ``source``, which may be the same file."""
        remove_leftovers(path.parent)
        self._written_columns = self._written_rows = 0
        if most == 0 or not source.exists():  # somebody took it away since
            if self._resumed and path.exists():  # its rows were found to be this run's
                path.unlink()
            self._digest = Digest()
            return
        self._rewrite(path, source, most, replaces=self._resumed)
        self._written_rows = most

    def _add_columns(self, path: Path) -> None:
        """Put the new columns into the header and, empty, into the rows that are there."""
        is_ours = self._written_columns > 0
        self._rewrite(path, path if is_ours else None, None, replaces=is_ours)

    def _rewrite(
        self, path: Path, source: Optional[Path], most: Optional[int], replaces: bool
    ) -> None:
        """Write the header and the rows of ``source``, at most so many, to ``path``.

        A file that is there is only replaced where ``replaces`` says that it is this run's.
        """
        header = [*KEYS, *self._columns]
        with temporary_file(path.parent) as (file, temporary):
            text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(header)
            if source is not None:
                with open_regular(source) as old:
                    before = io.TextIOWrapper(old, "utf-8", newline="")
                    rows.writerows(itertools.islice(padded(before, len(header)), most))
            text.flush()
            os.fsync(file.fileno())
            if replaces:
                os.replace(temporary, path)
            else:
                give_name(temporary, path)
        self._written_columns = len(self._columns)

    def _append(self, path: Path) -> None:
        """Write the rows behind all that is there; no half row, for all come again."""
        cells = [row.cells(self._columns) for row in self._rows]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(cells)
        append_whole(path, text.getvalue().encode())
        for row in cells:
            self._digest.add(row)
        self._written_rows += len(self._rows)
        self._rows.clear()
