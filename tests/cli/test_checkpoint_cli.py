"""``ofengine checkpoint FILE``: a stranger's file is described or refused, and gives no orders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from helpers import quiet_trainer
from helpers.tiny import Tiny, tiny_batches

from ofengine import TaskModule
from ofengine.checkpoint import read, write
from ofengine.checkpoint.header import shown
from ofengine.cli import main

ESCAPES = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\r",
    "\n",
    "\t",
    "\x9b2J",
    "\u202e",
    "\u200b",
    "\0",
    "\x7f",
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Tiny(), tiny_batches())
    return trainer.save_checkpoint(tmp_path / "saved.safetensors")


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    status = main(["checkpoint", *arguments])
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(line.isprintable() for line in text.split("\n")), text
        assert all(len(line) < 10_000 for line in text.split("\n"))
    return status, said.out, said.err


def places(value: Any, way: List[Any]) -> Any:
    """The way to each text, key and number in a state."""
    yield way
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, [*way, key])
    elif isinstance(value, list):
        for index, each in enumerate(value[:1]):
            yield from places(each, [*way, index])


@pytest.mark.parametrize("escape", ESCAPES)
def test_names_give_a_terminal_no_orders(
    tmp_path: Path, saved: Path, escape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(saved)
    assert found.state is not None
    odd = f"x{escape}y"
    found.state["hparams"] = {odd: odd, "more": {"object": [odd, {odd: odd}]}}
    found.state["task"] = {odd: odd, "more": {odd: [odd]}}
    found.state["metrics"]["known"] = {odd: 0.5}
    found.state["versions"] = {odd: odd}
    found.state["callbacks"] = [{"class": odd, "state": {"a": 1}}]
    found.state["rates"]["groups"][0]["name"] = odd
    found.state["rates"]["schedule"] = {"class": odd}
    for part, entry in (("run", "id"), ("run", "mode"), ("optimizer", "class")):
        found.state[part][entry] = odd
    weights: Dict[str, Any] = {odd: np.ones(2, dtype="float32"), odd + "2": np.full(1, np.nan)}
    path = write(tmp_path / "odd.safetensors", weights, found.state, {odd: odd})
    status, out, _ = run(str(path), "--tensors", capsys=capsys)
    assert status == 0
    assert "x\\" in out
    write(path, weights, None, {"format_version": odd})
    assert run(str(path), capsys=capsys)[0] == 0


def test_a_file_s_own_name_gives_no_orders(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved.rename(tmp_path / "\x1b[31mred.safetensors")
    status, out, _ = run(str(path), capsys=capsys)
    assert status == 0
    assert "\\x1b[31mred" in out
    status, _, err = run(str(path) + "\x07", capsys=capsys)
    assert status == 1
    assert "is not there" in err


KINDS = [5, -1.5, [], [1], {}, float("nan"), 1e300, "\x1b[31m" * 9_999]


@pytest.mark.parametrize(
    "value", [None, "x", {"a": 1}, *(pytest.param(each, marks=pytest.mark.slow) for each in KINDS)]
)
def test_a_state_of_any_kind_is_described_or_refused(
    tmp_path: Path, saved: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read(saved).state
    assert state is not None
    for way in list(places(state, []))[1:]:
        changed = read(saved)
        holder: Any = changed.state
        for key in way[:-1]:
            holder = holder[key]
        holder[way[-1]] = value
        path = write(tmp_path / "odd.safetensors", changed.weights, changed.state)
        status, _, err = run(str(path), capsys=capsys)
        assert (status, bool(err)) in ((0, False), (1, True))
        if status:
            assert "is whole, and holds no state of a run" in err
            assert len(err.splitlines()) == 1


def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero", "a\0b", "x" * 300, str(tmp_path)):
        status, out, err = run(path, capsys=capsys)
        assert (status, out) == (1, "")
        assert len(err.splitlines()) == 1


def test_hyper_parameters_are_shown_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Net(Tiny):
        def __init__(self, **options: Any) -> None:
            TaskModule.__init__(self)
            super().__init__()
            self.save_hyperparameters()

    trainer = quiet_trainer(max_epochs=1)
    options = {
        "config": {"a": (1,), 2: [None]}, "rate": np.float32(0.5), "path": Path("x/y"),
        "act": sum, "pair": (1, 2), "table": np.ones((2, 3)),
    }  # fmt: skip
    trainer.fit(Net(**options), tiny_batches())
    path = trainer.save_checkpoint(tmp_path / "saved.safetensors")
    line = next(x for x in run(str(path), capsys=capsys)[1].splitlines() if "hparams" in x)
    assert line.strip() == (
        "hparams    config={'a': (1,), 2: [None]}, rate=float32(0.5), path=path('x/y'), "
        "act=(a builtin_function_or_method, not kept), pair=(1, 2), table=array(array(2, 3))"
    )


@pytest.mark.parametrize("text", ["", "abc", "größer ≥ 0", "😀"])
def test_what_can_be_printed_is_as_it_was(text: str) -> None:
    assert shown(text) == text


def test_what_is_long_is_cut() -> None:
    assert shown("x" * 1_000, 10) == "x" * 10 + "..."
    assert shown("\x1b" * 1_000, 3) == "\\x1b" * 3 + "..."
