"""The quick update of OneFlow's optimizers against OneFlow's own ``step``, bit for bit."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers.data import batches
from helpers.tasks import Line
from helpers.trainers import quiet_trainer
from oneflow import nn, optim

from ofengine import Callback
from ofengine._oneflow.bias_correction import STEPPING, let_optimizers_ask
from ofengine._oneflow.quick_updates import quick_update_of
from ofengine._oneflow.watched_options import watch_options

KINDS: List[Callable[[Any], Any]] = [
    lambda groups: optim.SGD(groups, lr=0.1),
    lambda groups: optim.SGD(groups, lr=0.1, weight_decay=0.01, maximize=True),
    lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.3),
    lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, maximize=True),
    lambda groups: optim.Adam(groups, lr=0.1, weight_decay=0.01),
    lambda groups: optim.Adam(groups, lr=0.1, amsgrad=True, betas=(0.8, 0.95), eps=1e-5),
    lambda groups: optim.Adam(groups, lr=0.1, do_bias_correction=False),
    lambda groups: optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    lambda groups: optim.AdamW(groups, lr=0.1, weight_decay=0.1, amsgrad=True),
]


def two_alike() -> Any:
    flow.manual_seed(3)
    first = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 5))
    return first, copy.deepcopy(first)


def groups_of(model: Any) -> List[Dict[str, Any]]:
    """Two groups with values of their own; the last layer gets no gradient at every other step."""
    return [
        {"params": list(model[0].parameters()), "lr": 0.05},
        {"params": [*model[1].parameters(), *model[2].parameters()], "weight_decay": 0.03},
    ]


def state_of(optimizer: Any, model: Any) -> List[Any]:
    found: List[Any] = [optimizer._state["step"]]
    for group in optimizer.param_groups:
        found.append(dict(group.options))
    for parameter in model.parameters():
        kept = optimizer._state.get(parameter, {})
        found.append(parameter.numpy().tobytes())
        found.append({name: tensor.numpy().tobytes() for name, tensor in kept.items()})
    return found


def test_the_same_bits_and_the_same_state_as_oneflows_step() -> None:
    let_optimizers_ask()
    for make in KINDS:
        one, other = two_alike()
        quick, own = make(groups_of(one)), make(groups_of(other))
        watch_options(quick)
        update = quick_update_of(quick)
        assert update is not None
        for step in range(4):
            x = flow.randn(6, 3)
            for model in (one, other):
                y = model[1](model[0](x))
                (model[2](y) if step % 2 else y).square().sum().backward()
            if step == 2:
                for optimizer in (quick, own):
                    optimizer.param_groups[0]["lr"] = 0.02
            update(quick, step > 0)
            if step:
                assert all(each.grad is None for each in one.parameters())
            STEPPING.on = True
            try:
                own.step()
            finally:
                STEPPING.on = False
            for optimizer in (quick, own):
                optimizer.zero_grad(set_to_none=True)
            assert state_of(quick, one) == state_of(own, other)


class Own(optim.SGD):
    """A subclass, which may have any step."""


def test_what_is_not_oneflows_own_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimizer(kind: Any = optim.SGD) -> Any:
        return kind(nn.Linear(2, 2).parameters(), lr=0.1)

    assert quick_update_of(optimizer()) is not None
    assert quick_update_of(optimizer(Own)) is None
    assert quick_update_of(optimizer(optim.RMSprop)) is None
    patched = optimizer()
    patched.step = lambda: None
    assert quick_update_of(patched) is None
    patched = optimizer()
    patched._single_tensor_update = lambda group: None
    assert quick_update_of(patched) is None
    with monkeypatch.context() as patch:
        patch.setattr(optim.SGD, "_single_tensor_update", lambda self, group: None)
        assert quick_update_of(optimizer()) is None
    with monkeypatch.context() as patch:
        patch.setattr(optim.SGD, "step", lambda self: None)
        assert quick_update_of(optimizer()) is None
    with monkeypatch.context() as patch:
        patch.setattr(optim.SGD, "zero_grad", lambda self, set_to_none=False: None)
        assert quick_update_of(optimizer()) is None


class Replaces(Callback):
    """Puts another step into the place of the optimizer's after the third batch."""

    calls = 0

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            own = task.optimizer.step

            def step() -> None:
                self.calls += 1
                own()

            task.optimizer.step = step


class ZeroesItself(Line):
    """Counts what is asked of the optimizer's own zero_grad."""

    zeroed = 0

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        own = optimizer.zero_grad

        def zero_grad(set_to_none: bool = False) -> None:
            self.zeroed += 1
            own(set_to_none)

        optimizer.zero_grad = zero_grad
        return optimizer


class SeesGradients(Callback):
    """Looks at the gradients before they are cleared."""

    seen = 0

    def on_before_zero_grad(self, trainer: Any, task: Any, optimizer: Any) -> None:
        self.seen += all(each.grad is not None for each in task.parameters())


def test_gradients_are_cleared_where_somebody_looks_at_them_by_zero_grad_alone() -> None:
    task, sees = ZeroesItself(), SeesGradients()
    quiet_trainer(mode="eager", max_epochs=1).fit(task, batches(8))
    assert task.zeroed == 8 + 1  # and once before training
    quiet_trainer(mode="eager", max_epochs=1, callbacks=[sees]).fit(Line(), batches(8))
    assert sees.seen == 8


def test_a_step_that_is_replaced_on_the_way_is_called() -> None:
    replaces = Replaces()
    quiet_trainer(mode="eager", max_epochs=1, callbacks=[replaces]).fit(Line(), batches(8))
    assert replaces.calls == 5
