"""A context of ``autograd.Function`` keeps what is written on it, as any object does."""

from __future__ import annotations

import sys
from typing import Any

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow.autograd import Function

from ofengine import TaskModule
from ofengine._oneflow.function_contexts import mend_function_contexts

FunctionCtx = flow._oneflow_internal.autograd.Function.FunctionCtx


def test_what_is_read_stays() -> None:
    context, value = FunctionCtx(), object()
    before = sys.getrefcount(value)
    context.value = value
    assert all(context.value is value for _ in range(100))
    assert getattr(context, "value", None) is value and hasattr(context, "value")
    assert sys.getrefcount(value) == before + 1
    del context.value
    assert sys.getrefcount(value) == before
    with pytest.raises(AttributeError, match="value"):
        context.value  # noqa: B018  it raises
    with pytest.raises(AttributeError, match="value"):
        del context.value


def test_its_dict_stays() -> None:
    context = FunctionCtx()
    context.value = 3
    own = context.__dict__
    before = sys.getrefcount(own)
    assert all(vars(context) == {"value": 3} for _ in range(100))
    assert sys.getrefcount(own) == before
    own["other"] = 4
    assert context.other == 4


def test_what_is_written_goes_with_the_context() -> None:
    context, value = FunctionCtx(), object()
    before = sys.getrefcount(value)
    context.value = value
    context.value  # noqa: B018  the reading is what is tested
    del context
    assert sys.getrefcount(value) == before


def test_mending_again_changes_nothing() -> None:
    assert mend_function_contexts() and mend_function_contexts()
    test_what_is_read_stays()


class Scaled(Function):
    """x times a number that is made anew in each call, and is read thrice in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.scale, ctx.shape = float(f"{x.shape[0]}.25"), tuple(x.shape)
        return x * ctx.scale

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (x,) = ctx.saved_tensors
        scale = ctx.scale
        before = sys.getrefcount(scale)
        assert ctx.scale == ctx.scale == 4.25 and ctx.shape == (4, 1)
        assert sys.getrefcount(scale) == before
        return gradient * scale + 0 * x


class Task(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = flow.nn.Parameter(flow.ones(1, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Scaled.apply(batch[0] * self.weight).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_step_reads_it_as_often_as_it_likes(mode: str) -> None:
    """w(t) - w(t+1) is the rate times the gradient, which is the number on the context."""
    task, steps = Task(), 12
    quiet_trainer(mode=mode, max_epochs=1).fit(task, [(flow.ones(4, 1),)] * steps)
    assert task.weight.item() == 1 - steps * 0.5 * 4.25
