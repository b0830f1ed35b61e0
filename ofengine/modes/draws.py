"""The random numbers of a compiled step, made those of eager mode.

What draws inside a compiled graph (a dropout layer, ``oneflow.rand``) draws from a sequence of its
own that starts anew with each graph: graphs for several batch shapes, or a resumed run, would
repeat it, and no generator records how far it is. Here these numbers are inputs of the graph
instead: each random call that a trace meets becomes one more input, and before every run each is
drawn eagerly, in the same order and from the same generator as in eager mode.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow

from ofengine._oneflow.late_inputs import eager_result
from ofengine._oneflow.lazy_names import rename
from ofengine._oneflow.operators import functions_by_name
from ofengine.errors import GraphModeError, warn
from ofengine.modes.own_draws import would_keep

_FACTORIES = ("normal", "rand", "randint", "randn", "randperm")
_ALIKE = ("randint_like", "randn_like")


Draw = Callable[[], Any]
"""Gives the numbers of one run."""


class Draws:
    """The random calls of one compiled step, in their order.

    Args:
        prepare: each gives what draws for one of the calls. Not to be called in a trace.
    """

    def __init__(self, prepare: Sequence[Callable[[], Draw]] = ()) -> None:
        self._prepared = [each() for each in prepare]
        self.any = bool(self._prepared)

    def draw(self) -> List[Any]:
        """The numbers of the next run."""
        return [draw() for draw in self._prepared]


class Feed:
    """While tracing, makes an input of the graph of each random call.

    Args:
        add_input: makes an input of the graph that is traced, like the eager tensor it is given.
    """

    def __init__(self, add_input: Callable[[Any], Any]) -> None:
        self._add_input = add_input
        self._rand = flow.rand  # before it is replaced
        self.met: List[Callable[[], Draw]] = []
        """What :class:`Draws` are made of."""

    @contextlib.contextmanager
    def replacing_calls(self) -> Iterator[Feed]:
        """Let OneFlow's random functions ask this object in the ``with`` block.

        Those are left alone that cannot be drawn ahead: what they draw depends on what the step
        computes (``multinomial``), or goes into a tensor of it (``bernoulli_``).
        """
        makers: Dict[str, Any] = {"dropout": self._dropout, "bernoulli": self._bernoulli}
        makers.update(dict.fromkeys(_FACTORIES, self._factory))
        makers.update(dict.fromkeys(_ALIKE, self._alike))
        with contextlib.ExitStack() as stack:
            for name, make in makers.items():
                for holder, original in functions_by_name(name):
                    setattr(holder, name, partial(make, original))
                    stack.callback(setattr, holder, name, original)
            yield self

    def _feed(self, prepare: Callable[[], Draw], example: Any, like: Any = None) -> Any:
        """A further input like ``example``; ``like`` is the tensor whose shape that has."""
        self.met.append(prepare)
        return self._add_input(example)

    def _shape(self, like: Any) -> Tuple[int, ...]:
        """The shape of what is drawn here for a tensor."""
        return tuple(like.shape)

    # ------------------------------------------------------------------ replacements

    def _dropout(
        self,
        original: Any,
        input: Any,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        generator: Any = None,
        *,
        addend: Any = None,
    ) -> Any:
        if not training or p == 0.0:
            return original(input, p, training, inplace, generator, addend=addend)
        shape, spec = self._shape(input), {"dtype": input.dtype, "device": input.device}

        def prepare() -> Draw:
            return partial(original, flow.ones(shape, **spec), p, True, False, generator)

        scales = self._feed(prepare, eager_result(flow.zeros, shape, **spec), input)
        # 0 where dropped, else 1 / (1 - p)
        kept = input.mul_(scales) if inplace else input * scales
        if addend is None:
            return kept
        return kept.add_(addend) if inplace else kept + addend

    def _bernoulli(
        self,
        original: Any,
        input: Any,
        p: Optional[float] = None,
        *,
        dtype: Any = flow.float32,
        generator: Any = None,
        inplace: bool = False,
    ) -> Any:
        # libstdc++'s bernoulli_distribution compares one double from [0, 1), as rand draws it,
        # with p.
        shape, spec = self._shape(input), {"dtype": flow.float64, "device": flow.device("cpu")}
        draw = partial(self._rand, shape, generator=generator, **spec)
        drawn = self._feed(lambda: draw, eager_result(flow.zeros, shape, **spec), input)
        below = input.to(flow.float64) if p is None else p
        result = (drawn < below).to(dtype)
        if inplace:
            rename(input, like=result)
        return result

    def _factory(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        draw = partial(original, *args, **kwargs)
        return self._feed(lambda: draw, _example(original, args, kwargs))

    def _alike(self, original: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        shape, spec = self._shape(input), {"dtype": input.dtype, "device": input.device}

        def prepare() -> Draw:
            return partial(original, flow.zeros(shape, **spec), *args, **kwargs)

        like = eager_result(flow.zeros, shape, **spec)
        return self._feed(prepare, _example(original, (like, *args), kwargs), input)


def _example(function: Any, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    """What the call would give, drawn from a generator that nobody else has."""
    apart = flow.Generator(str(kwargs.get("device") or "cpu"))
    args = [apart if isinstance(each, type(apart)) else each for each in args]
    if not any(each is apart for each in args):
        kwargs = {**kwargs, "generator": apart}
    return eager_result(function, *args, **kwargs).detach()


def warn_of_unfed(what: str, operations: Sequence[str], mend: str) -> None:
    """Say which random numbers of the compiled step ``what`` are not those of eager mode."""
    if operations:
        warn(
            f"{what} draws inside the compiled graph ({', '.join(operations)}), from a sequence "
            f"that is not eager mode's and starts anew on a resume: {mend}."
        )


@contextlib.contextmanager
def no_numbers_frozen(what: str) -> Iterator[None]:
    """Raise :class:`GraphModeError` where the block draws from Python's or numpy's generator."""
    before = random.getstate(), _numpy_state()
    yield
    for name, same in (
        ("random", random.getstate() == before[0]),
        ("numpy.random", _numpy_state() == before[1]),
    ):
        if not same:
            raise GraphModeError(would_keep(what, name))


def _numpy_state() -> Tuple[Any, ...]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return (name, keys.tobytes(), *rest)
