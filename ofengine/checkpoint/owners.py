"""Whose state is whose: callbacks and loggers go by what they are, not by where they are listed."""

from __future__ import annotations

import inspect
from pathlib import PurePath
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ofengine.errors import warn


class Matches(NamedTuple):
    """Which states of a file belong to whom."""

    of_own: List[Optional[int]]
    """For each callback (or logger) the index of its state in the file; None where it has none."""
    lost: List[int]
    """The states that belong to nobody."""

    def at(self, places: Sequence[int], own: Sequence[Any], task: Any) -> List[Any]:
        """Those of ``own`` that the file has at ``places``, and the task for -1."""
        found = [each for each, index in zip(own, self.of_own) if index in places]
        return [*found, task] if -1 in places else found


def describe_owner(owner: Any) -> Dict[str, Any]:
    """What tells ``owner`` from others: its class, its ``state_key``, its plain arguments."""
    return {
        "class": type(owner).__qualname__,
        "key": owner.state_key,
        "arguments": dict(_arguments(owner)),
    }


def _arguments(owner: Any) -> Iterator[Tuple[str, Any]]:
    """The arguments of ``owner``'s class that it keeps under their names, as far as JSON has them.

    Of a path only the last part, which stays the same where a folder is moved.
    """
    kept = getattr(owner, "__dict__", {})
    for name in inspect.signature(type(owner).__init__).parameters:
        value = kept.get(name)
        if isinstance(value, PurePath):
            value = value.name
        if isinstance(value, (list, tuple)):
            value = list(value)
        if name in kept and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def match(kept: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> Matches:
    """Whose is each of ``kept``, among ``own``; both as :func:`describe_owner` gives them.

    Those of one ``state_key`` belong together. Where there are several, those first that share
    most arguments, then in the order in which they are listed. Files of earlier versions have no
    keys: there the class counts, and the order.
    """
    pairs = sorted(
        (_differences(theirs, ours), i, j)
        for i, ours in enumerate(own)
        for j, theirs in enumerate(kept)
        if theirs["class"] == ours["class"] and theirs.get("key", ours["key"]) == ours["key"]
    )
    of_own: List[Optional[int]] = [None] * len(own)
    taken = set()
    for differences, i, j in pairs:
        if of_own[i] is not None or j in taken:
            continue
        if differences and any(
            (i == other_i) != (j == other_j) and of_own[other_i] is None and other_j not in taken
            for _, other_i, other_j in pairs
        ):
            _tell_of_choice(own[i], kept[j])
        of_own[i] = j
        taken.add(j)
    return Matches(of_own, [j for j in range(len(kept)) if j not in taken])


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> int:
    if "arguments" not in theirs:
        return 0
    before, now = theirs["arguments"], ours["arguments"]
    # repr: NaN is the same as NaN, and 1 not as True
    return sum(repr(before.get(n, ...)) != repr(now.get(n, ...)) for n in {**before, **now})


def _tell_of_choice(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    before, now = theirs["arguments"], ours["arguments"]
    other = [name for name in now if repr(before.get(name)) != repr(now[name])]
    warn(
        f"the checkpoint has several states of {ours['key']}, none of them with the arguments of "
        f"now ({', '.join(f'{name}={now[name]!r}' for name in other[:3])}): the one most like it "
        "is taken. A state_key of its own tells each from the others."
    )


def in_words(kept: Mapping[str, Any]) -> str:
    """How a sentence calls the owner of a state."""
    return str(kept.get("key", kept["class"]))
