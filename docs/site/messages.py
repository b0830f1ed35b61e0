"""Every message of an error or a warning that the code holds, read from the code.

A message says what was wrong and what to write instead, so that a list of all messages is a list of
all mistakes and their mends. What is put in when the message is made stands in angle brackets:
``‹group›``.
"""

from __future__ import annotations

import ast
import functools
import html
import itertools
import re
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

ROOT = Path(__file__).resolve().parents[2]
WARNING = "OFEngineWarning"
MOST_VARIANTS = 40

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]


class Message:
    """A message: the class that carries it, its text, and the line where it is made."""

    def __init__(self, kind: str, text: str, path: str, line: int) -> None:
        self.kind, self.text, self.path, self.line = kind, text, path, line


def sources() -> List[Path]:
    """The files of the package."""
    files = (ROOT / "ofengine").rglob("*.py")
    own = [path for path in files if "callbacks" not in path.relative_to(ROOT).parts]
    return sorted([*own, *(ROOT / "callbacks").glob("*.py")])


@functools.lru_cache(maxsize=None)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def kinds() -> Dict[str, str]:
    """The classes that carry a message to the user, with what they are for.

    Those of ``errors.py``, and those that only say inside of the package what is wrong with a
    file, whose text ends up in a ``CheckpointError``.
    """
    found: Dict[str, str] = {}
    for path in sources():
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef) and any(_is_error(base) for base in node.bases):
                found[node.name] = (ast.get_docstring(node) or "").split("\n\n")[0]
    return found


def _is_error(base: ast.expr) -> bool:
    name = base.id if isinstance(base, ast.Name) else ""
    return name in ("Exception", "UserWarning") or name.endswith(("Error", "Warning"))


def messages() -> List[Message]:
    """All messages, by file and line."""
    carried = set(kinds()) | {"warn", "misfit"}
    found: List[Message] = []
    for path in sources():
        tree = _tree(path)
        where = path.relative_to(ROOT).as_posix()
        constants = _assigned(tree.body)
        for call, function in _calls(tree, None):
            kind = _name(call.func)
            if kind not in carried or (function is not None and function.name == kind):
                continue
            scope = dict(constants)
            if function is not None:
                scope.update(_assigned(function.body))
            given = call.args if kind == "misfit" else call.args[:1]
            for text in _said(kind, given, scope):
                found.append(Message(kind, text, where, call.lineno))
    return found


def page() -> str:
    """The page in Markdown: a section for each class, and in it one for each file."""
    told = kinds()
    by_class: Dict[str, Dict[str, List[str]]] = {}
    for each in messages():
        kind = WARNING if each.kind == "warn" else each.kind
        kind = kind if kind in _public(told) else "CheckpointError"
        texts = by_class.setdefault(kind, {}).setdefault(each.path, [])
        if each.text not in texts:
            texts.append(each.text)
    parts = [_INTRODUCTION]
    for kind in [name for name in told if name in by_class]:
        parts.append(f"## {kind}\n\n{told[kind]}\n")
        for path, texts in by_class[kind].items():
            items = "\n".join(f"<li>{_as_html(text)}</li>" for text in texts)
            parts.append(f"### {_about(ROOT / path)}\n\n`{path}`\n\n<ul>\n{items}\n</ul>\n")
    return "\n".join(parts)


_INTRODUCTION = """# Errors and warnings

Each error says what was wrong, where, and what to write instead. This page has every one that the
code can raise, and every warning, made from the code itself. What is put in stands in ‹angle
brackets›. Where the search does not find a message of yours, search for a part of it that has no
name or number of your own.
"""


def _public(told: Mapping[str, str]) -> List[str]:
    return [name for name in told if name.endswith("Error") or name == WARNING]


def _about(path: Path) -> str:
    text = ast.get_docstring(_tree(path)) or ""
    first = " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("``", "`")
    return html.escape(re.sub(r":\w+:`~?([^`]+)`", r"`\1`", first), quote=False)


def _as_html(text: str) -> str:
    escaped = html.escape(" ".join(text.split()), quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"‹([^›]*)›", r"<var>‹\1›</var>", escaped)


def _calls(
    node: ast.AST, function: Union[Function, None]
) -> Iterator[Tuple[ast.Call, Union[Function, None]]]:
    """Every call in ``node`` with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        inner = child if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call):
            yield child, function
        yield from _calls(child, inner)


def _name(node: ast.expr) -> str:
    return (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    )


Scope = Dict[str, List[ast.expr]]


def _assigned(body: List[ast.stmt]) -> Scope:
    """What names stand for in ``body``: all that is ever assigned to them, or looped over."""
    scope: Scope = {}
    for node in (inner for statement in body for inner in ast.walk(statement)):
        targets: List[Tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            targets = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [(node.target, node.value)]
        elif isinstance(node, ast.For):
            targets = [(node.target, node.iter)]
        for target, value in targets:
            if isinstance(target, ast.Name):
                scope.setdefault(target.id, []).append(value)
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, its in zip(target.elts, value.elts):
                    scope.setdefault(_name(one), []).append(its)
            elif isinstance(target, ast.Tuple) and _name(getattr(value, "func", value)) == "items":
                scope.setdefault(_name(target.elts[-1]), []).append(value)  # of a dict of texts
    return scope


def _said(kind: str, given: List[ast.expr], scope: Scope) -> List[str]:
    """The texts that a call may say, of its first argument."""
    if not given:
        return []
    if kind == "misfit" and len(given) == 3:
        return [f"‹place› is ‹value›, and not {text}" for text in _texts(given[2], scope)]
    texts = _texts(given[0], scope)
    return [text for text in texts if len(re.sub(r"‹[^›]*›|\W", "", text)) >= 3]


def _texts(node: ast.expr, scope: Scope, depth: int = 0) -> List[str]:
    """All that an expression may say; what is only known in a run as ``‹its name›``."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return _joined([_texts(part, scope, depth) for part in node.values])
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value, scope, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([_texts(node.left, scope, depth), _texts(node.right, scope, depth)])
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scope, depth), *_texts(node.orelse, scope, depth)]
    if isinstance(node, ast.Name) and depth < 4 and node.id in scope:
        values = scope[node.id]
        if all(_is_text(value, scope) for value in values):
            return [text for value in values for text in _of_value(value, scope, depth + 1)]
    return [f"‹{_placeholder(node)}›"]


def _of_value(value: ast.expr, scope: Scope, depth: int) -> List[str]:
    if isinstance(value, ast.Call):  # table.items()
        (table,) = scope[value.func.value.id]  # type: ignore[attr-defined]
        return [text for each in table.values for text in _texts(each, scope, depth)]  # type: ignore[attr-defined]
    return _texts(value, scope, depth)


def _is_text(value: ast.expr, scope: Scope) -> bool:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        tables = scope.get(_name(value.func.value), [])
        return value.func.attr == "items" and [type(each) for each in tables] == [ast.Dict]
    if isinstance(value, ast.IfExp):
        return _is_text(value.body, scope) and _is_text(value.orelse, scope)
    if isinstance(value, ast.BinOp):
        return _is_text(value.left, scope) or _is_text(value.right, scope)
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def _joined(parts: List[List[str]]) -> List[str]:
    every = itertools.islice(itertools.product(*parts), MOST_VARIANTS)
    return list(dict.fromkeys("".join(each) for each in every))


def _placeholder(node: ast.expr) -> str:
    """A short name for what is put in."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return "class" if node.attr in ("__name__", "__qualname__") else node.attr.strip("_")
    if isinstance(node, ast.Call):
        inner = [each for each in node.args if isinstance(each, (ast.Name, ast.Attribute))]
        return _placeholder(inner[0]) if inner else "…"
    if isinstance(node, ast.Subscript):
        return _placeholder(node.value)
    return "…"
