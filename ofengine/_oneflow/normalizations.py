"""Which operations of a trace read running statistics behind the one that updates them."""

from __future__ import annotations

from typing import Any, Set

from oneflow.framework import c_api_util


def read_behind_update(means: Set[str], names: Set[str]) -> bool:
    """True where the step being traced reads a tensor of ``names`` after it was updated.

    Its backward pass counts: in eager mode it reads what is there by then.

    Args:
        means: the names of the running means that batch norms in training mode update.
        names: those of the running statistics of the same layer.
    """
    updated = False
    for each in c_api_util.GetCurrentJob().net.op:
        if each.WhichOneof("op_type") != "user_conf":
            continue
        if _updates(each.user_conf, means):
            updated = True
        elif updated and names & {n for given in each.user_conf.input.values() for n in given.s}:
            return True
    return False


def _updates(conf: Any, means: Set[str]) -> bool:
    if not conf.op_type_name.startswith("normalization") or not conf.attr["training"].at_bool:
        return False
    return bool(means & {*conf.input["moving_mean"].s})
