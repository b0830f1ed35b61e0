"""Pages that are made from the code: the API."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "ofengine": "ofengine/__init__.py",
    "ofengine.callbacks": "callbacks/__init__.py",
    "ofengine.loggers": "ofengine/loggers/__init__.py",
    "ofengine.metrics": "ofengine/metrics/__init__.py",
    "ofengine.rates": "ofengine/rates/__init__.py",
}
"""The modules whose names are public, and where each says which they are."""


def public_names(module: str) -> List[str]:
    """The names in the module's ``__all__``, read and not imported: OneFlow need not be there."""
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if name[0] != "_"]
    raise LookupError(f"{MODULES[module]} has no __all__")


def pages() -> Dict[str, str]:
    """The text of each page that is made, by its name."""
    return {f"api/{module}.md": _api(module) for module in MODULES}


def navigation(language: str) -> List[Any]:
    """The part of the navigation with the pages that are made."""
    title = {"en": "API", "zh": "API（英文）"}[language]
    return [{title: [{module: f"api/{module}.md"} for module in MODULES]}]


def _api(module: str) -> str:
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
