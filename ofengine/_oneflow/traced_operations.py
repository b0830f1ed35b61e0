"""The operations of the step being traced: what each is given and makes, and who reads what."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Sequence, Set

import attrs
from oneflow.framework import c_api_util


def operations_so_far() -> int:
    """How many the trace has."""
    return len(_operations())


def _operations() -> Any:
    return c_api_util.GetCurrentJob().net.op  # OneFlow hands out the whole step as text


@attrs.frozen
class Operation:
    """One operation; tensors by their names."""

    kind: str
    inputs: Sequence[str]
    """What it is given, but for its shape alone."""
    likes: Sequence[str]
    """What it is given for its shape alone."""
    outputs: Sequence[str]
    mean: Sequence[str]
    """The running mean that it updates, as a batch norm in training mode does."""

    @classmethod
    def of(cls, operation: Any) -> Operation:
        """``operation`` of a job."""
        kind = operation.WhichOneof("op_type")
        if kind != "user_conf":
            return cls(kind, (), (), (f"{operation.name}/out",), ())
        conf = operation.user_conf
        inputs = [n for key, each in conf.input.items() if key != "like" for n in each.s]
        likes = [n for key, each in conf.input.items() if key == "like" for n in each.s]
        outputs = [n for each in conf.output.values() for n in each.s]
        kind, mean = conf.op_type_name, ()
        if kind.startswith("normalization") and conf.attr["training"].at_bool:
            mean = tuple(conf.input["moving_mean"].s)
        return cls(kind, inputs, likes, outputs, mean)


class TracedOperations:
    """Those of the trace so far, in their order."""

    def __init__(self) -> None:
        self.all = [Operation.of(each) for each in _operations()]
        self._read_at: Dict[str, List[int]] = {}
        self._liked_at: Dict[str, List[int]] = {}
        for at, each in enumerate(self.all):
            for places, names in ((self._read_at, each.inputs), (self._liked_at, each.likes)):
                for name in names:
                    places.setdefault(name, []).append(at)

    def readers(self, names: Iterable[str], after: int = -1) -> Set[int]:
        """The places of the operations behind the one ``after`` that read any of these."""
        return {at for name in names for at in self._read_at.get(name, ()) if at > after}

    def likes(self, names: Iterable[str], after: int) -> Set[int]:
        """The same of those that are given any of these for its shape alone."""
        return {at for name in names for at in self._liked_at.get(name, ()) if at > after}
