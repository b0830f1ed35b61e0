"""What of a task is to be finite, and the first of its numbers that are not, in words."""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Optional, Set, Tuple

import attrs
import numpy as np
import oneflow as flow


@attrs.frozen
class Expected:
    """Which tensors of a task have to be finite: those that were when its training began.

    A mask of infinite numbers is a user's way of leaving something out, in a buffer as a rule, and
    one may be made, or grow, on the way; NaN is nobody's, but where it was there from the start
    and does not train.
    """

    parameters: Tuple[str, ...]
    known: FrozenSet[str]
    """All tensors that were there."""
    infinite: FrozenSet[str]
    """Those that had infinite numbers."""
    anything: FrozenSet[str]
    """Those that had NaN and do not train."""

    @classmethod
    def of(cls, task: Any) -> Expected:
        """What is to be expected of ``task`` from now on; without one, no NaN is."""
        if task is None:
            return cls((), frozenset(), frozenset(), frozenset())
        parameters = dict(task.named_parameters())
        infinite: Set[str] = set()
        anything: Set[str] = set()
        tensors = task.state_dict()
        for name, tensor in {} if _all_finite(tensors) else tensors.items():
            array = _odd(tensor)
            if array is None:
                continue
            infinite.add(name)
            trains = name in parameters and parameters[name].requires_grad
            if not trains and np.isnan(array).any():
                anything.add(name)
        return cls(tuple(parameters), frozenset(tensors), frozenset(infinite), frozenset(anything))

    def broken(self, tensors: Mapping[str, Any]) -> Optional[str]:
        """The first of ``tensors`` that is not as expected, parameters first; None where all are.

        As "6 of the 6 numbers of 'stem.weight' are not finite".
        """
        if _all_finite(tensors):
            return None
        for name in dict.fromkeys((*self.parameters, *tensors)):
            if name in self.anything or name not in tensors:
                continue
            array = _odd(tensors[name])
            if array is not None:
                may_be_infinite = name in self.infinite or name not in self.known
                wrong = np.isnan(array) if may_be_infinite else ~np.isfinite(array)
                if wrong.any():
                    return _in_words(int(np.count_nonzero(wrong)), array.size, repr(name))
        return None

    def broken_content(
        self, weights: Mapping[str, Any], state: Optional[Mapping[str, Any]]
    ) -> Optional[str]:
        """As :meth:`broken`, of a checkpoint: of its optimizer and its gradients, too."""
        broken = self.broken(weights)
        if broken is not None or state is None:
            return broken
        for name, tensor in _beside(state):
            array = _odd(tensor)
            if array is not None:
                return _in_words(int(np.count_nonzero(~np.isfinite(array))), array.size, name)
        return None


def _beside(state: Mapping[str, Any]) -> Iterator[Tuple[str, Any]]:
    """What the next steps go on from beside the weights."""
    for each in state.get("several", {"": state}).values():
        for parameter, tensors in each["optimizer"]["states"].items():
            for key, tensor in tensors.items():
                yield f"the optimizer's {key} of {parameter!r}", tensor
    for parameter, gradient in state.get("gradients", {}).items():
        yield f"the gradient of {parameter!r}", gradient


_MOST_AT_ONCE = 4_000_000


def _all_finite(tensors: Mapping[str, Any]) -> bool:
    """True where all numbers are finite: of tensors, many are read in one go."""
    kinds: Dict[Any, List[Any]] = {}
    for tensor in tensors.values():
        if isinstance(tensor, np.ndarray):
            if _odd(tensor) is not None:
                return False
        elif tensor.is_floating_point() and tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with flow.no_grad():
        return all(_odd(together) is None for each in kinds.values() for together in _packed(each))


def _packed(tensors: List[Any]) -> Iterator[Any]:
    """All numbers of ``tensors``, in few tensors of a bounded size; the large ones as they are."""
    small: List[Any] = []
    size = 0
    for tensor in tensors:
        if tensor.numel() >= _MOST_AT_ONCE:
            yield tensor
            continue
        small.append(tensor.reshape(-1))
        size += tensor.numel()
        if size >= _MOST_AT_ONCE:
            yield flow.cat(small)
            small, size = [], 0
    if small:
        yield flow.cat(small)


def _odd(tensor: Any) -> Optional[np.ndarray]:
    """``tensor`` as an array, where not all of its numbers are finite."""
    array: np.ndarray = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
    if array.dtype.kind != "f" or not array.size:
        return None
    with np.errstate(invalid="ignore"):  # NaN goes through min and max, faster than isfinite
        finite = np.isfinite(array.min()) and np.isfinite(array.max())
    return None if finite else array


def _in_words(count: int, size: int, name: str) -> str:
    return f"{count} of the {size} numbers of {name} are not finite"
