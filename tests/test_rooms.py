"""The rooms: each imports from rooms above it only, and none is too large to be read at once."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ofengine"

ROOMS: List[List[str]] = [
    ["ofengine"],  # the package itself: only names, looked up when they are first used
    ["errors", "foreign_names", "tables", "lines", "disk", "lightning_classes", "constructors"],
    ["_oneflow"],
    ["speedups"],
    ["launch.environment", "launch.slot", "launch.heartbeat"],
    ["processes"],
    ["launch"],
    ["ranks"],
    ["run"],
    [
        *("run.arguments", "run.devices", "run.lightning", "run.precision", "run.windows"),
        *("run.lightning_methods", "run.settings"),
    ],
    [
        *("run.profile", "run.progress", "run.telling"),
        *("run.finite", "run.weighing", "run.orders"),
    ],
    ["data"],
    ["rates"],
    ["tracing"],
    ["metrics", "shared_metrics", "shared_sums"],
    ["loggers"],
    ["run.mode"],
    ["run.state", "run.report"],
    ["run.told", "run.view", "run.constants"],
    ["checkpoint.file", "checkpoint.weights", "checkpoint"],
    ["data_module", "onnx_model", "task_hooks", "task_attributes", "task"],
    ["callback"],
    ["modes"],
    [
        *("checkpoint.background", "checkpoint.beside", "checkpoint.check", "checkpoint.entry"),
        *("checkpoint.cut_short", "checkpoint.find"),
        *("checkpoint.resume", "checkpoint.seen", "checkpoint.snapshot", "checkpoint.undo"),
    ],
    [
        *(
            "run.hooks",
            "run.profiling",
            "run.culprit",
            "run.faster_layers",
            "run.connect",
            "run.course",
            "run.losses",
            "run.several",
            "run.starting",
        ),
        *("run.together", "run.undone", "run.replay", "run.anomaly", "run.verb", "run.loops"),
        *("run.live", "run.fitting"),
    ],
    ["callbacks"],
    ["trials"],
    ["defaults", "trainer"],
    ["cli", "__main__"],
]
"""From the top down. A name is a module, or a package with all modules that have no other room."""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LONGEST_TEST_FILE = 600
LOOP_OVER_BATCHES = ("run/loops.py", "_train_epoch")
PRIVATE = re.compile(
    r"_oneflow_internal|flow\._C\b|_c_nn_graph|_generate_conf_for_graph|\b_job_proto|"
    r"additional_var_|oneflow(\.\w+)*\._\w+|oneflow\.framework|oneflow\.nn\.graph\.proxy|"
    r"_full_job_proto|\._forward_(pre_)?hooks|\.param_groups\[\d\]\._|_default_options\b"
)
"""OneFlow's private API."""


def files() -> List[Path]:
    """Every file of the package, the callbacks' among them."""
    inside = [path for path in PACKAGE.rglob("*.py") if "callbacks" not in path.parts]
    return sorted([*inside, *(PACKAGE / "callbacks").glob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    inside = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(inside) or "ofengine"


MODULES: Dict[str, Path] = {module_of(path): path for path in files()}


def room_of(module: str) -> int:
    """The number of the room that ``module`` is in, from the top."""
    places = {name: number for number, room in enumerate(ROOMS) for name in room}
    at = module
    while at not in places:
        assert "." in at, f"{module} is in no room: name it in ROOMS"
        at = at.rpartition(".")[0]
    return places[at]


def imports(module: str) -> Iterator[Tuple[int, str]]:
    """(line, module) of every import of the project's own: type-only ones and those in functions.

    ``from package import name`` is an import of ``package.name`` where that is a module.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ofengine":
                    yield node.lineno, alias.name.partition(".")[2] or "ofengine"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports by a relative name"
            if (node.module or "").partition(".")[0] != "ofengine":
                continue
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                yield node.lineno, inner if inner in MODULES else base or "ofengine"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "ofengine"])
def test_a_module_imports_from_its_own_room_and_those_above(module: str) -> None:
    upwards = [
        f"line {line}: {imported}"
        for line, imported in imports(module)
        if room_of(imported) > room_of(module)
    ]
    assert not upwards, f"{module} imports from rooms below it"


def test_there_is_no_circle() -> None:
    graph: Dict[str, Set[str]] = {
        module: {imported for _, imported in imports(module) if imported != module}
        for module in MODULES
        if module != "ofengine"  # it imports nothing until a name is asked for
    }
    graph["ofengine"] = set()
    done: Set[str] = set()

    def visit(module: str, way: Tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_package_itself_imports_no_more_than_it_must() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top
    }
    assert names == {"__future__", "importlib", "typing"}


def test_every_room_exists() -> None:
    for room in ROOMS:
        for name in room:
            assert name in MODULES, name


def test_no_file_of_tests_is_too_long() -> None:
    files = Path(__file__).parent.rglob("*.py")
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) > 200
    assert {name: count for name, count in lines.items() if count > LONGEST_TEST_FILE} == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_can_be_read_at_once(module: str) -> None:
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    long = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        lines = (node.end_lineno or 0) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= (first.end_lineno or 0) - first.lineno + 1
        if lines > LONGEST_FUNCTION and (str(path.relative_to(PACKAGE)), node.name) != (
            LOOP_OVER_BATCHES
        ):
            long.append(f"{node.name}: {lines} lines")
    assert not long


@pytest.mark.parametrize("module", [m for m in MODULES if m.partition(".")[0] != "_oneflow"])
def test_oneflow_s_private_api_stays_in_its_room(module: str) -> None:
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    used = [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) if PRIVATE.search(line)]
    assert not used


def test_nobody_below_knows_the_trainer() -> None:
    for module in MODULES:
        if room_of(module) < room_of("trainer") and module != "ofengine":
            assert "trainer" not in {imported for _, imported in imports(module)}, module


def test_every_file_says_what_it_is() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module


def test_no_two_files_of_tests_have_one_name() -> None:
    """By it pytest imports both, and takes the second for the first."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, other in zip(names, names[1:]) if name == other] == []
