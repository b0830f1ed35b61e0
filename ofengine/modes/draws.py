"""The random numbers of a compiled step, made those of eager mode.

What draws inside a compiled graph (a dropout layer, ``oneflow.rand``) draws from a sequence of its
own that starts anew with each graph: graphs for several batch shapes, or a resumed run, would
repeat it, and no generator records how far it is. Here these numbers are inputs of the graph
instead. A trace notes the random calls of the step, each is drawn eagerly before every run, in
the same order and from the same generator as in eager mode, and the trace that is compiled takes
what was drawn in the place of the call.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.operators import functions_by_name
from ofengine.errors import GraphModeError, warn

_FACTORIES = ("normal", "rand", "randint", "randn", "randperm")
_ALIKE = ("randint_like", "randn_like")


@attrs.frozen
class Draw:
    """One random call of a traced step."""

    prepare: Callable[[], Callable[[], Any]]
    """Gives what draws the numbers of one run. Not to be called in a trace."""
    shape: Tuple[int, ...]
    dtype: Any
    device: Any

    def placeholder(self) -> Any:
        """A tensor of the same kind; draws nothing."""
        return flow.zeros(self.shape, dtype=self.dtype, device=self.device)


class Draws:
    """The random calls of one compiled step, in their order."""

    def __init__(self, calls: Sequence[Draw] = ()) -> None:
        self._calls = tuple(calls)
        self._prepared = [call.prepare() for call in calls]
        self.any = bool(self._prepared)

    def placeholders(self) -> List[Any]:
        """Tensors like those that are drawn; draws nothing."""
        return [call.placeholder() for call in self._calls]

    def draw(self) -> List[Any]:
        """The numbers of the next run."""
        return [draw() for draw in self._prepared]


class DrawsMet(Exception):
    """Ends a trace that met random calls whose numbers are not inputs of the graph."""

    def __init__(self, calls: List[Draw]) -> None:
        super().__init__("random calls")
        self.calls = calls


class Feed:
    """While tracing, gives each random call the next of ``drawn``, or takes note of it.

    Args:
        drawn: the graph's inputs that hold what was drawn.
    """

    def __init__(self, drawn: Sequence[Any] = ()) -> None:
        self._following = list(drawn)
        self._rand = flow.rand  # before it is replaced
        self.met: List[Draw] = []
        """The calls for which nothing was drawn."""

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

    def stop_if_met(self) -> None:
        """Raise :class:`DrawsMet` where the graph lacks inputs."""
        if self.met:
            raise DrawsMet(self.met)

    def _note(
        self, prepare: Callable[[], Callable[[], Any]], shape: Any, dtype: Any, device: Any
    ) -> None:
        self.met.append(Draw(prepare, tuple(shape), dtype, device))

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
        if self._following:
            kept = input * self._following.pop(0)  # 0 where dropped, else 1 / (1 - p)
            return kept if addend is None else kept + addend
        shape, dtype, device = tuple(input.shape), input.dtype, input.device

        def prepare() -> Callable[[], Any]:
            ones = flow.ones(shape, dtype=dtype, device=device)
            return partial(original, ones, p, True, False, generator)

        self._note(prepare, shape, dtype, device)
        return input if addend is None else input + addend

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
        if self._following:
            below = input.to(flow.float64) if p is None else p
            return (self._following.pop(0) < below).to(dtype)
        spec = {"dtype": flow.float64, "device": flow.device("cpu")}
        draw = partial(self._rand, tuple(input.shape), generator=generator, **spec)
        self._note(lambda: draw, input.shape, **spec)
        return input.to(dtype)

    def _factory(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self._following:
            return self._following.pop(0)
        result = original(*args, **kwargs)
        draw = partial(original, *args, **kwargs)
        self._note(lambda: draw, result.shape, result.dtype, result.device)
        return result

    def _alike(self, original: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if self._following:
            return self._following.pop(0)
        shape, spec = tuple(input.shape), {"dtype": input.dtype, "device": input.device}
        result = original(input, *args, **kwargs)

        def prepare() -> Callable[[], Any]:
            return partial(original, flow.zeros(shape, **spec), *args, **kwargs)

        self._note(prepare, result.shape, result.dtype, result.device)
        return result


def active_dropouts(task: nn.Module) -> List[nn.Module]:
    """The dropout layers of ``task`` that draw masks now."""
    return [
        module
        for module in task.modules()
        if isinstance(module, nn.Dropout) and module.training and module.p > 0
    ]


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
            raise GraphModeError(
                f"{what} draws from {name} inside a compiled step: the step is traced once and "
                "would keep the numbers of its first batch for ever. Draw them in the dataset or "
                'in collate_fn, with oneflow.rand, or use Trainer(mode="eager").'
            )


def _numpy_state() -> Tuple[Any, ...]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return (name, keys.tobytes(), *rest)
