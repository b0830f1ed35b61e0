"""Which operations of a trace read running statistics behind the one that updates them."""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, List, Sequence, Set

import attrs
from oneflow.framework import c_api_util

from ofengine._oneflow.lazy_names import name_of

_NONE: FrozenSet[str] = frozenset()


@attrs.define
class _Operation:
    """One operation of a trace; ``updates`` is the running mean that it updates, if any."""

    given: FrozenSet[str] = _NONE
    made: FrozenSet[str] = _NONE
    updates: FrozenSet[str] = _NONE

    @classmethod
    def of(cls, operation: Any) -> _Operation:
        """``operation`` of a job."""
        if operation.WhichOneof("op_type") != "user_conf":
            return cls()
        conf = operation.user_conf
        given, made = (
            frozenset(name for each in kind.values() for name in each.s)
            for kind in (conf.input, conf.output)
        )
        updates = _NONE
        if conf.op_type_name.startswith("normalization") and conf.attr["training"].at_bool:
            updates = frozenset(conf.input["moving_mean"].s)
        return cls(given, made, updates)


class TracedReads:
    """What reads which tensor in the step being traced, whose backward pass is there already.

    Args:
        outputs: what the step puts out.
        forward: so many operations come before the backward pass; 0 where that is not known.
    """

    def __init__(self, outputs: Sequence[Any], forward: int) -> None:
        self._operations = [_Operation.of(each) for each in c_api_util.GetCurrentJob().net.op]
        self._outputs, self._forward = outputs, forward
        self._readers: Dict[str, List[int]] = {}
        self._updaters: Dict[str, List[int]] = {}
        for number, each in enumerate(self._operations):
            for name in each.given:
                self._readers.setdefault(name, []).append(number)
            for name in each.updates:
                self._updaters.setdefault(name, []).append(number)

    def behind_update(self, means: Set[str], names: Set[str]) -> bool:
        """True where the step reads a tensor of ``names`` after it was updated.

        Its backward pass counts: in eager mode it reads what is there by then. What is computed
        for nothing does not.

        Args:
            means: the names of the running means that batch norms in training mode update.
            names: those of the running statistics of the same layer.
        """
        updates = {number for name in means for number in self._updaters.get(name, ())}
        if not updates:
            return False
        readers = {number for name in names for number in self._readers.get(name, ())} - updates
        late = {number for number in readers if number > min(updates)}
        if not late:
            return False
        needed = {name_of(each) for each in self._outputs} if self._forward else set()
        for number in range(len(self._operations) - 1, min(late) - 1, -1):
            each = self._operations[number]
            if number >= self._forward or each.made & needed:
                if number in late:
                    return True
                needed |= each.given
        return False
