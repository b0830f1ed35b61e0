"""Every public name has a docstring that says what it does, takes and raises."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import attrs
import pytest

import ofengine.errors
from ofengine import OFEngineError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "en").glob("*.md"))]


def _made() -> Any:
    """The module that makes the site's pages of the API."""
    spec = importlib.util.spec_from_file_location("made", ROOT / "docs" / "site" / "made.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = _made()
NAMES = [(module, name) for module in MADE.PUBLIC for name in MADE.public_names(module)]
PUBLIC = {getattr(importlib.import_module(module), name) for module, name in NAMES}


@pytest.mark.parametrize("module", MADE.MODULES)
def test_the_pages_of_the_api_have_every_public_name(module: str) -> None:
    names = [name for name in importlib.import_module(module).__all__ if name[0] != "_"]
    page = MADE.api_page(module)
    assert re.findall(r"^::: (\S+)$", page, re.MULTILINE) == [f"{module}.{name}" for name in names]


def test_every_module_with_public_names_that_a_page_names_has_a_page_of_the_api() -> None:
    told = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    lacking = []
    for path in sorted((ROOT / "ofengine").rglob("*.py")):
        if "callbacks" in path.parts or not re.search(r"^__all__ ", path.read_text("utf-8"), re.M):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).replace(".__init__", "")
        if re.search(rf"\b{re.escape(module)}\b", told) and module not in MADE.PUBLIC:
            lacking.append(module)
    assert lacking == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_that_a_page_sends_users_to_is_on_a_page_of_the_api(path: Path) -> None:
    """What it imports, says to import, or names with its module."""
    text, known = path.read_text(encoding="utf-8"), {f"{module}.{name}" for module, name in NAMES}
    sent = re.findall(r"`(ofengine(?:\.\w+)+)", text)
    for module, names in re.findall(r"from (ofengine[\w.]*) import (\([^)]+\)|[\w, ]+)", text):
        sent += [f"{module}.{name}" for name in re.findall(r"\w+", names)]
    for name, module in re.findall(r"`(\w+)`.*\b(?:comes f|F)rom `(ofengine[\w.]*)`", text):
        sent.append(f"{module}.{name}")
    assert [name for name in sent if name not in known and name not in MADE.PUBLIC] == []


def test_every_error_and_what_a_run_tells_is_on_a_page_of_the_api() -> None:
    errors = {name for name in vars(ofengine.errors) if name.endswith(("Error", "Warning"))}
    assert sorted(errors - {name for _, name in NAMES}) == []
    assert {"RunView", "Settings", "Progress", "Point"} <= {name for _, name in NAMES}
    listed = [entry for page in MADE.navigation("en")[0]["Reference"][0]["API"] for entry in page]
    assert listed == MADE.PUBLIC and {f"api/{module}.md" for module in listed} <= set(MADE.pages())


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_docstring_says_what_a_name_does_and_what_its_arguments_mean(
    module: str, name: str
) -> None:
    unsaid = []
    for place, function, text in _documented(module, name):
        unsaid += [place] if not text else []
        unsaid += [
            f"{place}: {argument}"
            for argument in _arguments(function)
            if not re.search(rf"\b{argument}\b", text)
        ]
    assert unsaid == []


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_docstring_names_the_errors_that_stand_in_the_code(module: str, name: str) -> None:
    unsaid = [
        f"{place}: {error}"
        for place, function, text in _documented(module, name)
        for error in _raised(function)
        if error not in text
    ]
    assert unsaid == []


def _documented(module: str, name: str) -> Iterator[Tuple[str, Any, str]]:
    """The name and each public method of it: its place, its function and what is said of it.

    What a method overrides of a public class, such as a hook, is said there.
    """
    thing = getattr(importlib.import_module(module), name)
    if not inspect.isclass(thing):
        yield f"{module}.{name}", thing, thing.__doc__ or ""
        return
    of_class = vars(thing).get("__doc__") or ""
    see = re.search(r"See :class:`(\w+)`", of_class)
    if see:  # told of the class beside it
        of_class += getattr(importlib.import_module(module), see[1]).__doc__
    see = re.search(r"described in :class:`ofengine\.(\w+)`", of_class)
    if see:
        of_class += getattr(ofengine, see[1]).__doc__
    of_class += _under_fields(thing)
    if issubclass(thing, (OFEngineError, Warning)):
        yield f"{module}.{name}", None, of_class
        return
    yield f"{module}.{name}", thing.__init__, f"{of_class}\n{thing.__init__.__doc__}"
    for place, function in _methods(thing).items():
        said = function.__doc__ or ""
        see = re.search(r"[Ss]ee :meth:`(?:ofengine\.)?(\w+)\.(\w+)`", said)
        if see:  # told of a class that hands it on
            said += _said_of(see[1], see[2])
        yield f"{module}.{name}.{place}", function, f"{said}\n{of_class}" if said else ""


def _under_fields(kind: type) -> str:
    """What is said under each field of a class that attrs makes a constructor for."""
    if not attrs.has(kind):
        return ""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = tree.body  # type: ignore[attr-defined]
    return "".join(
        f"\n{field.target.id}: {under.value.value}"
        for field, under in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign)
        and isinstance(under, ast.Expr)
        and isinstance(under.value, ast.Constant)
    )


def _said_of(name: str, method: str) -> str:
    from ofengine.run.view import RunView

    kinds = {kind.__name__: kind for kind in (*PUBLIC, RunView) if inspect.isclass(kind)}
    return f"{getattr(kinds[name], method).__doc__}\n{kinds[name].__doc__}"


def _methods(kind: type) -> Dict[str, Callable[..., Any]]:
    """The public methods and properties that a class has by itself or from a class not public."""
    others = [base for base in kind.__mro__[1:] if base in PUBLIC]
    found = {}
    for base in kind.__mro__:
        if not base.__module__.startswith("ofengine") or base in others:
            continue
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else value
            function = getattr(function, "__func__", function)
            told_there = any(hasattr(other, name) for other in others)
            if name[0] != "_" and inspect.isfunction(function) and not told_there:
                found.setdefault(name, function)
    return found


def _arguments(function: Any) -> List[str]:
    if not inspect.isfunction(function) or not function.__module__.startswith("ofengine"):
        return []  # of a class without a constructor of its own
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls") and name[0] != "_"]


def _raised(function: Any) -> List[str]:
    """The classes of errors that the function's own lines raise, where users cause them."""
    if not inspect.isfunction(function):
        return []
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [n.exc.func for n in ast.walk(tree) if isinstance(n, ast.Raise) and _is_call(n.exc)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    return sorted(name for name in names if hasattr(ofengine.errors, name))


def _is_call(node: Any) -> bool:
    return isinstance(node, ast.Call)
