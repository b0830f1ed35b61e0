"""Pages that are made from the code: the API, the errors, Lightning's names."""

from __future__ import annotations

import ast
import html
import importlib.util
import sys
from pathlib import Path
from typing import Any, Dict, List

sys.path.insert(0, str(Path(__file__).parent))
import messages

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "ofengine": "ofengine/__init__.py",
    "ofengine.callbacks": "callbacks/__init__.py",
    "ofengine.checkpoint": "ofengine/checkpoint/__init__.py",
    "ofengine.loggers": "ofengine/loggers/__init__.py",
    "ofengine.metrics": "ofengine/metrics/__init__.py",
    "ofengine.rates": "ofengine/rates/__init__.py",
}
"""The modules whose names are public, and where each says which they are."""
SINGLE = {
    "ofengine.errors": ["UnknownArgumentError", "UnknownAttributeError", "UnknownNameError"],
    "ofengine.onnx_model": ["write_onnx"],
    "ofengine.run.progress": ["Progress", "Point"],
    "ofengine.run.settings": ["Settings"],
    "ofengine.run.view": ["RunView"],
}
"""What users meet of other modules, and import from these."""
PUBLIC = [*MODULES, *SINGLE]
"""The modules that have a page."""


MADE_OF = {"ofengine/run/lightning.py": "lightning-names.md"}
"""The file that a page is made of: a link to the file leads to the page on the site."""


def public_names(module: str) -> List[str]:
    """The names that are public of a module of ``PUBLIC``.

    Those of ``MODULES`` have them in ``__all__``, which is read and not imported: OneFlow need not
    be there.
    """
    if module in SINGLE:
        return SINGLE[module]
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if name[0] != "_"]
    raise LookupError(f"{MODULES[module]} has no __all__")


def pages() -> Dict[str, str]:
    """The text of each page that is made, by its name."""
    api = {f"api/{module}.md": api_page(module) for module in PUBLIC}
    return {**api, "errors.md": messages.page(), "lightning-names.md": _lightning_names()}


def navigation(language: str) -> List[Any]:
    """The part of the navigation with the pages that are made."""
    api = [{module: f"api/{module}.md"} for module in PUBLIC]
    if language == "zh":
        made = [
            {"错误与警告（英文）": "errors.md"},
            {"Lightning 的名称（英文）": "lightning-names.md"},
        ]
        return [{"参考": [{"API（英文）": api}, *made]}]
    made = [{"Errors and warnings": "errors.md"}, {"Lightning's names": "lightning-names.md"}]
    return [{"Reference": [{"API": api}, *made]}]


def api_page(module: str) -> str:
    """A page with every public name; what a callback overrides is told at ``Callback``."""
    options = ""
    if module == "ofengine.callbacks":
        told = "|".join(sorted(_methods("ofengine/callback.py", "Callback")))
        options = f'    options:\n      filters: ["!^_", "!^({told})$"]\n'
    names = "".join(f"\n::: {module}.{name}\n{options}" for name in public_names(module))
    return f"# {module}\n{names}"


def _methods(path: str, name: str) -> List[str]:
    """What the class ``name`` in the file has: methods, properties and attributes."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    methods = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return methods + [n.target.id for n in body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]


def _module(path: str) -> Any:
    """A file of the package that imports nothing else of it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lightning_names() -> str:
    """A table of each kind of Lightning's names, with what the error says to write instead."""
    lightning = _module("ofengine/run/lightning.py")
    methods = _module("ofengine/run/lightning_methods.py")
    classes = _module("ofengine/lightning_classes.py")
    of_classes = classes.CLASS_ARGUMENTS
    parts = [_OF_LIGHTNING]
    for title, table in (
        ("Arguments of the Trainer and its verbs", lightning.TRAINER_ARGUMENTS),
        ("Attributes and methods of the trainer", lightning.TRAINER_ATTRIBUTES),
        ("Attributes and methods of the task", lightning.TASK_ATTRIBUTES),
        ("Hooks and methods to override", lightning.HOOKS),
        ("Arguments of log", lightning.LOG_ARGUMENTS),
        ("Arguments of training_step", lightning.STEP_ARGUMENTS),
        ("Arguments of the Trainer that something else takes", lightning.ARGUMENTS_ELSEWHERE),
        ("Classes", classes.EXPORTS),
        *((f"Arguments of {name}", table) for name, table in sorted(of_classes.items())),
        *((f"Arguments of {method}", table) for method, table in methods.METHOD_ARGUMENTS.items()),
        ("Keys of a task's checkpoint", methods.CHECKPOINT_KEYS),
    ):
        rows = "\n".join(
            f"<tr><td><code>{name}</code></td><td>{html.escape(mend, quote=False)}</td></tr>"
            for name, mend in sorted(table.items())
        )
        parts.append(
            f"## {title}\n\n<table>\n<thead><tr><th>Lightning's name</th><th>Here</th></tr>"
            f"</thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n"
        )
    return "\n".join(parts)


_OF_LIGHTNING = """# Lightning's names

Names that PyTorch Lightning has and ofengine has not, with what the error or the warning says to
write instead: all of Lightning 2, and the well-known ones of Lightning 1. A name that is not here
either means the same in both, or is in neither.
"""
