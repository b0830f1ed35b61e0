"""History: what was logged in a run, as rows by step and epoch."""

from __future__ import annotations

import importlib
from array import array
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Union, overload

import numpy as np

from ofengine.errors import ConfigurationError

_MOST = 100_000
"""So many rows are kept; of more, the oldest go."""

Row = Dict[str, Union[int, float]]


class History(Sequence[Row]):
    """The metrics that the loggers were sent, a row for each epoch and step, the newest last.

    A row is a dict with ``epoch`` (from 0), ``step`` (optimizer steps done) and the metrics that
    were logged then. ``history["loss"]`` is a column: an array with NaN where there was no value.
    The newest 100,000 rows are kept. Checkpoints keep them, too.
    """

    def __init__(self) -> None:
        self._epochs, self._steps = array("q"), array("q")
        self._rows: Dict[str, Any] = {}
        self._values: Dict[str, Any] = {}

    def add(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Put ``metrics`` into the newest row where it is of this step, and has none of them."""
        last = len(self._steps) - 1
        is_new = last < 0 or (self._epochs[last], self._steps[last]) != (epoch, step)
        columns = [self._rows[name] for name in metrics if name in self._rows]
        # All that a metric had may have been forgotten.
        if is_new or any(rows and rows[-1] == last for rows in columns):
            self._epochs.append(epoch)
            self._steps.append(step)
            last += 1
        for name, value in metrics.items():
            self._rows.setdefault(name, array("q")).append(last)
            self._values.setdefault(name, array("d")).append(value)
        if last >= _MOST + _MOST // 10:  # not at every row, which would copy all each time
            self._forget(last + 1 - _MOST)

    def _forget(self, count: int) -> None:
        del self._epochs[:count], self._steps[:count]
        for name, rows in self._rows.items():
            gone = int(np.searchsorted(rows, count))
            self._rows[name] = array("q", (row - count for row in rows[gone:]))
            del self._values[name][:gone]

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> List[Row]: ...

    @overload
    def __getitem__(self, index: str) -> np.ndarray: ...

    def __getitem__(self, index: Union[int, slice, str]) -> Any:
        if isinstance(index, str):
            return self._column(index)
        return list(self)[index] if isinstance(index, slice) else self._row(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        made: List[Row] = [
            {"epoch": epoch, "step": step} for epoch, step in zip(self._epochs, self._steps)
        ]
        for name, rows in self._rows.items():
            for row, value in zip(rows, self._values[name]):
                made[row][name] = value
        return iter(made)

    def _row(self, number: int) -> Row:
        row: Row = {"epoch": self._epochs[number], "step": self._steps[number]}
        for name, rows in self._rows.items():
            place = int(np.searchsorted(rows, number))
            if place < len(rows) and rows[place] == number:
                row[name] = self._values[name][place]
        return row

    @property
    def columns(self) -> List[str]:
        """The names of all columns: epoch, step, then the metrics as they first came."""
        return ["epoch", "step", *self._rows]

    def _column(self, name: str) -> np.ndarray:
        if name in ("epoch", "step"):
            return np.array(self._epochs if name == "epoch" else self._steps, dtype=np.int64)
        if name not in self._rows:
            raise ConfigurationError(
                f"trainer.history has no column {name!r}; it has {', '.join(self.columns)}."
            )
        column = np.full(len(self), np.nan)
        column[np.array(self._rows[name], dtype=np.int64)] = self._values[name]
        return column

    def to_pandas(self) -> Any:
        """All rows as a ``pandas.DataFrame``, with NaN where there was no value."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ConfigurationError(
                "trainer.history.to_pandas() needs pandas: pip install pandas; without it, "
                "trainer.history is a list of dicts."
            ) from None
        return pandas.DataFrame({name: self._column(name) for name in self.columns})

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {', '.join(self.columns)})"

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> Dict[str, Any]:
        """All of it as arrays."""
        return {
            "epochs": np.array(self._epochs, dtype=np.int64),
            "steps": np.array(self._steps, dtype=np.int64),
            "metrics": {
                name: {
                    "rows": np.array(rows, dtype=np.int64),
                    "values": np.array(self._values[name], dtype=np.float64),
                }
                for name, rows in self._rows.items()
            },
        }

    @staticmethod
    def misfit(state: Mapping[str, Any]) -> Optional[str]:
        """What keeps ``state``, of a file, from being a history; None where nothing does."""
        count = state["steps"].size
        if state["epochs"].shape != state["steps"].shape or state["steps"].ndim != 1:
            return "its epochs and steps are not one for each row"
        for name, kept in state["metrics"].items():
            rows, values = kept["rows"], kept["values"]
            if rows.ndim != 1 or rows.shape != values.shape:
                return f"the rows and values of {name!r} are not of one length"
            if rows.size and (rows[0] < 0 or rows[-1] >= count or (np.diff(rows) <= 0).any()):
                return f"the rows of {name!r} are not in order"
        return None

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, which was checked."""
        self._epochs = array("q", state["epochs"].tolist())
        self._steps = array("q", state["steps"].tolist())
        kept = state["metrics"].items()
        self._rows = {name: array("q", each["rows"].tolist()) for name, each in kept}
        self._values = {name: array("d", each["values"].tolist()) for name, each in kept}
