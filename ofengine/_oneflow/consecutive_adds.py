"""Takes back what a pass of OneFlow's compiler does to sums of three tensors and more.

``FuseConsecutiveAddPass`` (OneFlow 0.9.0, ``oneflow/core/job_rewriter``) turns ``a + (b + c)``,
two operations ``add_n``, into one that computes ``(a + b) + c``: other last bits than eager mode's.
Such sums are written (``loss_1 + loss_2 + loss_3``), or made by ``backward`` where a tensor is used
three times. Here the operations of the job before the passes are put back.
"""

from __future__ import annotations

from typing import Any, Dict, List


def put_back(before: Any, after: Any) -> int:
    """Put back into the job ``after`` the passes the additions of the job ``before`` them.

    Both are ``Job`` protobufs; ``after`` is changed. Only sums of the very same tensors are, so
    that a sum which another pass has changed too stays as it is. Returns how many were put back.
    """
    made = {op.name: op for op in before.net.op if _is_add(op)}
    left = {op.name: op for op in after.net.op if _is_add(op)}
    lost = {name: op for name, op in made.items() if name not in left}
    if not lost:
        return 0
    likes: Dict[str, str] = {}
    for name, fused in left.items():
        if name not in made or list(_inputs(made[name])) == list(_inputs(fused)):
            continue
        if sorted(_flat(made[name], lost)) != sorted(_inputs(fused)):
            continue
        for op in _lost_below(made[name], lost):
            after.net.op.add().CopyFrom(op)
            likes[op.name] = name
            _describe(after, op, like=name)
        fused.user_conf.input["in"].CopyFrom(made[name].user_conf.input["in"])
        _describe(after, fused, like=name)
    _place(after, likes)
    return len(likes)


def _is_add(op: Any) -> bool:
    return bool(op.HasField("user_conf") and op.user_conf.op_type_name == "add_n")


def _inputs(op: Any) -> Any:
    return op.user_conf.input["in"].s


def _lost_below(op: Any, lost: Dict[str, Any]) -> List[Any]:
    """The operations in ``lost`` whose sums ``op`` adds up, theirs included, each once."""
    found: Dict[str, Any] = {}
    waiting = [op]
    while waiting:
        for tensor in _inputs(waiting.pop()):
            name = tensor.partition("/")[0]
            if name in lost and name not in found:
                found[name] = lost[name]
                waiting.append(lost[name])
    return list(found.values())


def _flat(op: Any, lost: Dict[str, Any]) -> List[str]:
    """The tensors that ``op`` adds up, the sums in ``lost`` taken apart; in no order."""
    flat: List[str] = []
    waiting = list(_inputs(op))
    while waiting:
        tensor = waiting.pop()
        name = tensor.partition("/")[0]
        if name in lost:
            waiting.extend(_inputs(lost[name]))
        else:
            flat.append(tensor)
    return flat


def _place(job: Any, likes: Dict[str, str]) -> None:
    """Put each operation, a key of ``likes``, where the one is that its value names."""
    for group in job.placement.placement_group:
        here = set(group.op_set.op_name)
        group.op_set.op_name.extend(name for name, like in likes.items() if like in here)
    for group in job.placement.blob_placement_group:
        here = {each.op_name for each in group.lbi}
        for name, like in likes.items():
            if like in here and name not in here:
                group.lbi.add(op_name=name, blob_name="out_0")


def _describe(job: Any, op: Any, like: str) -> None:
    """Say where the inputs of ``op`` come from; shape and layout are as those of ``like``."""
    described = job.helper.lbn2logical_blob_desc
    described[f"{op.name}/out_0"].CopyFrom(described[f"{like}/out_0"])
    signature = job.helper.op_name2arg_signature[op.name].bn_in_op2lbi
    signature.clear()
    for number, tensor in enumerate(_inputs(op)):
        signature[f"in_{number}"].op_name, _, signature[f"in_{number}"].blob_name = (
            tensor.partition("/")
        )
    signature["out_0"].op_name, signature["out_0"].blob_name = op.name, "out_0"
    views = job.job_parallel_view_conf
    for table, field in (
        (views.op_name2sbp_signature_conf, "bn_in_op2sbp_parallel"),
        (views.op_name2nd_sbp_signature_conf, "bn_in_op2nd_sbp"),
    ):
        layout = getattr(table[like], field)
        one, out = type(layout["in_0"])(), type(layout["out_0"])()
        one.CopyFrom(layout["in_0"])
        out.CopyFrom(layout["out_0"])
        own = getattr(table[op.name], field)
        own.clear()
        for number in range(len(_inputs(op))):
            own[f"in_{number}"].CopyFrom(one)
        own["out_0"].CopyFrom(out)
