"""A griffe extension: what docstrings write in Sphinx's way, in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(class|func|meth|attr|mod|data|exc):`(~?)([^`<]+)`")
_LITERAL = re.compile(r"::(?=\n\n +)")


class Roles(griffe.Extension):
    """Turns ``:class:`~a.B``` into code that links to B where B is public, ``::`` into ``:``."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = _ROLE.sub(_code, obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(":", text)


def _code(role: re.Match[str]) -> str:
    name = role[3].rpartition(".")[2] if role[2] else role[3]
    call = "()" if role[1] in ("func", "meth") else ""
    path = role[3] if role[3].startswith("ofengine") else f"ofengine.{role[3]}"
    # Optional: what is not public has no place to lead to.
    return f'<autoref identifier="{path}" optional><code>{name}{call}</code></autoref>'
