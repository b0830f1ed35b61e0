"""Shapes that do not broadcast, found before OneFlow's compiler ends the process over them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, Callable, Iterator, Tuple

import oneflow as flow

from ofengine._oneflow.operators import functions_by_name

_FUNCTIONS = (
    *("add", "sub", "mul", "div", "pow", "fmod", "floor_divide", "true_divide", "multiply"),
    *(
        "subtract",
        "divide",
        "maximum",
        "minimum",
        "eq",
        "equal",
        "ne",
        "not_equal",
        "gt",
        "greater",
    ),
    *("ge", "greater_equal", "lt", "less", "le", "less_equal", "logical_and", "logical_or"),
    *("logical_xor", "broadcast_add", "broadcast_sub", "broadcast_mul", "broadcast_div"),
)
_OF_SEVERAL = (
    *("mse_loss", "l1_loss", "margin_ranking_loss", "triplet_margin_loss"),
    *("addcmul", "addcdiv", "lerp"),
)
"""Compositions in C++ of the above."""
_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "radd", "rsub", "rmul", "rtruediv"),
    *("rfloordiv", "rpow", "iadd", "isub", "imul", "itruediv", "eq", "ne", "gt", "ge", "lt", "le"),
    *("and", "or", "xor"),
)


def check_broadcast(*operands: Any) -> None:
    """Raise RuntimeError where the shapes of the tensors among ``operands`` do not broadcast."""
    shapes = [tuple(each.shape) for each in operands if isinstance(each, flow.Tensor)]
    for left, right in itertools.combinations(shapes, 2):
        if not _broadcast(left, right):
            raise RuntimeError(f"the shapes {left} and {right} do not broadcast")


def _broadcast(left: Tuple[int, ...], right: Tuple[int, ...]) -> bool:
    pairs = zip(reversed(left), reversed(right))
    return all(a == b or a == 1 or b == 1 for a, b in pairs)


def _checked(function: Callable[..., Any], operands: int = 2) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_broadcast(*args[:operands])
        return function(*args, **kwargs)

    return checked


@contextlib.contextmanager
def checking_shapes() -> Iterator[None]:
    """In the block, let every operation that broadcasts two tensors check their shapes itself."""
    with contextlib.ExitStack() as stack:
        for name in (*_FUNCTIONS, *_OF_SEVERAL):
            operands = 3 if name in _OF_SEVERAL else 2
            for holder, function in functions_by_name(name):
                setattr(holder, name, _checked(function, operands))
                stack.callback(setattr, holder, name, function)
        for name in [*(f"__{each}__" for each in _OPERATORS), *_FUNCTIONS]:
            function = getattr(flow.Tensor, name, None)
            if function is None or function is getattr(object, name, None):
                continue
            own = flow.Tensor.__dict__.get(name)
            setattr(flow.Tensor, name, _checked(function))
            if own is None:
                stack.callback(delattr, flow.Tensor, name)
            else:
                stack.callback(setattr, flow.Tensor, name, own)
        yield
