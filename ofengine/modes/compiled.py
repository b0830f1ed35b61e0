"""Compiled steps, kept as long as what they read is as it was."""

from __future__ import annotations

import math
from typing import Any, Dict, Hashable, Iterator, List, Optional, Set, Tuple

import attrs

from ofengine.errors import warn
from ofengine.modes.batch_norms import BatchNorms
from ofengine.modes.draws import Draws

_MOST_VARIANTS = 4
"""So many graphs are kept for one shape of batch, for values that come again (a switch)."""
_OFTEN = 5
_MANY = 8


@attrs.define
class Compiled:
    """A graph, with what its calls need."""

    graph: Any
    draws: Draws = attrs.Factory(Draws)
    batch_norms: BatchNorms = attrs.Factory(BatchNorms)
    watch: Any = None
    """The :class:`~ofengine.modes.guards.Watch` over what its trace read."""
    looks: bool = False
    """True where something is to be looked at before each run."""
    rates_until: float = math.inf
    """The first step whose rates are not compiled in, or infinite where all are."""


class Compilations:
    """The graphs of one kind, by the structure and shapes that they take."""

    def __init__(self) -> None:
        self.active: Dict[Hashable, Compiled] = {}
        """Those whose reads were as they are when somebody last looked."""
        self._variants: Dict[Hashable, List[Compiled]] = {}
        self._changed: Dict[Hashable, str] = {}

    def __iter__(self) -> Iterator[Compiled]:
        return (each for variants in self._variants.values() for each in variants)

    def __len__(self) -> int:
        return len(self._variants)

    def get(self, key: Hashable) -> Optional[Compiled]:
        """As :meth:`find`, which looks only where something may have changed."""
        compiled = self.active.get(key)
        if compiled is None or (compiled.looks and compiled.watch.may_differ()):
            compiled = self.find(key)
        return compiled

    def find(self, key: Hashable) -> Optional[Compiled]:
        """The graph for ``key`` that read what is so now, where there is one."""
        before = self.active.pop(key, None)
        variants = self._variants.get(key, [])
        for each in variants:
            change = each.watch.changed()
            if change is None:
                self.active[key] = each
                return each
            if each is before or before is None:
                self._changed[key] = change
        return None

    def add(self, key: Hashable, compiled: Compiled) -> Optional[str]:
        """Keep a new graph; what changed since the one before, as a user would write it."""
        variants = self._variants.setdefault(key, [])
        variants.append(compiled)
        if len(variants) > _MOST_VARIANTS:
            del variants[0]
        self.active[key] = compiled
        return self._changed.pop(key, None)

    def look_again(self, places: Set[Tuple[int, str]]) -> None:
        """Some attributes, and perhaps options of groups, were written."""
        for key, each in list(self.active.items()):
            change = each.watch.changed(places)
            if change is not None:
                del self.active[key]
                self._changed[key] = change

    def clear(self) -> None:
        """Let all graphs go."""
        self.active.clear()
        self._variants.clear()
        self._changed.clear()


class Changes:
    """Counts what makes steps be compiled anew, and says what to do where that is often."""

    def __init__(self) -> None:
        self._often: Dict[str, int] = {}

    def note(self, name: str) -> None:
        """``name`` was another; warn where it is for the fifth time."""
        self._often[name] = self._often.get(name, 0) + 1
        if self._often[name] == _OFTEN:
            attribute = name.rpartition(".")[2]
            warn(
                f"{name} has changed {_OFTEN} times, and each time the compiled step is compiled "
                "anew, which takes seconds: hand it in as a tensor, either in the batch, or as a "
                f'buffer that is filled in place (self.register_buffer("{attribute}_", '
                f"oneflow.tensor(0.0)) in __init__, self.{attribute}_.fill_(value) in the hook), "
                'or use Trainer(mode="eager").'
            )


def warn_of_many_graphs(steps: int) -> None:
    """Say so where so many compiled steps are too many, once."""
    if steps == _MANY:
        warn(
            f"{_MANY} graphs were compiled for training so far, one for each shape of batch and "
            "each constant in it (a number or text): each takes seconds and memory. Pad the "
            "batches to few shapes, and keep constants out of them."
        )
