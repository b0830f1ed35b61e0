"""Every message of an error or a warning that the code holds, read from the code.

A message says what was wrong and what to write instead, so that a list of all messages is a list of
all mistakes and their mends. What is put in when the message is made stands in angle brackets:
``‹group›``. A message is what an error is raised with, what is warned of, a warning or an error in
the log, and a line on stderr.
"""

from __future__ import annotations

import ast
import functools
import html
import itertools
import re
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

ROOT = Path(__file__).resolve().parents[2]
WARNING = "OFEngineWarning"
MOST_VARIANTS = 100
"""A text with more is an error: none is left out."""
LOG, STDERR, PYTHON = "Lines of the log", "Lines on stderr", "Errors of Python's own classes"
OTHERS = {
    PYTHON: "What Python's own rules ask for, such as an `AttributeError` for a name that is not "
    "there, and what is wrong with a file or a value, which one of the errors above then tells.",
    LOG: "Warnings and errors in the log, which are those of the logger `ofengine`.",
    STDERR: "What the command line, a launcher of ranks and `restart_on_crash` say.",
}
"""The sections that are of no class in ``errors.py``."""

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


@functools.lru_cache(maxsize=None)
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
    carried = [*kinds(), "warn", "misfit"]
    found: List[Message] = []
    for path in sources():
        tree = _tree(path)
        where = path.relative_to(ROOT).as_posix()
        returned = _returned(tree)
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        for call, inside in _calls(tree):
            kind = _kind(call, carried, call in raised)
            if not kind or (inside and inside[-1].name == _name(call.func)):
                continue
            scope = _scope(tree, inside)
            # What a function of the file returns is looked at where nothing is known without it.
            texts = _said(kind, call, scope) or _said(kind, call, {**returned, **scope})
            found += [Message(kind, text, where, call.lineno) for text in texts]
    return found


def _kind(call: ast.Call, carried: Sequence[str], is_raised: bool) -> str:
    """What carries the message of ``call``: a class, a function or a section; "" for none."""
    name = _name(call.func)
    if name in carried:
        return name
    if is_raised:  # of a class that is only known in a run: one of ofengine's
        made = isinstance(call.func, ast.Call)
        public = name[:1].isupper() and name != "AssertionError"
        return "OFEngineError" if made else name if public else ""
    if isinstance(call.func, ast.Attribute):
        is_log = _name(call.func.value) == "log" and name in ("warning", "error")
        return LOG if is_log else ""
    to = [_name(each.value) for each in call.keywords if each.arg == "file"]
    return STDERR if name == "say" or (name == "print" and to == ["stderr"]) else ""


def page() -> str:
    """The page in Markdown: a section for each class, and in it one for each file."""
    told = {**kinds(), **OTHERS}
    by_class: Dict[str, Dict[str, List[str]]] = {}
    for each in messages():
        kind = _section(each.kind)
        text = f"`{each.kind}`: {each.text}" if kind == PYTHON else each.text
        texts = by_class.setdefault(kind, {}).setdefault(each.path, [])
        if text not in texts:
            texts.append(text)
    parts = [_INTRODUCTION]
    for kind in [name for name in told if name in by_class]:
        parts.append(f"## {kind}\n\n{told[kind]}\n")
        for path, texts in by_class[kind].items():
            items = "\n".join(f"<li>{_as_html(text)}</li>" for text in texts)
            parts.append(f"### {_about(ROOT / path)}\n\n`{path}`\n\n<ul>\n{items}\n</ul>\n")
    return "\n".join(parts)


_INTRODUCTION = """# Errors and warnings

Each error says what was wrong, where, and what to write instead. This page has every one that the
code can raise, every warning, and what else is told in the log or on stderr because something is
wrong, made from the code itself. What is put in stands in ‹angle brackets›. Where the search does
not find a message of yours, search for a part of it that has no name or number of your own.
"""


def _section(kind: str) -> str:
    """Where a message stands; of the package's inner classes the text is told on by one error."""
    own = kinds()
    if kind in own and (kind.endswith("Error") or kind == WARNING):
        return kind
    if kind == "warn":
        return WARNING
    if kind in own or kind == "misfit":
        return "CheckpointError"
    return kind if kind in OTHERS else PYTHON


def _about(path: Path) -> str:
    text = ast.get_docstring(_tree(path)) or ""
    first = " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("``", "`")
    return html.escape(re.sub(r":\w+:`~?([^`]+)`", r"`\1`", first), quote=False)


def _as_html(text: str) -> str:
    escaped = html.escape(" ".join(text.split()), quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"‹([^›]*)›", r"<var>‹\1›</var>", escaped)


def _calls(
    node: ast.AST, inside: Tuple[Function, ...] = ()
) -> Iterator[Tuple[ast.Call, Tuple[Function, ...]]]:
    """Every call in ``node`` with the functions that it stands in, from outside inwards."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, inside
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _calls(child, (*inside, child) if is_function else inside)  # type: ignore[arg-type]


def _name(node: ast.expr) -> str:
    return (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    )


Scope = Dict[str, List[ast.expr]]


def _scope(tree: ast.Module, inside: Tuple[Function, ...]) -> Scope:
    """What names stand for in the innermost of the functions ``inside``."""
    scope = _assigned(tree)
    for function in inside:
        given = function.args
        for each in (*given.posonlyargs, *given.args, *given.kwonlyargs):
            scope.pop(each.arg, None)
        scope.update(_assigned(function))
    return scope


def _of_itself(node: ast.AST) -> Iterator[ast.AST]:
    """What is in ``node``, in order, but for the functions in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _of_itself(child)


def _assigned(owner: ast.AST) -> Scope:
    """What names stand for in ``owner``: all that is ever assigned to them, or looped over."""
    scope: Scope = {}
    for node in _of_itself(owner):
        targets: List[Tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            targets = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [(node.target, node.value)]
        elif isinstance(node, ast.For):
            targets = [(node.target, node.iter)]
        elif isinstance(node, ast.AugAssign):
            before = scope.get(_name(node.target), [])
            targets = [(node.target, ast.BinOp(each, node.op, node.value)) for each in before]
        for target, value in targets:
            if isinstance(target, ast.Name):
                scope.setdefault(target.id, []).append(value)
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, its in zip(target.elts, value.elts):
                    scope.setdefault(_name(one), []).append(its)
            elif isinstance(target, ast.Tuple) and _name(getattr(value, "func", value)) == "items":
                scope.setdefault(_name(target.elts[-1]), []).append(value)  # of a dict of texts
    return scope


def _returned(tree: ast.Module) -> Scope:
    """What the functions of a file return where it is a text, by ``name()``."""
    found: Scope = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            scope = _scope(tree, (function,))
            nodes = [node.value for node in _of_itself(function) if isinstance(node, ast.Return)]
            texts = [text for node in filter(None, nodes) for text in _texts(node, scope)]
            for text in filter(_has_words, texts):
                found.setdefault(f"{function.name}()", []).append(ast.Constant(text))
    return found


def _has_words(text: str) -> bool:
    return len(re.sub(r"‹[^›]*›|[\W\d]", "", text)) >= 3


def _said(kind: str, call: ast.Call, scope: Scope) -> List[str]:
    """The texts that a call may say."""
    given = [each for each in call.args if not isinstance(each, ast.Starred)]
    if not given:
        return []
    if kind == "misfit" and len(given) == 3:
        return [f"‹place› is ‹value›, and not {text}" for text in _texts(given[2], scope)]
    # What the operating system says is behind its number.
    texts = _texts(given[-1] if kind == "OSError" else given[0], scope)
    if kind == LOG:
        texts = [line for text in texts for line in _filled_in(text, given[1:], scope)]
    return [text for text in texts if _has_words(text)]


def _filled_in(text: str, given: List[ast.expr], scope: Scope) -> List[str]:
    """A line of the log with what is put in for each ``%s``."""
    first, *others = re.split(r"%[-+,.\d]*[a-z]", text)
    parts = [[first]]
    for after, node in itertools.zip_longest(others, given, fillvalue=ast.Name("…")):
        parts += [_texts(node, scope), [str(after)]]
    return _joined(parts)


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
    if isinstance(node, ast.BoolOp):
        texts = [text for value in node.values for text in _texts(value, scope, depth)]
        return texts if any(map(_has_words, texts)) else texts[:1]
    if isinstance(node, ast.Call) and f"{_name(node.func)}()" in scope:
        return [text for each in scope[f"{_name(node.func)}()"] for text in _texts(each, {})]
    if isinstance(node, ast.Name) and depth < 4 and node.id in scope:
        values = scope[node.id]
        if all(_is_text(value, scope) for value in values):
            # A name in what is assigned to itself is put in: else each turn makes more of them.
            inner = {name: each for name, each in scope.items() if name != node.id}
            return [text for value in values for text in _of_value(value, inner, depth + 1)]
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
    """What the parts make together, each with all that it may be."""
    every = list(dict.fromkeys("".join(each) for each in itertools.product(*parts)))
    if len(every) > MOST_VARIANTS:
        raise ValueError(f"a message has {len(every)} variants, and {MOST_VARIANTS} is the most")
    return every


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
