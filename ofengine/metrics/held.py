"""The metrics that a task and callbacks hold, by their places, as a checkpoint keeps them."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Iterator, Tuple

from ofengine.metrics.base import Metric

_MOST = 100
"""So many entries of a list or dict are looked at."""


def metrics_held(task: Any, callbacks: Iterable[Any]) -> Dict[str, Metric]:
    """Each metric once, by where it is: an attribute, or in a list, tuple or dict that is one."""
    owners = [("task." + name if name else "task", each) for name, each in task.named_modules()]
    owners += [(callback.state_key, callback) for callback in callbacks]
    found: Dict[str, Metric] = {}
    seen = set()
    for owner, each in owners:
        for place, value in _values(f"{owner}.", vars(each)):
            if isinstance(value, Metric) and id(value) not in seen:
                seen.add(id(value))
                found[f"{place} ({len(found)})" if place in found else place] = value
    return found


def _values(owner: str, attributes: Dict[str, Any]) -> Iterator[Tuple[str, Any]]:
    for name, value in list(attributes.items()):
        if isinstance(value, (list, tuple)):
            yield from ((f"{owner}{name}[{i}]", each) for i, each in enumerate(value[:_MOST]))
        elif isinstance(value, dict):
            yield from ((f"{owner}{name}[{key!r}]", value[key]) for key in list(value)[:_MOST])
        else:
            yield f"{owner}{name}", value
