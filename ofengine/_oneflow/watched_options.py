"""The options of parameter groups, which tell when a rate or the clipping in them is written.

Asking every group at every step whether somebody wrote into it costs 0.1 us a group.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import attrs
from oneflow.optim import Optimizer

_RATES = ("lr", "lr_scale")
_CLIPPING = "clip_grad_max_norm"


@attrs.define
class Mark:
    """What was written into the groups of one optimizer."""

    rates: bool = True
    """True where a rate or its scale may have been written since somebody looked."""
    clips: bool = True
    """True where some group may ask for clipping."""

    def note(self, key: Any) -> None:
        """``key`` of a group was written or taken away."""
        if key in _RATES:
            self.rates = True
        elif key == _CLIPPING:
            self.clips = True

    def note_all(self) -> None:
        """Anything may have been."""
        self.rates = self.clips = True


class WatchedOptions(Dict[str, Any]):
    """A dict that notes in ``mark`` what is written; copies of it are plain dicts."""

    def __init__(self, options: Dict[str, Any], mark: Mark) -> None:
        super().__init__(options)
        self.mark = mark

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.mark.note(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.mark.note(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """See dict."""
        self.mark.note(key)
        return super().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        """See dict."""
        self.mark.note_all()
        return super().pop(*args)

    def popitem(self) -> Tuple[str, Any]:
        """See dict."""
        self.mark.note_all()
        return super().popitem()

    def clear(self) -> None:
        """See dict."""
        self.mark.note_all()
        super().clear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """See dict."""
        self.mark.note_all()
        super().update(*args, **kwargs)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def copy(self) -> Dict[str, Any]:
        """See dict."""
        return dict(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


set_quietly = dict.__setitem__
"""``set_quietly(options, key, value)`` writes without a note: the engine's own write."""


def watch_options(optimizer: Optimizer) -> Mark:
    """From now on the groups of ``optimizer`` tell; of one optimizer the mark is always the same.

    Groups that come later do not tell until this is called again.
    """
    groups = optimizer.param_groups
    watched = [each.options for each in groups if isinstance(each.options, WatchedOptions)]
    mark = watched[0].mark if watched else Mark()
    for group in groups:
        if not isinstance(group.options, WatchedOptions):
            group._options = WatchedOptions(group.options, mark)
    mark.rates = True
    mark.clips = any(_CLIPPING in group.options for group in groups)
    return mark
