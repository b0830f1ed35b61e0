"""The commands beside the verbs: jsonargparse reads their options where it is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from ofengine.cli import OTHERS, main

PROGRAM = ["train.py", "--lr", "0.1"]


@pytest.fixture(autouse=True)
def program() -> None:
    Path("train.py").touch()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """What ranks were to be started with."""
    seen: Dict[str, Any] = {}

    def start(command: List[str], nproc: int, **options: Any) -> int:
        seen.update(options, command=command[1:], nproc=nproc)
        return 0

    monkeypatch.setattr("ofengine.cli.launch.start_ranks", start)
    return seen


def refusal(capsys: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 2
    return str(capsys.readouterr().err)


def test_launch_takes_its_options_from_a_file(started: Dict[str, Any]) -> None:
    Path("hosts.yaml").write_text("nproc: 4\nnnodes: 2\nmaster_addr: 10.0.0.1\nshow_all: true\n")
    assert main(["launch", "--config", "hosts.yaml", "--nproc=3", "--node-rank=1", *PROGRAM]) == 0
    assert started == {
        "command": PROGRAM, "nproc": 3, "nodes": 2, "node_rank": 1, "master_addr": "10.0.0.1",
        "master_port": None, "hang_timeout": 300.0, "show_all": True,
    }  # fmt: skip


def test_what_launch_prints_starts_the_same_ranks(started: Dict[str, Any], capsys: Any) -> None:
    options = ["--nproc", "2", "--nnodes=3", "--node-rank", "2", "--hang-timeout", "1.5"]
    with pytest.raises(SystemExit) as ended:
        main(["launch", *options, "--print_config", *PROGRAM])
    assert (ended.value.code, started) == (0, {})
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert main(["launch", *options, *PROGRAM]) == 0
    told = dict(started)
    started.clear()
    assert main(["launch", "--config=printed.yaml", *PROGRAM]) == 0
    assert started == told


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("nproc: 0", "0 is below 1"),
        ("nproc: two", "two is no whole number"),
        ("hang_timeout: soon", "soon is no number of seconds"),
        ("nodes: 3", "'nodes' is not accepted"),
        ("- 3", "Unexpected config"),
    ],
)
def test_a_mistake_in_the_file_is_told(config: str, sentence: str, capsys: Any) -> None:
    Path("hosts.yaml").write_text(config)
    said = refusal(capsys, "launch", "--config", "hosts.yaml", "--nproc", "2", *PROGRAM)
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch", "--nproc", "0", *PROGRAM], "argument --nproc: 0 is below 1"),
        (["launch", "--nproc", "two", *PROGRAM], "argument --nproc: two is no whole number"),
        (["launch", *PROGRAM], "required"),
        (["checkpoint"], "required: "),
        (["doctor", "--all"], "unrecognized arguments: --all"),
        (["set-lr", "runs/1", "head=1", "--wait=x"], "argument --wait: x is no number of seconds"),
        (["docter"], "invalid choice: 'docter'"),
        ([], "required: COMMAND"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_and_without_the_extra(
    words: List[str], sentence: str, extra: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extra:
        monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert sentence in refusal(capsys, *words)


def test_launch_without_a_program(capsys: Any) -> None:
    assert main(["launch", "--nproc", "2"]) == 1
    said = capsys.readouterr().err
    assert said == "ofengine launch: name the program: a Python file, or a module with -m.\n"


@pytest.mark.parametrize("extra", [True, False])
def test_launch_is_the_same_without_the_extra_but_for_the_file(
    extra: bool, started: Dict[str, Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extra:
        monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["launch", "--nproc", "2", "-m", "package.train", "--nproc", "4", "-m"]) == 0
    assert started["command"] == ["-m", "package.train", "--nproc", "4", "-m"]
    assert started["nproc"] == 2
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    assert ("--config" in capsys.readouterr().out) == extra


@pytest.mark.parametrize("command", OTHERS)
def test_each_says_what_it_does(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: ofengine {command} ")
    assert OTHERS[command] in " ".join(shown.split())
