"""The name of a checkpoint file, made of a template and the moment's values."""

from __future__ import annotations

from string import Formatter
from typing import Any, Dict, List, Optional, Tuple

from ofengine.callbacks._monitor import hint
from ofengine.checkpoint import EXTENSION
from ofengine.errors import ConfigurationError


class FileName:
    """A template such as ``"{epoch}-{val_acc:.3f}"``.

    Args:
        template: text and fields with Python's format specs.
        with_names: write ``epoch=3-val_acc=0.912`` instead of ``3-0.912``.

    Raises:
        ConfigurationError: the template cannot be read.
    """

    def __init__(self, template: str, with_names: bool) -> None:
        self._parts = _parse(template)
        self._with_names = with_names

    def of(self, values: Dict[str, Any]) -> str:
        """The name for these values, its extension included.

        Raises :class:`ConfigurationError` where a field has no value.
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
            if self._with_names:
                name += field.replace("/", "_") + "="  # else val/acc would make a folder val
            name += format(values[field], spec)
        return name if name.endswith(EXTENSION) else name + EXTENSION


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
