"""`ofengine rates` shows the rates of a task in a file, and says what is wrong in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest

from ofengine.cli import main

FILE = """
import oneflow as flow
from oneflow import nn
from ofengine import TaskModule
import beside_it

class Net(TaskModule):
    def __init__(self, width=2, kind="plain"):
        super().__init__()
        self.stem = nn.Linear(2, width)
        self.head = nn.Linear(width, 2)
        self.kind = kind

    def training_step(self, batch, batch_idx):
        return self.head(self.stem(batch)).mean()

    def param_groups(self):
        return [
            {"name": "stem", "params": self.stem.parameters(), "lr_scale": 0.5},
            {"name": f"head_{self.kind}", "params": self.head.parameters()},
        ]

    def configure_optimizers(self):
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.4)
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 1 / (step + 1)}

class WithData(Net):
    def train_dataloader(self):
        return [flow.ones(1, 2)] * 4

class Needs(Net):
    def __init__(self, depth, *, heads):
        super().__init__()

class Raises(Net):
    def __init__(self):
        raise ValueError("no such thing.")

class RaisesLater(Net):
    def configure_optimizers(self):
        return self.nothing_of_the_kind

class NoTask:
    pass

if __name__ == "__main__":
    raise SystemExit("the script ran")
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file with tasks, and a module beside it that it imports."""
    (tmp_path / "beside_it.py").write_text("")
    path = tmp_path / "tasks.py"
    path.write_text(FILE)
    kept, modules = list(sys.path), set(sys.modules)
    yield path
    sys.path[:] = kept
    for name in set(sys.modules) - modules:
        if name.startswith("ofengine_file_") or name == "beside_it":
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture, *arguments: str) -> Tuple[int, str, str]:
    status = main(["rates", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def rows(out: str) -> List[List[str]]:
    return [line.split() for line in out.splitlines() if line.startswith(("stem", "head"))]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_table_and_picture(file: Path, capsys: Any, mode: str) -> None:
    arguments = ("--steps-per-epoch", "4", "--max-epochs", "2", "--at", "1", "3", "--mode", mode)
    status, out, err = run(capsys, f"{file}:Net", *arguments)
    assert (status, err) == (0, "")
    assert "8 optimizer steps, 2 epochs of 4" in out
    assert rows(out) == [
        ["stem", "2", "6", "0.4", "0.5", "1", "0.2", "0:0.2", "0.025", "0.1", "0.05"],
        ["head_plain", "2", "6", "0.4", "1", "1", "0.4", "0:0.4", "0.05", "0.2", "0.1"],
    ]
    assert "by optimizer step" in out


def test_the_length_comes_from_the_tasks_data(file: Path, capsys: Any) -> None:
    assert "4 optimizer steps, 1 epoch of 4" in run(capsys, f"{file}:WithData")[1]
    assert "3 optimizer steps" in run(capsys, f"{file}:Net", "--max-steps", "3")[1]
    status, out, err = run(capsys, f"{file}:Net")
    assert (status, out) == (1, "")
    assert "add --steps-per-epoch N" in err


def test_arguments_of_the_task(file: Path, capsys: Any) -> None:
    arguments = ("--arg", "width=5", "--arg", "kind=two words", "--max-steps", "3")
    status, out, _ = run(capsys, f"{file}:Net", *arguments)
    assert status == 0
    assert rows(out)[0][:3] == ["stem", "2", "15"]
    assert "head_two words" in out


def test_the_picture_as_a_file(file: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rates.svg"
    assert run(capsys, f"{file}:Net", "--max-steps", "9", "--plot", str(path))[0] == 0
    assert "<svg" in path.read_text()


@pytest.mark.parametrize(
    ("task", "arguments", "sentence"),
    [
        ("absent.py:Net", (), "there is no file absent.py: write FILE.py:Task or package."),
        ("tasks.py", (), "'tasks.py' names no task: write FILE.py:Task or package."),
        ("tasks.py:Nat", (), "tasks.py has no class Nat: its tasks are Net, WithData, Needs, "),
        ("tasks.py:NoTask", (), "NoTask of tasks.py is a class but no TaskModule: "),
        ("tasks.py:nn", (), "nn of tasks.py is a module but no TaskModule: "),
        ("tasks.py:Needs", (), "Needs needs depth, heads: add --arg depth=VALUE --arg heads=V"),
        ("tasks.py:Net", ("--arg", "wide=1"), "does not take these --arg: got an unexpected"),
        ("tasks.py:Net", ("--arg", "wide"), "--arg wide: write --arg NAME=VALUE."),
        ("tasks.py:Raises", (), "tasks.py, line 37: Raises() raised ValueError: no such thing.\n"),
        ("tasks.py:RaisesLater", ("--max-steps", "3"), "line 41: RaisesLater, asked for its rat"),
        ("tasks.py:Net", ("--max-steps", "3", "--at", "3"), "its steps are 0 to 2."),
        ("broken.py:Net", (), "broken.py, line 2: it raised SyntaxError"),
        ("exits.py:Net", (), "exits.py, line 1: it raised SystemExit: 3"),
    ],
)
def test_mistakes_are_one_sentence(
    file: Path, capsys: Any, task: str, arguments: Tuple[str, ...], sentence: str
) -> None:
    (file.parent / "broken.py").write_text("x = 1\nx = = 2\n")
    (file.parent / "exits.py").write_text("raise SystemExit(3)\n")
    status, out, err = run(capsys, task, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("ofengine rates: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_counts_are_checked(file: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["rates", f"{file}:Net", "--max-epochs", "0"])
    assert "0 is below 1" in capsys.readouterr().err
