"""The same training as a loop over OneFlow's own operations, without the engine."""

from __future__ import annotations

import contextlib
import math
import types
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np
import oneflow as flow
from oneflow.nn.optimizer import adam, adamw, lamb
from subject import Configuration, Subject, change, subject_of

NEW_LR = 0.015
"""To what the hook ``set_lr`` sets the rate of the last group."""


def power_of_a_graph(beta: float, step: float) -> float:
    """``beta ** step`` by repeated squaring in float32, as OneFlow's graphs compute it."""
    power, square, left = np.float32(1), np.float32(beta), int(step)
    while left:
        power = power * square if left & 1 else power
        square, left = square * square, left >> 1
    return float(power)


@contextlib.contextmanager
def correcting_as_graphs() -> Iterator[None]:
    """Bias correction of OneFlow's eager optimizers as in graphs: the engine promises it."""
    own = types.SimpleNamespace(**{**vars(math), "pow": power_of_a_graph})
    kept = [(module, module.math) for module in (adam, adamw, lamb)]
    for module, _ in kept:
        module.math = own
    try:
        yield
    finally:
        for module, before in kept:
            module.math = before


def can_be_done(drawn: Configuration) -> bool:
    """True where nothing is the engine's alone: dropout's masks, what a plateau has seen."""
    return "dropout" not in drawn.blocks and drawn.schedule != "plateau"


def train(drawn: Configuration, batches: Sequence[Any]) -> List[Dict[str, bytes]]:
    """The bits of loss and weights after each of ``batches``, those of two epochs."""
    task = subject_of(drawn)
    made = task.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    schedule = made["lr_scheduler"]["scheduler"] if isinstance(made, dict) else None
    groups = optimizer.param_groups
    base = [_option(group, "initial_lr", group["lr"]) for group in groups]
    rows, length, step, events, waiting = [], len(drawn.sizes), 0, 0, 0
    for seen, batch in enumerate(batches):
        epoch, index = divmod(seen, length)
        change(task, groups, seen)
        if drawn.hook == "set_lr" and seen == drawn.hook_at:
            base[-1] = NEW_LR
        window = min(drawn.accumulate, length - index // drawn.accumulate * drawn.accumulate)
        closes = (index + 1) % drawn.accumulate == 0 or index + 1 == length
        task.log = lambda *_, **__: None  # type: ignore[method-assign]
        loss = task.training_step(batch, index)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        (loss if window == 1 else loss / window).backward()
        waiting += drawn.groups == "scaled" and index % drawn.every == 0
        if closes:
            _drop_frozen(groups)
            _clip(drawn, groups)
            position = step if drawn.interval == "step" else epoch
            for group, lr in zip(groups, base):
                rate = _scheduled(schedule, lr, position)
                scale, decay = (
                    _option(group, "lr_scale", 1.0),
                    _option(group, "lr_decay_scale", 1.0),
                )
                # As a graph rounds it: the decayed rate, then its product with the scale.
                lowered = np.float32(rate * decay**events)
                group["lr"] = float(lowered * np.float32(scale))
            with correcting_as_graphs():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            events, waiting = events + waiting, 0  # they follow the step of the batch's window
        rows.append(bits_of(task, loss))
    return rows


def _scheduled(schedule: Any, lr: float, position: int) -> float:
    if schedule is None:
        return lr
    if hasattr(schedule, "lr_lambdas"):
        return float(lr * schedule.lr_lambdas[0](position))
    return float(schedule.get_lr(lr, position))


def _option(group: Any, key: str, default: float) -> float:
    return float(group[key]) if key in group else default


def _drop_frozen(groups: Any) -> None:
    """What is frozen stays as it is, whatever its window has added up before."""
    for group in groups:
        for parameter in group.parameters:
            if not parameter.requires_grad:
                parameter.grad = None


def _clip(drawn: Configuration, groups: Any) -> None:
    parameters = [p for group in groups for p in group.parameters if p.grad is not None]
    if drawn.clip == "norm":
        flow.nn.utils.clip_grad_norm_(parameters, 0.5)
    elif drawn.clip == "value":
        for parameter in parameters:
            parameter.grad = parameter.grad.clamp(min=-0.05, max=0.05)
    for group in groups:
        if "clip_grad_max_norm" in group:
            own = [p for p in group.parameters if p.grad is not None]
            flow.nn.utils.clip_grad_norm_(own, group["clip_grad_max_norm"])


def bits_of(task: Subject, loss: Any) -> Dict[str, bytes]:
    """Loss, parameters and buffers to the bit."""
    tensors = [*task.named_parameters(), *task.named_buffers()]
    return {"loss": loss.numpy().tobytes(), **{name: t.numpy().tobytes() for name, t in tensors}}
