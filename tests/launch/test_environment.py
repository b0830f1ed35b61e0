"""``environment.read``: a rank, a lone process, or a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Dict

import pytest

from ofengine.errors import ConfigurationError
from ofengine.launch.environment import World, place, read, variables

TWO = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
}
"""As OneFlow's own launcher sets them."""
OF_ONEFLOW = {**TWO, "WORLD_SIZE": "1", "RANK": "-1", "LOCAL_RANK": "0"}
"""As OneFlow sets them in a process that has none."""


@pytest.mark.parametrize(
    "environ",
    [
        {},
        OF_ONEFLOW,
        {**TWO, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_WORLD_SIZE": "8", "PATH": "/bin"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_a_lone_process_is_no_rank(environ: Dict[str, str]) -> None:
    assert read(environ) is None


def test_a_rank_of_oneflow_s_launcher() -> None:
    assert read(TWO) == World(1, 2, local_rank=1, local_world_size=2, node_rank=0, nodes=1)


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_the_launcher_sets_is_read_again(nodes: int, ranks: int) -> None:
    every = [place(i, ranks, nodes, node) for node in range(nodes) for i in range(ranks)]
    assert [each.rank for each in every] == list(range(nodes * ranks))
    for world in every:
        expected = None if nodes * ranks == 1 else world
        assert read(variables(world, "10.0.0.1", 1234)) == expected


def test_without_local_world_size_ranks_on_two_hosts_are_told_apart() -> None:
    second = {**TWO, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert read(second) == World(3, 4, local_rank=1, local_world_size=2, node_rank=1, nodes=2)


@pytest.mark.parametrize("missing", sorted(TWO))
def test_one_that_is_missing_is_named(missing: str) -> None:
    environ = {name: value for name, value in TWO.items() if name != missing}
    with pytest.raises(ConfigurationError, match=rf"are set, but not {missing}, so this process"):
        read(environ)


@pytest.mark.parametrize("only", sorted(TWO))
def test_one_alone_is_told(only: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{only} is set, but not .* unset {only} for"):
        read({only: TWO[only]})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "2"}, r"RANK=2 cannot be with WORLD_SIZE=2: it is a number from 0 to 1\."),
        ({"RANK": "-1"}, r"RANK=-1 cannot be with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE=0 cannot be: it is a number from 1 on\."),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE='two' is no whole number\."),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 cannot be with RANK=1"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT=99999 cannot be: it is a number from 1 to 65535"),
        ({"LOCAL_WORLD_SIZE": "3"}, r"LOCAL_WORLD_SIZE=3 cannot be with WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "1"}, r"LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1 contradict each other"),
        ({"WORLD_SIZE": "3", "RANK": "2"}, r"WORLD_SIZE=3, RANK=2, LOCAL_RANK=1 contradict"),
        ({"WORLD_SIZE": "1"}, r"RANK=1 cannot be with WORLD_SIZE=1"),
    ],
)
def test_a_contradiction_is_told(changed: Dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read({**TWO, **changed})


READ = """
import sys
from ofengine.errors import ConfigurationError
from ofengine.launch import environment

exec(sys.argv[1])
try:
    print(environment.read())
except ConfigurationError as error:
    print(error)
"""
AS_ONEFLOW_DOES = f"import os; os.environ.update({OF_ONEFLOW!r})"


def run(before: str, environ: Dict[str, str]) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in TWO}
    done = subprocess.run(
        [sys.executable, "-c", READ, before], env={**clean, **environ}, stdout=-1, text=True
    )
    return done.stdout


def test_a_rank_that_oneflow_has_made_a_lone_process_is_told() -> None:
    given = {"WORLD_SIZE": "2", "RANK": "1"}
    said = run(AS_ONEFLOW_DOES, given)
    assert said.startswith("WORLD_SIZE and RANK are set, but not MASTER_ADDR, MASTER_PORT and")


@pytest.mark.parametrize("given", [{}, OF_ONEFLOW])
def test_a_process_with_oneflow_and_its_children_are_no_ranks(given: Dict[str, str]) -> None:
    assert run(AS_ONEFLOW_DOES, given) == "None\n"
