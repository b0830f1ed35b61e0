"""Every optimizer x every kind of schedule x every kind of groups, against a loop by hand.

The loop below is plain eager OneFlow and shares no code with the engine: it computes each rate
from its definition in numpy, writes it into ``group["lr"]``, accumulates with
``(loss / k).backward()`` and clips with ``oneflow.nn.utils.clip_grad_norm_``. In both modes the
engine's rates equal the loop's at every step, exactly, and the weights are as near as the table
``APART`` says.

By default those of the 616 combinations are run that hold every pair (optimizer and schedule,
optimizer and groups, schedule and groups) at least once: 88 of them, in both modes; fewer hold
not all pairs of the 11 optimizers and 8 schedules. The others are marked slow.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import fill_deterministically, largest_difference, quiet_trainer, weights_of
from oneflow import nn
from oneflow.optim import lr_scheduler

from ofengine import Callback, TaskModule
from ofengine.callbacks import LRDecayCallback

# Frozen groups and tables shorter than the run, which the engine rightly points out.
pytestmark = pytest.mark.filterwarnings("ignore::ofengine.errors.OFEngineWarning")

F = np.float32

# ---------------------------------------------------------------------- optimizers

APART: Dict[str, float] = {
    # The largest difference of a weight (they are of the order of 1) that graph mode may have.
    # 0, the same bits: both modes run the same kernels in the same order.
    "SGD": 0.0,
    "momentum": 0.0,
    "nesterov": 0.0,
    "RMSprop": 0.0,
    "centered RMSprop": 0.0,
    "Adagrad": 0.0,
    "Adadelta": 0.0,
    # Both modes compute bias correction, 1 - beta ** step, in float32 as graphs do, and the loop
    # by hand in float64: see tests/modes/test_optimizers.py, which retraces both to the bit. A step
    # of length lr is up to 3e-5 of itself apart. Seen over all combinations: 3.2e-6, LAMB 6e-7.
    "Adam": 5e-6,
    "AdamW": 5e-6,
    "amsgrad": 5e-6,
    "LAMB": 1e-6,
}
"""How far both modes may be from the loop by hand."""

Make = Callable[[Any, float], Any]
OPTIMIZERS: Dict[str, Tuple[float, Make]] = {
    "SGD": (0.2, lambda g, lr: flow.optim.SGD(g, lr=lr)),
    "momentum": (0.1, lambda g, lr: flow.optim.SGD(g, lr=lr, momentum=0.9, weight_decay=0.01)),
    "nesterov": (0.1, lambda g, lr: flow.optim.SGD(g, lr=lr, momentum=0.9, nesterov=True)),
    "Adam": (0.01, lambda g, lr: flow.optim.Adam(g, lr=lr)),
    "AdamW": (0.01, lambda g, lr: flow.optim.AdamW(g, lr=lr, weight_decay=0.1)),
    "amsgrad": (0.01, lambda g, lr: flow.optim.AdamW(g, lr=lr, amsgrad=True)),
    "RMSprop": (0.01, lambda g, lr: flow.optim.RMSprop(g, lr=lr, alpha=0.9)),
    "centered RMSprop": (
        0.01,
        lambda g, lr: flow.optim.RMSprop(g, lr=lr, alpha=0.9, centered=True),
    ),
    "Adagrad": (0.05, lambda g, lr: flow.optim.Adagrad(g, lr=lr, initial_accumulator_value=0.1)),
    "Adadelta": (1.0, lambda g, lr: flow.optim.Adadelta(g, lr=lr)),
    "LAMB": (0.01, lambda g, lr: flow.optim.LAMB(g, lr=lr, weight_decay=0.1)),
}
"""The default rate, and what makes the optimizer."""

# ---------------------------------------------------------------------- schedules


class Scheduling(NamedTuple):
    """What a task returns as its scheduler, and the rate at each step by the definition."""

    make: Callable[[Any], Any]
    lr: Callable[[float, int], float]


TABLE = [0.1, 0.55, 1.0, 1.3, 0.7, 0.2]


def above_one(step: int) -> float:
    return 1.0 + 0.3 * step


def inverse(step: int) -> float:
    return 1.0 / (1.0 + 0.5 * step)


def cosine(lr: float, t: int) -> float:
    return 0.001 + (lr - 0.001) * (0.5 * (1.0 + math.cos(math.pi * t / 10)))


SCHEDULES: Dict[str, Optional[Scheduling]] = {
    "no schedule": None,
    "cosine": Scheduling(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.001), cosine
    ),
    "StepLR": Scheduling(
        lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
        lambda lr, t: lr * 0.3 ** (t // 3),
    ),
    "LambdaLR above 1": Scheduling(
        lambda o: lr_scheduler.LambdaLR(o, above_one),
        lambda lr, t: lr * (1.0 + 0.3 * t),
    ),
    "chained": Scheduling(
        lambda o: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3),
                lr_scheduler.ExponentialLR(o, gamma=0.9),
            ]
        ),
        lambda lr, t: (lr * 0.1 if t < 3 else lr) * 0.9**t,
    ),
    "warm-up and cosine": Scheduling(
        lambda o: lr_scheduler.WarmUpLR(
            lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.001),
            warmup_factor=0.25,
            warmup_iters=3,
            warmup_method="constant",
        ),
        lambda lr, t: lr * 0.25 if t < 3 else cosine(lr, t),
    ),
    "function": Scheduling(lambda o: inverse, lambda lr, t: lr * (1.0 / (1.0 + 0.5 * t))),
    "table": Scheduling(lambda o: TABLE, lambda lr, t: lr * TABLE[min(t, len(TABLE) - 1)]),
}

# ---------------------------------------------------------------------- groups


class Grouping(NamedTuple):
    """The parameter groups of a run, and what else is asked of it.

    ``options`` are those of each group, among which the layers' parameters are dealt out in
    order; ``lr`` in them is in units of the optimizer's default rate.
    """

    options: List[Dict[str, float]]
    layers: int = 4
    epochs: int = 2
    batches: int = 4
    accumulate: int = 1
    clip: Optional[float] = None
    frozen: Optional[int] = None
    every_n_batches: int = 10


THREE: List[Dict[str, float]] = [{"lr": 0.5, "lr_scale": 0.3}, {"lr_scale": 0.7}, {"lr": 1.5}]
DECAYING: List[Dict[str, float]] = [
    {"lr_decay_scale": 0.9},
    {"lr": 0.5, "lr_scale": 0.7, "lr_decay_scale": 0.8},
    {"lr": 1.5},
]
TWENTY: List[Dict[str, float]] = [
    {"lr_scale": 0.95**i, **({"lr": 1.0 + 0.1 * i} if i % 3 else {})} for i in range(20)
]

GROUPS: Dict[str, Grouping] = {
    "one group": Grouping([{}]),
    "three groups": Grouping(THREE),
    "twenty groups": Grouping(TWENTY, layers=10, epochs=1, batches=7),
    "decay": Grouping(DECAYING, every_n_batches=2),
    "a frozen group": Grouping(THREE, frozen=1),
    "accumulation": Grouping(THREE, epochs=3, batches=5, accumulate=2),  # windows of 2, 2 and 1
    "clipping": Grouping(THREE, clip=0.05),
}


def make_net(grouping: Grouping) -> nn.Module:
    parts: List[nn.Module] = []
    for _ in range(grouping.layers):
        parts += [nn.Linear(3, 3), nn.Tanh()]
    net = nn.Sequential(*parts[:-1])
    fill_deterministically(net, seed=3, spread=0.8)
    return net


def dealt_out(net: nn.Module, grouping: Grouping) -> List[List[Any]]:
    """The parameters of each group; those of the frozen group are frozen."""
    parameters = list(net.parameters())
    size = math.ceil(len(parameters) / len(grouping.options))
    dealt = [parameters[i * size : (i + 1) * size] for i in range(len(grouping.options))]
    assert all(dealt)
    if grouping.frozen is not None:
        for parameter in dealt[grouping.frozen]:
            parameter.requires_grad_(False)
    return dealt


def make_batches(grouping: Grouping) -> List[Tuple[Any, Any]]:
    arrays = np.random.RandomState(4).standard_normal((grouping.batches, 2, 4, 3)).astype(F)
    return [(flow.tensor(inputs), flow.tensor(targets)) for inputs, targets in arrays]


# ---------------------------------------------------------------------- the loop by hand


class Run(NamedTuple):
    """What a run is compared by."""

    rates: List[List[float]]
    weights: Dict[str, np.ndarray]


@functools.lru_cache(maxsize=None)
def by_hand(optimizer_name: str, schedule_name: str, groups_name: str) -> Run:
    default_lr, make = OPTIMIZERS[optimizer_name]
    schedule, grouping = SCHEDULES[schedule_name], GROUPS[groups_name]
    net = make_net(grouping)
    optimizer = make([{"params": p} for p in dealt_out(net, grouping)], default_lr)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    base = [default_lr * options.get("lr", 1.0) for options in grouping.options]
    decayed = list(base) if schedule is None else [1.0 for _ in base]
    batches, k = make_batches(grouping), grouping.accumulate
    rates: List[List[float]] = []
    clipped = 0
    for _ in range(grouping.epochs):
        for start in range(0, len(batches), k):
            window = batches[start : start + k]
            for inputs, targets in window:
                loss = ((net(inputs) - targets) ** 2).mean()
                (loss / len(window)).backward()
            if grouping.clip is not None:
                clipped += float(nn.utils.clip_grad_norm_(trained, grouping.clip)) > grouping.clip
            rates.append([])
            for group, options, lr, decay in zip(
                optimizer.param_groups, grouping.options, base, decayed
            ):
                unscaled = decay if schedule is None else schedule.lr(lr, len(rates) - 1) * decay
                group["lr"] = float(F(unscaled) * F(options.get("lr_scale", 1.0)))
                rates[-1].append(group["lr"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for index in range(start, start + len(window)):
                if index % grouping.every_n_batches == 0:
                    for i, options in enumerate(grouping.options):
                        decayed[i] *= options.get("lr_decay_scale", 1.0)
    assert grouping.clip is None or clipped == len(rates), "not every step was clipped"
    return Run(rates, weights_of(net))


# ---------------------------------------------------------------------- the engine


class Regression(TaskModule):
    """The same net, groups, optimizer and schedule, told to the engine."""

    def __init__(self, optimizer_name: str, schedule_name: str, groups_name: str) -> None:
        super().__init__()
        self.grouping = GROUPS[groups_name]
        self.net = make_net(self.grouping)
        self.default_lr, self.make = OPTIMIZERS[optimizer_name]
        self.schedule = SCHEDULES[schedule_name]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return ((self.net(inputs) - targets) ** 2).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        groups: List[Dict[str, Any]] = []
        dealt = dealt_out(self.net, self.grouping)
        for parameters, options in zip(dealt, self.grouping.options):
            group: Dict[str, Any] = {"params": parameters, **options}
            if "lr" in group:
                group["lr"] = self.default_lr * group["lr"]
            groups.append(group)
        return groups

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.param_groups(), self.default_lr)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule.make(optimizer)}


class RecordRates(Callback):
    """Before each optimizer step: the rates that the plan has for it."""

    def __init__(self) -> None:
        self.rates: List[List[float]] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == len(self.rates):
            self.rates.append(list(trainer.rates.rates(trainer.global_step)))


def by_engine(mode: str, optimizer_name: str, schedule_name: str, groups_name: str) -> Run:
    grouping = GROUPS[groups_name]
    task = Regression(optimizer_name, schedule_name, groups_name)
    record = RecordRates()
    quiet_trainer(
        mode=mode,
        max_epochs=grouping.epochs,
        accumulate_grad_batches=grouping.accumulate,
        gradient_clip_val=grouping.clip,
        callbacks=[record, LRDecayCallback(every_n_batches=grouping.every_n_batches)],
    ).fit(task, make_batches(grouping))
    return Run(record.rates, weights_of(task.net))


# ---------------------------------------------------------------------- the matrix

Case = Tuple[str, str, str]
PAIRWISE: List[Case] = [
    (optimizer, schedule, list(GROUPS)[(i + j) % len(GROUPS)])
    for i, optimizer in enumerate(OPTIMIZERS)
    for j, schedule in enumerate(SCHEDULES)
]
THE_REST: List[Case] = [
    case for case in itertools.product(OPTIMIZERS, SCHEDULES, GROUPS) if case not in set(PAIRWISE)
]


def check(mode: str, case: Case) -> None:
    """The engine's rates are the loop's, and its weights as near as promised."""
    expected, run = by_hand(*case), by_engine(mode, *case)
    assert run.rates == expected.rates
    allowed = APART[case[0]]  # both modes correct the bias as a graph does, the loop in float64
    difference, where = largest_difference(run.weights, expected.weights)
    assert difference <= allowed, f"{where} is {difference:.3g} apart"
    moved, _ = largest_difference(run.weights, weights_of(make_net(GROUPS[case[2]])))
    assert moved > 100 * APART[case[0]], "the weights hardly moved, so this shows nothing"


@pytest.mark.parametrize("case", PAIRWISE, ids=", ".join)
def test_rates_and_weights_are_the_loop_s(mode: str, case: Case) -> None:
    """Exactly its rates and, within ``APART``, its weights: every pair of the matrix."""
    check(mode, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", THE_REST, ids=", ".join)
def test_rates_and_weights_are_the_loop_s_in_the_rest(mode: str, case: Case) -> None:
    """As above: all combinations that remain."""
    check(mode, case)


def test_the_default_cases_hold_every_pair() -> None:
    """No two of an optimizer, a schedule and a kind of groups are left untried together."""
    axes = [list(OPTIMIZERS), list(SCHEDULES), list(GROUPS)]
    for first, second in itertools.combinations(range(3), 2):
        tried = {(case[first], case[second]) for case in PAIRWISE}
        assert tried == set(itertools.product(axes[first], axes[second]))
    assert len(PAIRWISE) + len(THE_REST) == math.prod(map(len, axes))
    assert set(APART) == set(OPTIMIZERS)


def test_the_runs_are_told_apart() -> None:
    """The comparison can fail: each schedule and each kind of groups gives weights of its own."""
    runs = [by_hand("momentum", schedule, "three groups") for schedule in SCHEDULES]
    runs += [by_hand("momentum", "cosine", groups) for groups in GROUPS if groups != "three groups"]
    for one, other in itertools.combinations(runs, 2):
        if list(one.weights) == list(other.weights):
            assert largest_difference(one.weights, other.weights)[0] > 1e-4
