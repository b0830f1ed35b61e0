"""Which operations of a trace read running statistics behind the one that updates them."""

from __future__ import annotations

from typing import Any, Sequence, Set

from ofengine._oneflow.lazy_names import name_of
from ofengine._oneflow.traced_operations import TracedOperations


def read_behind_update(
    step: TracedOperations, means: Set[str], names: Set[str], outputs: Sequence[Any], forward: int
) -> bool:
    """True where the step being traced reads a tensor of ``names`` after it was updated.

    Its backward pass counts: in eager mode it reads what is there by then. What is computed for
    nothing does not.

    Args:
        step: its operations, those of the backward pass included.
        means: the names of the running means that batch norms in training mode update.
        names: those of the running statistics of the same layer.
        outputs: what the step puts out.
        forward: so many operations come before the backward pass; 0 where that is not known.
    """
    updates = {at for at in step.readers(means) if means & {*step.all[at].mean}}
    if not updates:
        return False
    first = min(updates)
    late = (step.readers(names, first) | step.likes(names, first)) - updates
    if not late:
        return False
    needed = {name_of(each) for each in outputs} if forward else set()
    for at in range(len(step.all) - 1, min(late) - 1, -1):
        each = step.all[at]
        if at >= forward or needed & {*each.outputs}:
            if at in late:
                return True
            needed.update(each.inputs, each.likes)
    return False
