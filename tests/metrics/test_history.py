"""The history of a run: rows by epoch and step, columns, what is kept of many, a data frame."""

from __future__ import annotations

import sys
import types
from typing import Any, Dict

import numpy as np
import pytest

from ofengine import ConfigurationError
from ofengine.metrics import history as module
from ofengine.metrics.history import History

NAN = float("nan")


def some() -> History:
    history = History()
    history.add({"loss": 0.5}, 1, 0)
    history.add({"loss": 0.25}, 2, 0)
    history.add({"val": 3.0}, 2, 0)
    history.add({"val": 4.0}, 2, 0)  # the row has one already
    history.add({"loss": NAN}, 3, 1)
    return history


def test_metrics_of_one_step_share_a_row_as_long_as_they_differ() -> None:
    history = some()
    assert repr(list(history)) == repr(
        [
            {"epoch": 0, "step": 1, "loss": 0.5},
            {"epoch": 0, "step": 2, "loss": 0.25, "val": 3.0},
            {"epoch": 0, "step": 2, "val": 4.0},
            {"epoch": 1, "step": 3, "loss": NAN},
        ]
    )
    assert [history[i] for i in range(3)] == list(history)[:3]
    assert repr(history[-1]) == repr(list(history)[-1])
    assert history[1:3] == list(history)[1:3]
    np.testing.assert_array_equal(history["loss"], [0.5, 0.25, NAN, NAN])
    np.testing.assert_array_equal(history["step"], [1, 2, 2, 3])
    assert history.columns == ["epoch", "step", "loss", "val"]
    assert repr(history) == "History(4 rows of epoch, step, loss, val)"
    with pytest.raises(ConfigurationError, match="no column 'acc'; it has epoch, step, loss"):
        history["acc"]
    with pytest.raises(IndexError):
        history[4]


def test_of_many_rows_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 20)
    history = History()
    for step in range(100):
        history.add({"a": float(step)} if step % 2 else {"b": -float(step)}, step, 0)
    assert 20 <= len(history) <= 22
    steps = range(100 - len(history), 100)
    assert list(history) == [
        {"epoch": 0, "step": s, **({"a": float(s)} if s % 2 else {"b": -float(s)})} for s in steps
    ]


def test_a_metric_whose_values_are_all_forgotten_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST", 20)
    history, again = History(), History()
    history.add({"val": 1.0}, 0, 0)
    for step in range(1, 23):
        history.add({"loss": float(step)}, step, 0)
    assert np.isnan(history["val"]).all()
    again.load(history.state())
    for each in (history, again):
        each.add({"val": 2.0}, 22, 0)  # shares a row with that step's loss
        assert each[-1] == {"epoch": 0, "step": 22, "loss": 22.0, "val": 2.0}


def test_a_state_gives_the_same_history() -> None:
    history, again = some(), History()
    state = history.state()
    assert History.misfit(state) is None
    again.load(state)
    assert repr(list(again)) == repr(list(history))
    again.add({"val": 1.0}, 3, 1)
    assert again[-1]["val"] == 1.0
    assert len(again) == len(history)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": np.zeros(3, int)}, "not one for each row"),
        ({"steps": np.zeros((2, 2), int), "epochs": np.zeros((2, 2), int)}, "not one for each row"),
        ({"rows": np.array([0, 0, 3])}, "not in order"),
        ({"rows": np.array([0, 1, 4])}, "not in order"),
        ({"rows": np.array([-1, 1, 3])}, "not in order"),
        ({"values": np.zeros(2)}, "not of one length"),
    ],
)
def test_a_state_that_is_none_is_told(change: Dict[str, Any], says: str) -> None:
    state = some().state()
    loss = state["metrics"]["loss"]
    for key, value in change.items():
        (loss if key in loss else state)[key] = value
    assert says in str(History.misfit(state))


def test_a_data_frame_has_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = lambda columns: columns  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    frame = some().to_pandas()
    assert list(frame) == ["epoch", "step", "loss", "val"]
    np.testing.assert_array_equal(frame["val"], [NAN, 3.0, 4.0, NAN])


def test_without_pandas_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match="needs pandas: pip install pandas"):
        some().to_pandas()
