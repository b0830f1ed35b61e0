"""The update of OneFlow's SGD, Adam and AdamW in eager mode: the same kernels, with less Python.

OneFlow's own ``step`` looks each option of a group up once a parameter, each through a method of
Python's, and the state of a parameter up to six times. Here each is looked up once: the kernels
get the same tensors and numbers in the same order, so that the bits are the same. Fused groups and
all else go through OneFlow's.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import oneflow as flow
from oneflow import optim
from oneflow.autograd.autograd_mode import AutoGradMode

from ofengine._oneflow.bias_correction import graph_power
from ofengine._oneflow.watched_options import set_quietly

_sgd_update = flow._C.dispatch_sgd_update
_momentum_update = flow._C.dispatch_momentum_update
_adam_update = flow._C.dispatch_adam_update

_Update = Callable[[Any, bool], None]


def _sgd(optimizer: Any, clears: bool) -> None:
    states = optimizer._state
    with AutoGradMode(False):
        for group in optimizer.param_groups:
            options = group._options
            lr, l2, momentum = options["lr"], options["weight_decay"], options["momentum"]
            dampening, nesterov = options["dampening"], options["nesterov"]
            maximize = options["maximize"]
            for parameter in group._parameters:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if momentum == 0.0:
                    _sgd_update(optimizer._sgd, (parameter, gradient), learning_rate=lr, l2=l2)
                else:
                    state = states[parameter]
                    if "momentum_buf" not in state:
                        state["momentum_buf"] = flow.zeros_like(parameter)
                    _momentum_update(
                        optimizer._momentum_sgd,
                        (parameter, gradient, state["momentum_buf"]),
                        learning_rate=lr,
                        l2=l2,
                        beta=momentum,
                        dampening=dampening,
                        nesterov=nesterov,
                        maximize=maximize,
                    )
                if clears:
                    parameter._zero_grad_(True)
    states["step"] += 1


def _adam_like(decay: str) -> _Update:
    """The update of Adam or AdamW, which hand one kernel the weight decay by another name."""

    def update(optimizer: Any, clears: bool) -> None:
        states = optimizer._state
        step = states["step"] + 1
        with AutoGradMode(False):
            for group in optimizer.param_groups:
                options = group._options
                beta1, beta2 = options["betas"]
                if options["do_bias_correction"]:
                    set_quietly(options, "bias_correction1", 1.0 - graph_power(beta1, step))
                    set_quietly(options, "bias_correction2", 1.0 - graph_power(beta2, step))
                amsgrad = options["amsgrad"]
                kernel = optimizer._op_with_amsgrad if amsgrad else optimizer._op_without_amsgrad
                attributes: Dict[str, Any] = {
                    "learning_rate": options["lr"],
                    "bias_correction1": options["bias_correction1"],
                    "bias_correction2": options["bias_correction2"],
                    decay: options["weight_decay"],
                    "beta1": beta1,
                    "beta2": beta2,
                    "epsilon": options["eps"],
                    "do_bias_correction": options["do_bias_correction"],
                    "amsgrad": amsgrad,
                }
                names = _AVERAGES_AND_MOST if amsgrad else _AVERAGES
                for parameter in group._parameters:
                    gradient = parameter.grad
                    if gradient is None:
                        continue
                    state = states[parameter]
                    for name in names:
                        if name not in state:
                            state[name] = flow.zeros_like(parameter)
                    kept = [state[name] for name in names]
                    _adam_update(kernel, (parameter, gradient, *kept), **attributes)
                    if clears:
                        parameter._zero_grad_(True)
        states["step"] = step

    return update


_AVERAGES = ("exp_avg", "exp_avg_sq")
_AVERAGES_AND_MOST = (*_AVERAGES, "max_exp_avg_sq")

_QUICK: Dict[Any, _Update] = {
    optim.SGD.step: _sgd,
    optim.Adam.step: _adam_like("l2"),
    optim.AdamW.step: _adam_like("weight_decay"),
}
"""By OneFlow's own steps, as they were at the import."""
_ZERO_GRAD = optim.Optimizer.zero_grad
_OF_ONE_GROUP = {each: each._single_tensor_update for each in (optim.SGD, optim.Adam, optim.AdamW)}


def quick_update_of(optimizer: Any) -> Optional[_Update]:
    """What ``optimizer.step()`` does, None where that is not known.

    It is to be called with the optimizer and whether it ``clears`` each gradient that it has used,
    as ``zero_grad(set_to_none=True)`` would do. It is known of OneFlow's own classes as they are:
    neither of a subclass nor of one whose method somebody has replaced. While ``optimizer.step``
    is the same object, and no group becomes a fused one, the answer holds.
    """
    kind = type(optimizer)
    if _OF_ONE_GROUP.get(kind) is not kind.__dict__.get("_single_tensor_update", kind):
        return None
    if "_single_tensor_update" in vars(optimizer) or kind.zero_grad is not _ZERO_GRAD:
        return None
    if any(group._options["fused"] for group in optimizer.param_groups):
        return None
    # OneFlow puts a function around the method into each optimizer.
    cells: List[Any] = [*(getattr(optimizer.step, "__closure__", None) or ())]
    if len(cells) != 1 or getattr(cells[0].cell_contents, "__self__", None) is not optimizer:
        return None
    return _QUICK.get(cells[0].cell_contents.__func__)
