"""Which operations of a trace read running statistics behind the one that updates them."""

from __future__ import annotations

from typing import Any, Sequence, Set, Tuple

from oneflow.framework import c_api_util

from ofengine._oneflow.lazy_names import name_of


def read_behind_update(
    means: Set[str], names: Set[str], outputs: Sequence[Any], forward: int
) -> bool:
    """True where the step being traced reads a tensor of ``names`` after it was updated.

    Its backward pass counts: in eager mode it reads what is there by then. What is computed for
    nothing does not.

    Args:
        means: the names of the running means that batch norms in training mode update.
        names: those of the running statistics of the same layer.
        outputs: what the step puts out.
        forward: so many operations come before the backward pass; 0 where that is not known.
    """
    operations = [*c_api_util.GetCurrentJob().net.op]
    needed = {name_of(each) for each in outputs} if forward else set()
    updates = [number for number, each in enumerate(operations) if _updates(each, means)]
    behind = range(updates[0] + 1, len(operations)) if updates else ()
    for number in reversed(behind):
        given, made = _names(operations[number])
        if number >= forward or made & needed:
            if given & names and number not in updates:
                return True
            needed |= given
    return False


def _names(operation: Any) -> Tuple[Set[str], Set[str]]:
    """Of what an operation is given, and of what it makes."""
    if operation.WhichOneof("op_type") != "user_conf":
        return set(), set()
    conf = operation.user_conf
    given, made = (
        {n for each in kind.values() for n in each.s} for kind in (conf.input, conf.output)
    )
    return given, made


def _updates(operation: Any, means: Set[str]) -> bool:
    if operation.WhichOneof("op_type") != "user_conf":
        return False
    conf = operation.user_conf
    if not conf.op_type_name.startswith("normalization") or not conf.attr["training"].at_bool:
        return False
    return bool(means & {*conf.input["moving_mean"].s})
