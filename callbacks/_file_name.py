"""The name of a checkpoint file, made of a template and the moment's values."""

from __future__ import annotations

import glob
from string import Formatter
from typing import Any, Dict, List, Optional, Tuple

from ofengine.callbacks._monitor import hint
from ofengine.checkpoint import EXTENSION
from ofengine.disk import why_no_path
from ofengine.errors import ConfigurationError

_VERSION = "-v9999"
"""What a name gets where it is another file's already, or less."""


class FileName:
    """A template such as ``"{epoch}-{val_acc:.3f}"``, or ``"best/{epoch}"`` for a sub-folder.

    Args:
        template: text and fields with Python's format specs.
        with_names: write ``epoch=3-val_acc=0.912`` instead of ``3-0.912``.

    Raises:
        ConfigurationError: the template cannot be read, or leads out of its folder.
    """

    def __init__(self, template: str, with_names: bool) -> None:
        if not isinstance(template, str):
            raise ConfigurationError(
                f'ModelCheckpoint(filename={template!r}): give a text like "{{epoch}}-{{step}}".'
            )
        self._template = template
        self._parts = _parse(template)
        self._with_names = with_names
        self.of({field: 0 for _, field, _ in self._parts if field is not None})

    def of(self, values: Dict[str, Any]) -> str:
        """The name for these values, its extension included, and with its sub-folders.

        Raises :class:`ConfigurationError` where a field has no value, or the name is none.
        """
        name = ""
        for text, field, spec in self._parts:
            name += text
            if field is None:
                continue
            if field not in values:
                raise ConfigurationError(
                    f"ModelCheckpoint(filename=...) names {{{field}}}, and no such metric was "
                    f"logged.{hint(field, values)}"
                )
            name += self._label(field) + format(values[field], spec)
        name = name if name.endswith(EXTENSION) else name + EXTENSION
        self._check(name)
        return name

    @property
    def folder_pattern(self) -> str:
        """The sub-folders of all names as a glob pattern that ends in "/"; "" without any."""
        pattern = ""
        for text, field, _ in self._parts:
            pattern += glob.escape(text)
            if field is not None:
                pattern += glob.escape(self._label(field)) + "*"
        folders, slash, _ = pattern.rpartition("/")
        return folders + slash

    def _label(self, field: str) -> str:
        return field.replace("/", "_") + "=" if self._with_names else ""  # val/acc is no folder

    def _check(self, name: str) -> None:
        parts = name.split("/")
        problem = why_no_path(name.replace(EXTENSION, _VERSION + EXTENSION))
        if name.startswith("/"):
            problem = "is absolute: name the folder as dirpath"
        elif any(part in ("", ".", "..") for part in parts) or parts[-1] == EXTENSION:
            problem = "leads out of dirpath, or to no file: write it like 'best/{epoch}'"
        if problem is not None:
            shown = self._template if len(self._template) < 80 else f"{self._template[:80]}..."
            raise ConfigurationError(f"ModelCheckpoint(filename={shown!r}): the name {problem}.")


def _parse(filename: str) -> List[Tuple[str, Optional[str], str]]:
    """The template as (text, field after it or None, the field's format spec)."""
    parts: List[Tuple[str, Optional[str], str]] = []
    wrong = f"ModelCheckpoint(filename={filename!r})"
    example = 'write it like "{epoch}-{step}-{val_acc:.3f}"'
    try:
        for text, field, spec, conversion in Formatter().parse(filename):
            if field == "" or conversion:
                raise ConfigurationError(f"{wrong} has a field without a name: {example}.")
            if field is not None:
                format(0 if field in ("epoch", "step") else 0.0, spec or "")
            parts.append((text, field, spec or ""))
    except ValueError as error:
        raise ConfigurationError(f"{wrong}: {error}; {example}.") from None
    return parts
