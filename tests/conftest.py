"""Fixtures for all tests. Helpers that are no fixtures are in ``helpers``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Iterator

import pytest
from hypothesis import settings
from oneflow import nn

from ofengine._oneflow.launch_race import mend_launch_race

pytest.register_assert_rewrite("helpers")

# The same examples every time, and no limit on the seconds an example takes.
settings.register_profile("ofengine", deadline=None, derandomize=True, database=None)
settings.load_profile("ofengine")


@pytest.fixture(params=["eager", "graph"])
def mode(request: pytest.FixtureRequest) -> str:
    """Each mode in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _messages_as_before() -> Iterator[None]:
    """A rank other than 0 silences the engine: so does a test that pretends to be one."""
    log = logging.getLogger("ofengine")
    level = log.level
    yield
    log.setLevel(level)


_graphs = [0]


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_counted() -> Iterator[None]:
    """Count all graphs that this process compiles, those of tests among them.

    Those that tests run by themselves are as safe from OneFlow's launch race as the engine's.
    """
    mend_launch_race()
    compile_graph = nn.Graph.finish_complie_and_init_runtime

    def counting(graph: nn.Graph) -> None:
        _graphs[0] += 1
        compile_graph(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Graph, "finish_complie_and_init_runtime", counting)
        yield


@pytest.fixture(autouse=True)
def _no_more_graphs_than_a_process_may_compile() -> None:
    if _graphs[0] > 1_200:
        pytest.fail(
            f"{_graphs[0]:,} graphs were compiled in this process, and OneFlow aborts one at about "
            "the 1,365th: let the Makefile run the tests in more processes, one after the other."
        )


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes without saying where, does not land in the checkout."""
    monkeypatch.chdir(tmp_path)
