"""CSVLogger: the metrics of a run as one table in a file."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import IO, Any, Dict, Iterable, List, Optional, Tuple, Union

from ofengine.errors import ConfigurationError, OFEngineWarning
from ofengine.loggers.base import Logger

_KEYS = ("epoch", "step")


class CSVLogger(Logger):
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

    def __init__(
        self,
        save_dir: Union[str, Path],
        name: Optional[str] = "ofengine_logs",
        version: Union[int, str, None] = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        every = flush_logs_every_n_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(
                f"CSVLogger(flush_logs_every_n_steps={every!r}): give a whole number of optimizer "
                "steps, from 1 on."
            )
        if version is not None and (isinstance(version, bool) or version == ""):
            raise ConfigurationError(
                f"CSVLogger(version={version!r}): give a number, a folder's name, or None."
            )
        self.save_dir = Path(save_dir)
        self.name = name or ""
        self.version = version
        self._every = every
        self._folder: Optional[Path] = None
        self._columns: List[str] = []
        self._written_columns = 0
        self._rows: List[_Row] = []
        self._next_flush = every
        self._warned = False
        self._written_rows = 0
        self._history: Optional[Tuple[Path, int]] = None
        self._resumed = False
        self._untouched = False

    def state_dict(self) -> Dict[str, Any]:
        """Where the rows are, how many of them, and those that are in no file yet."""
        if not self._columns:
            return {}
        return {
            "folder": str(self._claim().absolute()),
            "columns": list(self._columns),
            "written_rows": self._written_rows if self._history is None else self._history[1],
            "rows": [[row.epoch, row.step, row.values] for row in self._rows],
            "next_flush": self._next_flush,
        }

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        """Go on behind these rows; the file is touched when the first new row is written.

        With ``continue_files`` in the same file, from which later rows are taken out, as they
        will come again; else in a new one, which begins with a copy of these rows.
        """
        folder = Path(state["folder"])
        same_place = self.version is None or folder == self._own_folder().absolute()
        if continue_files and same_place and folder.is_dir():
            self._folder = folder
            self._resumed = True
        self._columns = list(state["columns"])
        self._rows = [_Row(epoch, step, values) for epoch, step, values in state["rows"]]
        self._untouched = True
        self._next_flush = state["next_flush"]
        self._history = (folder / "metrics.csv", state["written_rows"])

    def run_dirs(self) -> List[Path]:
        """The folders of this and of earlier runs with this ``save_dir`` and ``name``."""
        root = self.save_dir / self.name
        if self.version is not None:
            return [self._own_folder()]
        return [each for each in root.iterdir() if each.is_dir()] if root.is_dir() else []

    @property
    def log_dir(self) -> str:
        """The folder of this run; the first look makes it. The same from then on."""
        try:
            return str(self._claim())
        except OSError as error:
            raise ConfigurationError(
                f"CSVLogger cannot make a folder in {self.save_dir}: {error.strerror or error}. "
                "Give a save_dir (Trainer: default_root_dir) that can be written to, or "
                "Trainer(logger=False)."
            ) from error

    @property
    def path(self) -> str:
        """The file, ``metrics.csv`` in ``log_dir``."""
        return str(Path(self.log_dir) / "metrics.csv")

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        """Add ``metrics`` to the row of (``epoch``, ``step``)."""
        if not metrics:
            return
        values = {name: _number(name, value) for name, value in metrics.items()}
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
        self._rows.append(_Row(epoch, step, values))

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
        if self._folder is not None and not self._columns:
            try:
                self._folder.rmdir()
            except OSError:
                return  # checkpoints are in it, or it is gone
            self._folder = None

    # ------------------------------------------------------------------ the folder

    def _claim(self) -> Path:
        """Make this run's folder, once. Raises OSError where that fails."""
        if self._folder is None:
            if self.version is None:
                self._folder = self._next_version()
            else:
                taken = self._own_folder() / "metrics.csv"
                if taken.exists() and not self._resumed:
                    raise ConfigurationError(
                        f"CSVLogger(version={self.version!r}): {taken} is there already, from "
                        "another run: give another version, or remove it."
                    )
                self._own_folder().mkdir(parents=True, exist_ok=True)
                self._folder = self._own_folder()
        return self._folder

    def _own_folder(self) -> Path:
        own = f"version_{self.version}" if isinstance(self.version, int) else str(self.version)
        return self.save_dir / self.name / own

    def _next_version(self) -> Path:
        root = self.save_dir / self.name
        root.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(r"version_(\d+)", entry.name) for entry in root.iterdir()]
        number = max([int(match.group(1)) for match in taken if match], default=-1) + 1
        while True:
            folder = root / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:  # another run was faster
                number += 1
            else:
                return folder

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
            size = _size(path)
            if size is None:  # at first, or somebody took it away
                path.parent.mkdir(parents=True, exist_ok=True)
                self._written_columns = 0
            if len(self._columns) > self._written_columns:
                self._add_columns(path)
                size = _size(path)
            self._append(path, size or 0)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"CSVLogger cannot write to {self._folder or self.save_dir}: "
                    f"{error.strerror or error}. Training goes on; the rows are kept in memory "
                    "and written as soon as that is possible.",
                    OFEngineWarning,
                    stacklevel=3,
                )

    def _begin_with(self, path: Path, source: Path, most: int) -> None:
        """Let ``path`` hold the first ``most`` rows of ``source``, which may be the same file."""
        self._written_columns = self._written_rows = 0
        if most == 0 or not source.exists():
            if path.exists():
                path.unlink()
            return
        self._rewrite(path, source, most)
        self._written_rows = most

    def _add_columns(self, path: Path) -> None:
        """Put the new columns into the header and, empty, into the rows that are there."""
        self._rewrite(path, path if self._written_columns else None, None)

    def _rewrite(self, path: Path, source: Optional[Path], most: Optional[int]) -> None:
        """Write the header and the rows of ``source``, at most so many, to ``path``."""
        header = [*_KEYS, *self._columns]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", newline="", encoding="utf-8") as new:
                rows = csv.writer(new, lineterminator="\n")
                rows.writerow(header)
                if source is not None:
                    with open(source, newline="", encoding="utf-8") as old:
                        rows.writerows(itertools.islice(_padded(old, len(header)), most))
                _sync(new)
            os.replace(temporary, path)
        except OSError:
            if temporary.exists():
                temporary.unlink()
            raise
        self._written_columns = len(self._columns)

    def _append(self, path: Path, end: int) -> None:
        """Write the rows behind the first ``end`` bytes, which are all."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [row.epoch, row.step, *(row.values.get(name, "") for name in self._columns)]
            for row in self._rows
        )
        left = memoryview(text.getvalue().encode())
        with open(path, "ab", buffering=0) as file:
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                os.truncate(path, end)  # no half row: all of them come again at the next flush
                raise
        self._written_rows += len(self._rows)
        self._rows.clear()


class _Row:
    """A row that is not in the file yet."""

    __slots__ = ("epoch", "step", "values")

    def __init__(self, epoch: int, step: int, values: Dict[str, float]) -> None:
        self.epoch = epoch
        self.step = step
        self.values = values


def _size(path: Path) -> Optional[int]:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"log_metrics got {name!r} as a {type(value).__name__}: give a number."
        ) from None


def _padded(file: Iterable[str], columns: int) -> Iterable[List[str]]:
    """The rows below the header of ``file``, filled up with empty cells to ``columns``."""
    rows = iter(csv.reader(file))
    next(rows, None)
    return ([*row, *[""] * (columns - len(row))][:columns] for row in rows)


def _sync(file: IO[Any]) -> None:
    """Have the file's content on the disk before it is given its name."""
    file.flush()
    os.fsync(file.fileno())
